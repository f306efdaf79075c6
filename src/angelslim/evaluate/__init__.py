"""Layer 4: what a model can do and what it costs, before and after compression.

Every measurement takes a loaded model and returns `base.Score` values, so that any two models (the original,
the quantized one, one served by another engine) are compared with the same currency.
"""
