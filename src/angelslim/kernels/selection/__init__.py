"""Choosing blocks on a GPU: pooled tokens, scores of blocks, and the lists of the best ones."""
