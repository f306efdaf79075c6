"""How to train, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

_FREE = ("checkpoint_every", "workers", "compile", "gradient_checkpointing", "fsdp", "tensorboard")


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the fields down to `seed` decide the result and may not change between restarts."""

    steps: int
    lr: float = 1e-3
    warmup: int = 0  # steps of linear rise
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warm-up, stable, decay
    decay: float = 0.2  # share of the steps in which wsd falls linearly
    lowest: float = 0.0  # where cosine and wsd end, as a share of lr
    weight_decay: float = 0.0  # on matrices only, never on norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # gradient norm; 0 turns clipping off
    bf16: bool = False
    accumulation: int = 1  # batches a step
    seed: int = 0
    checkpoint_every: int = 500
    workers: int = 0  # processes that prepare batches ahead
    compile: bool = False  # torch.compile; worth its minute on long runs only
    gradient_checkpointing: bool = (
        False  # gradient checkpointing: a block's activations are made again when needed
    )
    fsdp: bool = False  # several processes share the weights and moments instead of each holding all
    tensorboard: bool = False  # event files in `folder`/tensorboard

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result."""
        kept = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return {**kept, "betas": list(self.betas)}


def rate_at(step: int, settings: TrainSettings) -> float:
    """Return the learning rate of a 0-based step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "wsd":
        start = max(settings.warmup, round(settings.steps * (1 - settings.decay)))
        fall = max(step - start, 0) / max(settings.steps - start, 1)
    else:
        passed = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
        fall = (1 - math.cos(math.pi * passed)) / 2
    return settings.lr * (1 - (1 - settings.lowest) * fall)
