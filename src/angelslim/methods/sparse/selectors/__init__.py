"""Selectors of sparse attention, one method a file; the file's name is the name that recipes use."""
