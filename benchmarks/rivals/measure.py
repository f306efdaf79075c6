"""Run one tool on one recipe in its own process and environment, and keep what came of it.

A finished row is one JSON file in the work folder, so that a long benchmark goes on where it stopped. A row that failed
holds the end of what the tool said and is tried again the next time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from angelslim.pipeline import tokenizer_of
from rivals import samples
from rivals.environments import python_of
from rivals.quality import Judge

HERE = Path(__file__).resolve().parent
LIMIT = 1200  # seconds


@dataclass(frozen=True)
class Entry:
    """A tool and the name of a recipe in its runner."""

    tool: str
    recipe: str

    def __str__(self) -> str:
        return f"{self.tool}:{self.recipe}"


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    samples: int  # of calibration
    tokens: int  # of each sample and of each held-out window
    windows: int  # held out
    examples: int  # of each task


class Subject:
    """A model that is compressed: its folder, its calibration sets and its judge."""

    def __init__(
        self, name: str, folder: Path, work: Path, settings: Settings, *, on_calibration: bool = False
    ) -> None:
        self.name, self.folder, self.work, self.settings = name, folder, work, settings
        self.on_calibration = on_calibration  # whether rows are judged on the calibration samples too
        self.tokenizer = tokenizer_of(folder)
        ids = samples.held_out(self.tokenizer, settings.windows, settings.tokens)
        examples = 0 if on_calibration else settings.examples
        self.judge = Judge(folder, self.tokenizer, ids, examples, work, name)

    def ids(self, seed: int) -> Path:
        """Return the file of one calibration set."""
        path = self.work / "ids" / f"{self.name}-{seed}.safetensors"
        settings = self.settings
        return samples.write_calibration(path, self.tokenizer, settings.samples, settings.tokens, seed)

    def calibration_judge(self, seed: int) -> Judge:
        """Return the judge whose windows are the calibration samples."""
        ids = load_file(self.ids(seed))["input_ids"].clone()
        return Judge(self.folder, self.tokenizer, ids, 0, self.work, f"{self.name}-calibration-{seed}")


@dataclass(frozen=True)
class Bench:
    """Where a benchmark works and what it runs with."""

    work: Path
    environments: Path
    threads: int
    timed: bool = True  # whether the machine is idle enough for times to mean something

    def row(self, model: str, entry: Entry, seed: int) -> Path:
        """Return the file of one finished row."""
        return self.work / "rows" / f"{model}-{entry.tool}-{entry.recipe}-{seed}.json"

    def measure(self, subject: Subject, entry: Entry, seed: int) -> dict[str, Any]:
        """Return the row of one run, measured now or read back."""
        path = self.row(subject.name, entry, seed)
        if path.is_file():
            return dict(json.loads(path.read_text("utf-8")))
        found = {"model": subject.name, "tool": entry.tool, "recipe": entry.recipe, "seed": seed}
        found["timed"] = self.timed
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        found |= self._run(subject.folder, subject.ids(seed), entry, out)
        if "error" not in found:
            found["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            found |= subject.judge.judge(out)
            if subject.on_calibration:
                found["calibration_kl"] = subject.calibration_judge(seed).judge(out)["kl"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found), "utf-8")
        shutil.rmtree(out, ignore_errors=True)
        return found

    def _run(self, folder: Path, ids: Path, entry: Entry, out: Path) -> dict[str, Any]:
        """Run the tool; return its own measurements with wall and processor time of the whole process."""
        result = self.work / "result.json"
        result.unlink(missing_ok=True)
        python = python_of(self.environments, entry.tool)
        program = [python, HERE / f"run_{entry.tool}.py", folder, ids, entry.recipe, out, result]
        said = self.work / "said.txt"
        load = os.getloadavg()[0]
        start = time.perf_counter()
        with said.open("wb") as stream:
            process = subprocess.Popen(
                list(map(str, program)),
                stdout=stream,
                stderr=stream,
                env=self._environment(entry.tool),
                cwd=self.work,
            )
            usage, ended = self._wait(process)
        wall = time.perf_counter() - start
        if not ended or process.returncode or not result.is_file():
            last = said.read_text("utf-8", errors="replace").strip().splitlines()[-4:]
            return {
                "error": " | ".join(last)[-600:] if ended else f"stopped after {LIMIT} s",
                "seconds": wall,
            }
        return {
            "seconds": round(wall, 3),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
            "load_before": round(load, 2),
            **json.loads(result.read_text("utf-8")),
        }

    def _wait(self, process: subprocess.Popen[bytes]) -> tuple[Any, bool]:
        """Wait for the process; return its resource usage, children included, and whether it ended by itself."""
        deadline = time.monotonic() + LIMIT
        ended = True
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return usage, ended
            if ended and time.monotonic() > deadline:
                process.kill()
                ended = False
            time.sleep(0.02)

    def _environment(self, tool: str) -> dict[str, str]:
        threads = str(self.threads)
        # a path of ours must not lead into another tool's environment
        inherited = {
            name: value for name, value in os.environ.items() if tool == "angelslim" or name != "PYTHONPATH"
        }
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        return {**inherited, **dict.fromkeys(names, threads), **offline, "TOKENIZERS_PARALLELISM": "false"}
