"""Layer 0: errors, registry, console. Imports the standard library and rich only."""
