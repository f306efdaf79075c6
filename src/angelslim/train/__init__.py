"""Layer 5: the only training loop of the package: quantization-aware training, distillation, drafts and tiny models.

`loop` holds the loop and what it promises; `settings` how to train; `checkpoint` what a restart needs; `sharding`
models that are spread over processes; `history` and `board` what was measured.
"""

from .batches import Batch, BatchAt
from .checkpoint import CHECKPOINT
from .history import HISTORY, StepRecord
from .loop import Loss, LossOf, OnStep, stepwise, train
from .settings import TrainSettings, rate_at
from .sharding import whole_weights

__all__ = [
    "CHECKPOINT",
    "HISTORY",
    "Batch",
    "BatchAt",
    "Loss",
    "LossOf",
    "OnStep",
    "StepRecord",
    "TrainSettings",
    "rate_at",
    "stepwise",
    "train",
    "whole_weights",
]
