"""What the runners of all tools share: one command line, one clock, one result.

A runner is a script that its tool's own environment executes, so it imports nothing of this project but this file,
and this file nothing but the standard library. It compresses one model with one recipe and exits:

    python run_TOOL.py MODEL IDS RECIPE OUT RESULT

MODEL is a folder, IDS a safetensors file with ``input_ids`` [samples, tokens], OUT the folder to write, and RESULT the
JSON file that gets what only the process itself can know: the time and processor time of the tool's own call, of the
work around it (loading, the call, saving; not the imports), and the largest resident set (VmHWM, which unlike ru_maxrss
does not count the parent's memory).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

START = time.perf_counter()


@dataclass
class Task:
    """One compression: where it reads and writes, and what was measured."""

    model: str
    ids: str
    out: str
    measured: dict[str, Any] = field(default_factory=dict)
    began: tuple[float, float] = (0.0, 0.0)

    def ready(self) -> None:
        """Say that everything is imported: from here on the model is loaded, compressed and saved."""
        self.measured["import_seconds"] = round(time.perf_counter() - START, 3)
        self.measured["import_bytes"] = peak_resident()
        self.began = (time.perf_counter(), time.process_time())

    def done(self) -> None:
        """Say that the result is on disk."""
        self.measured["work_seconds"] = round(time.perf_counter() - self.began[0], 3)
        self.measured["work_cpu_seconds"] = round(time.process_time() - self.began[1], 3)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Time the tool's own call."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.measured["call_seconds"] = round(time.perf_counter() - wall, 3)
        self.measured["call_cpu_seconds"] = round(time.process_time() - cpu, 3)

    def samples(self) -> Any:
        """Return the token ids ``[samples, tokens]``."""
        from safetensors.torch import load_file

        return load_file(self.ids)["input_ids"]


def peak_resident() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text("utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main(recipes: Mapping[str, Callable[[Task], None]], packages: tuple[str, ...]) -> None:
    """Run the recipe that the command line names and write the result."""
    model, ids, recipe, out, result = sys.argv[1:]
    task = Task(model, ids, out)
    recipes[recipe](task)
    task.done()
    versions: dict[str, str] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    found = {**task.measured, "peak_bytes": peak_resident(), "versions": versions}
    Path(result).write_text(json.dumps(found), "utf-8")
