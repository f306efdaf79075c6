"""Layer 4: compression methods, one idea a file. A method never imports another, nor export, nor evaluate."""
