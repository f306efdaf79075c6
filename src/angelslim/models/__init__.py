"""Layer 3: any transformers model, one block at a time. Structure is discovered, not tabulated."""
