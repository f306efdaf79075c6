"""Post-training quantization: each module is one algorithm and works with any scheme."""
