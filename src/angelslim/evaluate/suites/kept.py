"""What an unfinished suite has answered, on disk: a file for each task and length, written again after every prompt.

A prompt is kept with all its attentions or not at all, since their times are compared. The folder belongs to one command
(`base.place`); a file that is not whole, whatever tore it, counts as absent and its task begins again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...base import console
from ...base.files import write_atomically
from .run import Cell

EVERY_PROMPT = ("scores", "ttft_ms", "selector_ms", "kernel_ms")  # lists with an entry for each prompt


class Kept:
    """The answered prompts in a folder that exists and is this command's own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, task: str, length: int, attentions: Sequence[str]) -> dict[str, Cell] | None:
        """Return what is kept of a task, each attention with the same prompts; None if there is nothing whole."""
        path = self._path(task, length)
        if not path.exists():
            return None
        cells = _whole(path)
        wanted = [(task, length, name) for name in dict.fromkeys(attentions)]
        if [(cell.task, cell.length, cell.attention) for cell in cells] != wanted:
            console.log.warning("%s is not whole; its task begins again.", path)
            return None
        return {cell.attention: cell for cell in cells}

    def write(self, cells: Sequence[Cell]) -> None:
        """Keep what a task has so far."""
        text = json.dumps([asdict(cell) for cell in cells])
        write_atomically(self._path(cells[0].task, cells[0].length), text.encode())

    def say(self, total: int) -> None:
        """Say how many of the suite's prompts were answered before."""
        files = [cells for path in self.root.glob("*-*.json") if (cells := _whole(path))]
        done = sum(len(cells[0].scores) for cells in files)
        if done:
            console.log.info(
                "Continuing in %s: %d of %d prompts were answered before.", self.root, done, total
            )

    def _path(self, task: str, length: int) -> Path:
        return self.root / f"{length}-{task}.json"


def _whole(path: Path) -> list[Cell]:
    """Read a file; none if it is torn, or if its attentions answered different numbers of prompts."""
    try:
        cells = [Cell(**each) for each in json.loads(path.read_text("utf-8"))]
        counts = {len(getattr(cell, name)) for cell in cells for name in EVERY_PROMPT}
    except (ValueError, TypeError):
        return []
    return cells if len(counts) == 1 else []
