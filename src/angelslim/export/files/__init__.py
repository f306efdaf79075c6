"""Formats that keep a whole model in one file."""
