"""Layer 3: what models read: calibration text, chat records, and the generators that need no download."""
