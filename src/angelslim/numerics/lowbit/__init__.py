"""Weights of one to two bits: thresholds, scales, levels and codes, without gradients."""
