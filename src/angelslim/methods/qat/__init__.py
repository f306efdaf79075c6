"""Quantizers of quantization-aware training: what a linear layer's weight is rounded to while it is trained."""
