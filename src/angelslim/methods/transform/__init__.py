"""Function-preserving changes of a block before it is rounded, one transform a file."""
