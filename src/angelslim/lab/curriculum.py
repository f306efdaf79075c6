"""What the tiny language model reads at each step: batches as a pure function of the batch's index.

The run starts with much scaffolding and short lists (`rows` says why), then settles on the two tasks and the
text. The text is small, so it repeats often; wrong tokens among those that are read, never among those that
are to be predicted, keep the model from learning it by heart.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import builtin
from .rows import Rows

WARM_UP = 0.45  # share of the run with much scaffolding
LADDER = ((0.34, 2), (0.38, 4), (0.43, 6), (1.0, builtin.PAIRS))  # until this share of the run: pairs at most
CORRUPTION = 0.2  # share of a text row's tokens that are read wrongly, at most; half of the rows are clean


KINDS = ("addition", "recall", "copy", "lines", "text")
Shares = Callable[
    [float], tuple[float, ...]
]  # progress, 0 to 1 -> shares of the rows by kind; text gets the rest


def shares_at(progress: float) -> tuple[float, ...]:
    """Return the shares of the rows by kind at a point of the run, from 0 to 1; text gets the rest."""
    return (0.12, 0.12, 0.06, 0.6) if progress < WARM_UP else (0.28, 0.48, 0.02, 0.1)


def text_share(shares: Shares = shares_at) -> float:
    """Return the share of all rows of a run that are text."""
    return WARM_UP * (1 - sum(shares(0.0))) + (1 - WARM_UP) * (1 - sum(shares(1.0)))


def pairs_at(progress: float) -> int:
    """Return the most pairs that a recall list has at a point of the run, from 0 to 1."""
    return next(pairs for until, pairs in LADDER if progress <= until)


@dataclass(frozen=True)
class Curriculum:
    """Makes the batches of a run: ``curriculum(index)`` is batch `index`, always the same.

    `core` is the tokenizer's backend, `corpus` the training text as int16 [tokens]. Every `long_every`-th
    batch has a quarter of the rows at four times the length, so that the whole context is trained.
    """

    core: Any
    corpus: Tensor
    batches: int  # in the whole run
    rows: int
    length: int
    seed: int
    long_every: int = 16
    shares: Shares = shares_at

    @cached_property
    def _make(self) -> Rows:
        return Rows(self.core, self.corpus)

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return ``inputs`` and ``targets`` (int64) and ``weights`` (float32), each [rows, length].

        Targets stand at their own positions: the loss shifts them. ``kinds`` [rows] indexes `KINDS`.
        """
        rng = random.Random(f"tiny-lm/{self.seed}/{index}")  # noqa: S311  not for secrets
        long = index % self.long_every == self.long_every - 1
        rows, length = (self.rows // 4, self.length * 4) if long else (self.rows, self.length)
        progress = index / self.batches
        most = pairs_at(progress)
        counts = [round(share * rows) for share in self.shares(progress)]
        kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
        kinds += [KINDS.index("text")] * (rows - len(kinds))
        made = [self._row(KINDS[kind], rng, length, most) for kind in kinds]
        inputs, targets, weights = (np.stack(side) for side in zip(*made, strict=True))
        arrays = {"inputs": inputs, "targets": targets, "weights": weights, "kinds": np.array(kinds)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _row(self, kind: str, rng: random.Random, length: int, most: int) -> tuple[Any, Any, Any]:
        if kind == "text":
            tokens, weights = self._make.text(rng, length)
            noise = CORRUPTION * max(2 * rng.random() - 1, 0)
            return self._make.corrupted(rng, tokens, noise), tokens, weights
        if kind == "copy":
            tokens, weights = self._make.copy(rng, length)
        elif kind == "lines":
            tokens, weights = self._make.lines(rng, length, most)
        else:
            tokens, weights = self._make.chats(rng, length, most if kind == "recall" else None)
        return tokens, tokens, weights


def weighted_loss(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weighted mean cross-entropy of the next token, in nats, over all and for each kind of row."""
    weights = batch["weights"][:, 1:]
    logits = model(input_ids=batch["inputs"], use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["targets"][:, 1:].flatten(), reduction="none"
    )
    lost = (each.view_as(weights) * weights).sum(1)
    weights = weights.sum(1)
    losses = {"loss": lost.sum() / weights.sum()}
    for index, kind in enumerate(KINDS):
        rows = (batch["kinds"] == index).float()
        losses[kind] = (lost * rows).sum().detach() / (weights * rows).sum().clamp(min=1)
    return losses
