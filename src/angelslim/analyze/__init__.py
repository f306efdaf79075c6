"""Layer 7: diagnosis: what a checkpoint's scales and weights look like, and which layers a recipe hurts most."""
