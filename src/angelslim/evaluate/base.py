"""A measured figure: the common currency of every evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Score:
    """One figure with what is needed to judge it."""

    metric: str  # "perplexity", "addition", "recall", "tokens/s", "size"
    value: float
    unit: str = ""  # "", "%", "MB", "tokens/s"
    better: Literal["lower", "higher"] = "higher"
    samples: int = 0  # documents, prompts or tokens behind the figure
    stderr: float | None = None
