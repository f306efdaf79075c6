"""Sparse attention for the prefill of long prompts: selectors choose blocks, kernels compute them, a hook joins both."""
