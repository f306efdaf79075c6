"""Layer 1: tensors in, tensors out. No ``nn.Module`` here: this package is the oracle for every kernel."""
