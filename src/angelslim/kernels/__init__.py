"""Layer 2: kernels, chosen by capability; each has a slow readable reference."""
