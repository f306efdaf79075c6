"""Block-sparse attention: one plan, several kernels that all compute the same numbers."""
