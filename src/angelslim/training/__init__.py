"""Layer 8: runs that train: quantization-aware training and distillation, from a recipe to a complete model folder.

`job` makes every choice, `data` packs the rows, `student` is the model with its quantizers, `run` trains and hands the
result to the pipeline, which writes, checks, measures and reports it like any other compression.
"""
