"""Layer 4: checkpoint formats. Each module turns quantized layers into the tensors and config that engines read."""
