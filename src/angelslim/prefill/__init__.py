"""Layer 8: runs that make a model's prefill sparse: from a recipe to measured settings beside the model.

No weight changes. A run searches what a method searches, measures time, density, mass and error, finds the length from
which sparse is faster, and leaves `sparse_attention.json` with a record and a page.
"""
