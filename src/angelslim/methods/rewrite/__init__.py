"""Function-preserving changes of the whole checkpoint as it is read, one a file."""
