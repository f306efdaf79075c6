"""A suite, run: every task at every length with every attention, one prompt at a time.

The prompt is read in one forward pass that returns the last logits only, with the clock on until the first token is known
(TTFT); the rest of the answer is decoded greedily from the cache. Attentions take turns on every prompt, so that a
machine that slows down slows all of them, and share the prompts, so that they can be compared sample by sample.

What is answered is kept after every prompt, if there is a `Keeper`, and a later run goes on behind it.

The attention is the caller's: `attend` gives a context manager for a name, whose figures say what was read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ...base import console
from ..inference import device_of, inference, last_logits, read_so_far, stop_tokens
from .base import Sample, Task, tokens_of
from .means import interval, warm


class AttentionFigures(Protocol):
    """What a suite asks of an attention when its prompts have been read."""

    @property
    def density(self) -> float | None:
        """The share of the causal area that was read."""

    @property
    def fallbacks(self) -> dict[str, int]:
        """Dense calls by reason."""

    @property
    def selector_ms(self) -> float:
        """Milliseconds spent choosing blocks."""

    @property
    def kernel_ms(self) -> float:
        """Milliseconds spent in the kernel."""


Attend = Callable[[str], AbstractContextManager[AttentionFigures]]


@dataclass
class Cell:
    """One task at one length with one attention; each sample has a score from 0 to 1 and its milliseconds."""

    task: str
    length: int
    attention: str
    family: str = ""
    scores: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    selector_ms: list[float] = field(default_factory=list)
    kernel_ms: list[float] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Plain values, with the mean score in percent and its 95 % interval."""
        low, high = interval(self.scores)
        return {
            **asdict(self),
            "value": 100 * float(np.mean(self.scores)),
            "low": 100 * low,
            "high": 100 * high,
            "density": float(np.mean(self.densities)) if self.densities else None,
            "ttft": float(np.median(warm(self.ttft_ms))),
        }


class Progress(Protocol):
    """What shows how far a suite is."""

    def advance(self, note: str = "") -> None:
        """Move one prompt on."""


class Keeper(Protocol):
    """Where the answers of a task are kept while the suite is not complete."""

    def read(self, task: str, length: int, attentions: Sequence[str]) -> dict[str, Cell] | None:
        """Return what is kept of a task, each attention with the same prompts; None if there is nothing whole."""

    def write(self, cells: Sequence[Cell]) -> None:
        """Keep what a task has so far."""


@dataclass(frozen=True)
class Reader:
    """What answers the prompts of a suite."""

    model: Any
    tokenizer: Any
    attend: Attend

    def ask(self, task: Task, sample: Sample, cells: Mapping[str, Cell]) -> None:
        """Answer one prompt with the attention of every cell, in turn."""
        stops, where = stop_tokens(self.model, self.tokenizer), device_of(self.model)
        ids = torch.tensor([tokens_of(self.tokenizer, sample, task.chat)], device=where)
        for name, cell in cells.items():
            with inference(self.model), self.attend(name) as figures:
                written, spent = answer(self.model, ids, task.new_tokens, stops)
            reply = self.tokenizer.decode(written, skip_special_tokens=True)
            cell.scores.append(task.score(reply, sample))
            cell.ttft_ms.append(spent)
            _add(cell, figures)


def run_task(
    reader: Reader,
    task: Task,
    found: Sequence[Sample],
    length: int,
    attentions: Sequence[str],
    keeper: Keeper | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Answer every sample with every attention and return a row for each attention; `progress` moves at each sample.

    A kept prompt is taken over with all its attentions, so that times which are compared come from one process.
    """
    kept = keeper.read(task.name, length, attentions) if keeper else None
    cells = kept or _empty(task, length, attentions)
    begun = len(cells[attentions[0]].scores)
    for index, sample in enumerate(found):
        if index >= begun:
            if index == begun > 0:  # this process compiles its kernels anew: read once without a clock
                reader.ask(task, sample, _empty(task, length, attentions))
            reader.ask(task, sample, cells)
            if keeper:
                keeper.write(list(cells.values()))
        if progress:
            progress.advance(f"{task.name}, {length} tokens")
    rows = [cell.row() for cell in cells.values()]
    for row in rows:
        console.log.info(
            "%s, %d, %s: %.1f %%, density %s, TTFT %.0f ms",
            *(row["task"], length, row["attention"], row["value"]),
            "–" if row["density"] is None else f"{row['density']:.3f}",
            row["ttft"],
        )
    return rows


def _empty(task: Task, length: int, attentions: Sequence[str]) -> dict[str, Cell]:
    return {name: Cell(task.name, length, name) for name in attentions}


def _add(cell: Cell, figures: AttentionFigures) -> None:
    density = figures.density
    if density is not None:
        cell.densities.append(density)
    cell.selector_ms.append(figures.selector_ms)
    cell.kernel_ms.append(figures.kernel_ms)
    for reason, count in figures.fallbacks.items():
        cell.fallbacks[reason] = cell.fallbacks.get(reason, 0) + count


def answer(model: Any, ids: torch.Tensor, new_tokens: int, stops: Sequence[int]) -> tuple[list[int], float]:
    """Return the greedy answer to a prompt [1, T], without its stop token, and the milliseconds to its first token."""
    begun = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, **last_logits(model, 1))
    token = int(output.logits[0, -1].argmax())  # waits for the device
    spent = 1000 * (time.perf_counter() - begun)
    written: list[int] = []
    while token not in stops:
        written.append(token)
        if len(written) == new_tokens:
            break
        step = torch.tensor([[token]], device=ids.device)
        output = model(input_ids=step, use_cache=True, **read_so_far(output))
        token = int(output.logits[0, -1].argmax())
    return written, spent
