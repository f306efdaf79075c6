"""The record of every step: in memory, in ``steps.jsonl`` and, if asked for, in TensorBoard.

Losses stay on the device and are read a few steps at a time, since each reading makes a GPU wait.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from ..base.errors import Diverged
from .board import Board

HISTORY = "steps.jsonl"
CURVES = "tensorboard"  # folder of event files
_FLUSH = 20  # steps between two readings of the loss


@dataclass(frozen=True)
class StepRecord:
    """What one step measured; `seconds` is the time since the step before."""

    step: int
    loss: float
    lr: float
    norm: float  # of the gradient, before clipping
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


class History:
    """All steps so far; on a restart cut back to the checkpoint. One process writes."""

    def __init__(self, path: Path, done: int, *, write: bool, tensorboard: bool = False) -> None:
        self.path, self.write, self.note = path, write, ""
        self.records: list[StepRecord] = []
        self._waiting: list[tuple[int, float, dict[str, Tensor], float]] = []
        self._clock = time.perf_counter()
        if done and path.is_file():
            rows = (json.loads(line) for line in path.read_text("utf-8").splitlines()[:done])
            self.records = [StepRecord(**row) for row in rows]
        if write:
            lines = "".join(json.dumps(asdict(record)) + "\n" for record in self.records)
            temporary = path.with_name(path.name + ".partial")
            temporary.write_text(lines, "utf-8")
            os.replace(temporary, path)
        self.board = Board(path.parent / CURVES, done) if write and tensorboard else None

    def add(self, step: int, rate: float, measured: dict[str, Tensor]) -> None:
        """Take in a step's measurements, which may still be on their way."""
        now = time.perf_counter()
        self._waiting.append((step, rate, measured, now - self._clock))
        self._clock = now
        if len(self._waiting) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Read what waits and write it down; a loss that is no longer finite is `Diverged`."""
        fresh = [_record(*row) for row in self._waiting]
        self._waiting = []
        for record in fresh:
            if not math.isfinite(record.loss):
                raise Diverged(
                    f"The loss is {record.loss} at step {record.step}.",
                    where=str(self.path),
                    fix="Lower the learning rate, lengthen the warm-up or clip the gradient, and start anew.",
                )
        self.records += fresh
        if fresh:
            self.note = f"loss {sum(record.loss for record in fresh) / len(fresh):.3f}"
        if self.write:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(record)) + "\n" for record in fresh)
        if self.board is not None:
            for record in fresh:
                values = {"loss": record.loss, "lr": record.lr, "gradient norm": record.norm}
                self.board.add(record.step, values | record.metrics)
            self.board.flush()

    def close(self) -> None:
        """Finish the event files."""
        if self.board is not None:
            self.board.close()


def _record(step: int, rate: float, measured: dict[str, Tensor], seconds: float) -> StepRecord:
    values = {name: float(value) for name, value in measured.items()}
    loss, norm = values.pop("loss"), values.pop("norm")
    return StepRecord(step, loss, rate, norm, round(seconds, 4), values)
