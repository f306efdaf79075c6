"""What `tiny-long` can do: right answers by family of task and length, each row read in one forward pass.

The answers of a row are right if every one of their tokens is the model's first choice, given the answer's tokens before
it: what greedy generation would write. In one pass the questions in the middle of a row can be scored too, and with sparse
attention the answers' own tokens read sparsely as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from .rows import Maker, Rows
from .tokens import Tokens

MOST_TOKENS = 2**17  # of one batch


@dataclass(frozen=True)
class Family:
    """A kind of question: how its rows are drawn, and of what a right answer is worth."""

    title: str
    draw: Callable[[Maker, int, int], Rows]  # maker, rows, length


FAMILIES = {
    "key-value": Family(
        "one fact in 16 tokens, 4 asked at the end",
        lambda maker, rows, length: maker.ending(
            rows, length, min(length // 16, maker.tokens.keys // 2), 1, 4
        ),
    ),
    "needle": Family(
        "one fact of 4 values in text, asked at the end",
        lambda maker, rows, length: maker.ending(rows, length, 1, 4, 1),
    ),
    "multi-key": Family(
        "16 facts of 2 values, 4 asked at the end",
        lambda maker, rows, length: maker.ending(rows, length, 16, 2, 4),
    ),
    "middle": Family(
        "16 facts, each asked anywhere behind it",
        lambda maker, rows, length: maker.middle(rows, length, 16, 1),
    ),
    "variable tracking": Family(
        "4 chains of 2 links, one followed", lambda maker, rows, length: maker.chains(rows, length, 4, 2)
    ),
    "copy": Family(
        "4 passages of 16 words, one copied",
        lambda maker, rows, length: maker.ending(rows, length, 4, 16, 1),
    ),
    "aggregation": Family(
        "the most frequent of 16 words", lambda maker, rows, length: maker.common(rows, length, 16, 4)
    ),
}
TEXT = "text"


@dataclass(frozen=True)
class Result:
    """One family at one length: a value for each row (share of its questions, or nats a word for text)."""

    family: str
    length: int
    each: tuple[float, ...]

    @property
    def value(self) -> float:
        """The mean: percent of questions answered, or the perplexity of text."""
        mean = sum(self.each) / len(self.each)
        return math.exp(mean) if self.family == TEXT else 100 * mean

    @property
    def stderr(self) -> float:
        """The standard error of the mean over rows, in the value's unit."""
        count, mean = len(self.each), sum(self.each) / len(self.each)
        spread = math.sqrt(sum((x - mean) ** 2 for x in self.each) / max(count - 1, 1) / count)
        return spread * (self.value if self.family == TEXT else 100)


def rows_of(
    family: str, tokens: Tokens, corpus: Tensor, length: int, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw the rows of a family on the corpus' device, tokens and weights [count, length]."""
    generator = Generator(corpus.device).manual_seed(seed)
    maker = Maker(tokens, corpus, generator)
    return maker.text(count, length) if family == TEXT else FAMILIES[family].draw(maker, count, length)


@torch.inference_mode()
def score(model: Any, family: str, tokens: Tensor, weights: Tensor) -> Result:
    """Score drawn rows [R, T]; the model reads as many at once as `MOST_TOKENS` allow."""
    each: list[float] = []
    size = max(MOST_TOKENS // tokens.shape[1], 1)
    for begin in range(0, len(tokens), size):
        part, weight = tokens[begin : begin + size], weights[begin : begin + size]
        chosen = torch.zeros_like(weight, dtype=torch.bool)
        chosen[:, 1:] = weight[:, 1:] > (0.0 if family == TEXT else 0.5)
        hidden = model.model(input_ids=part, use_cache=False).last_hidden_state
        row, column = chosen.nonzero(as_tuple=True)
        logits = model.lm_head(hidden[row, column - 1]).float()
        targets = part[row, column]
        if family == TEXT:
            lost = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            each += _means(lost, row, len(part))
        else:
            each += _answers(logits.argmax(-1) == targets, row, column, len(part))
    return Result(family, tokens.shape[1], tuple(each))


def _means(values: Tensor, row: Tensor, rows: int) -> list[float]:
    total = torch.zeros(rows, device=values.device).index_add_(0, row, values.float())
    count = torch.zeros(rows, device=values.device).index_add_(0, row, torch.ones_like(values.float()))
    means: list[float] = (total / count.clamp_min(1)).tolist()
    return means


def _answers(right: Tensor, row: Tensor, column: Tensor, rows: int) -> list[float]:
    """The share of each row's answers whose tokens, which stand side by side, are all right."""
    starts = torch.ones_like(right)
    starts[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1)
    answer = starts.long().cumsum(0) - 1
    wrong = torch.zeros(int(answer[-1]) + 1, device=right.device).index_add_(0, answer, (~right).float())
    return _means((wrong == 0), row[starts], rows)
