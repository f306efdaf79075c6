"""What the tiny language model reads at each step: batches as a pure function of the batch's index.

The run starts with much scaffolding and short lists (`rows` says why), then settles on the two tasks and the
text. The text is small, so it repeats often; wrong tokens among those that are read, never among those that
are to be predicted, keep the model from learning it by heart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import builtin
from .rows import Row, Rows

WARM_UP = 0.10  # share of the run with much scaffolding
LADDER = ((0.05, 2), (0.10, 4), (0.15, 6), (1.0, builtin.PAIRS))  # until this share of the run: pairs at most
CORRUPTION = 0.2  # share of a text row's tokens that are read wrongly, at most; half of the rows are clean


@dataclass(frozen=True)
class Shares:
    """Shares of the rows of a batch, by kind of data; text gets the rest."""

    addition: float
    recall: float
    copy: float
    lines: float


def shares_at(progress: float) -> Shares:
    """Return the mixture at a point of the run, from 0 to 1."""
    return Shares(0.15, 0.15, 0.15, 0.4) if progress < WARM_UP else Shares(0.3, 0.4, 0.03, 0.12)


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

    @cached_property
    def _make(self) -> Rows:
        return Rows(self.core, self.corpus)

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return ``inputs`` and ``targets`` (int64) and ``weights`` (float32), each [rows, length].

        Targets stand at their own positions: the loss shifts them.
        """
        rng = random.Random(f"tiny-lm/{self.seed}/{index}")  # noqa: S311  not for secrets
        long = index % self.long_every == self.long_every - 1
        rows, length = (self.rows // 4, self.length * 4) if long else (self.rows, self.length)
        progress = index / self.batches
        shares, most = shares_at(progress), pairs_at(progress)
        made: list[Row] = []
        made += [self._make.chats(rng, length, None) for _ in range(round(shares.addition * rows))]
        made += [self._make.chats(rng, length, most) for _ in range(round(shares.recall * rows))]
        made += [self._make.copy(rng, length) for _ in range(round(shares.copy * rows))]
        made += [self._make.lines(rng, length, most) for _ in range(round(shares.lines * rows))]
        inputs = [tokens for tokens, _ in made]
        for _ in range(rows - len(made)):
            made.append(self._make.text(rng, length))
            noise = CORRUPTION * max(2 * rng.random() - 1, 0)
            inputs.append(self._make.corrupted(rng, made[-1][0], noise))
        return {
            "inputs": torch.from_numpy(np.stack(inputs)),
            "targets": torch.from_numpy(np.stack([tokens for tokens, _ in made])),
            "weights": torch.from_numpy(np.stack([weights for _, weights in made])),
        }


def weighted_loss(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weighted mean cross-entropy of the next token, in nats."""
    weights = batch["weights"][:, 1:].flatten()
    logits = model(input_ids=batch["inputs"], use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["targets"][:, 1:].flatten(), reduction="none"
    )
    return {"loss": (each * weights).sum() / weights.sum()}
