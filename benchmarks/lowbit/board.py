"""The work folder that several processes share: one result file a run, one lock a run.

A lock is held by the operating system for the process (``flock``): whoever dies loses it, so nothing has to be cleaned
up. A result is written whole or not at all, and a run with a result is never repeated. A run that failed leaves its
traceback and is not tried again before the next command.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from angelslim.models.checkpoint import write_atomically

from .study import Run

GUESS = 0.1  # seconds a step, before anything was measured


class Board:
    """What is done, who does what."""

    def __init__(self, folder: Path, tried: dict[str, dict[str, Any]] | None = None) -> None:
        """`tried` are trials of an earlier machine, which count as done."""
        self.folder, self.tried = folder, tried or {}
        for name in ("rows", "locks", "errors", "weights"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def row(self, name: str) -> dict[str, Any] | None:
        """Return the result of a run, None when there is none."""
        path = self.folder / "rows" / f"{name}.json"
        try:
            return dict(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return self.tried.get(name)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return all results of this folder by run."""
        names = sorted(path.stem for path in (self.folder / "rows").glob("*.json"))
        return {name: row for name in names if (row := self.row(name)) is not None}

    def post(self, name: str, row: dict[str, Any]) -> None:
        """Write a result."""
        write_atomically(self.folder / "rows" / f"{name}.json", (json.dumps(row, indent=1) + "\n").encode())

    def failed(self, name: str) -> Path:
        """Return where a failed run's traceback lies."""
        return self.folder / "errors" / f"{name}.txt"

    def done(self, name: str) -> bool:
        """Say whether a run has its result."""
        return name in self.tried or (self.folder / "rows" / f"{name}.json").is_file()

    def open_runs(self, runs: list[Run]) -> list[Run]:
        """Return the runs without a result or a failure."""
        return [run for run in runs if not self.done(run.name) and not self.failed(run.name).exists()]

    def ready(self, run: Run) -> bool:
        """Say whether all that a run needs is done."""
        return all(self.done(name) for name in run.needs)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold a run's lock within the context; False when another process has it or the run is done by now."""
        handle = os.open(self.folder / "locks" / name, os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not self.done(name) and not self.failed(name).exists()
        finally:
            os.close(handle)  # which gives the lock back

    def busy(self, runs: list[Run]) -> bool:
        """Say whether another process works on one of the runs."""
        for run in runs:
            handle = os.open(self.folder / "locks" / run.name, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(handle)
        return False

    def seconds_of(self, run: Run) -> float:
        """Estimate how long a run takes from the slowest step of its like so far."""
        seen = [row for row in self.rows().values() if row.get("steps") and row.get("seconds")]
        own = [row for row in seen if row["method"] == run.method] or [
            row for row in seen if row["kind"] != "base"
        ]
        each = max((row["seconds"] / row["steps"] for row in own), default=GUESS)
        return run.steps * each * 1.1 + 3.0


class Deadline:
    """When no more runs may start; without minutes, never."""

    def __init__(self, until: float | None) -> None:
        self.until = until

    @classmethod
    def after(cls, minutes: float | None) -> Deadline:
        """Return the deadline so many minutes from now."""
        return cls(None if minutes is None else time.time() + minutes * 60)

    def left(self) -> float:
        """Return the seconds that are left."""
        return float("inf") if self.until is None else self.until - time.time()
