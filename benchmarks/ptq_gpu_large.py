"""Large shapes on one GPU: time, GPU memory and host memory of GPTQ on 8 billion parameters, and of W4A8-FP8 on a
two-block slice of DeepSeek-V3 with its 256 experts.

The checkpoints are random (`random_checkpoints.py`) and so are the token ids; what is measured does not depend on them.
Each run is a process of its own. While it works, a watcher writes the results file again every few seconds: blocks
done, the largest memory seen by the driver (`nvidia-smi`, other processes' included) and by the kernel (VmHWM). A run that
does not fit into a time limit leaves what it had; `--blocks N` measures a slice and says what all blocks would take.

    python benchmarks/ptq_gpu_large.py gptq [--blocks 36] [--folder /tmp/large] [--json results.json]
    python benchmarks/ptq_gpu_large.py deepseek [--blocks 2] [--dense 0] [--gpu-limit 24]

The second keeps PyTorch's allocator under `--gpu-limit` GB: a run that needs more fails instead of being measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ALL_BLOCKS = {"gptq": 36, "deepseek": 61}
RECIPES = {"gptq": "int4_gptq", "deepseek": "deepseek_w4a8_fp8"}
EVERY = 3.0  # seconds between two looks


def make(options: argparse.Namespace) -> None:
    """Write the random checkpoint and the token ids (in a process of its own)."""
    import torch
    from safetensors.torch import save_file

    from random_checkpoints import deepseek_v3, qwen3_8b, write_checkpoint

    small = options.small
    config = (
        qwen3_8b(options.blocks, small=small)
        if options.task == "gptq"
        else deepseek_v3(options.blocks, options.dense, small=small)
    )
    write_checkpoint(config, options.folder / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (options.samples, options.tokens), generator=generator)
    save_file({"input_ids": ids}, options.folder / "ids.safetensors")


def compress(options: argparse.Namespace) -> None:
    """Compress (in a process of its own) and write what only this process knows."""
    import torch

    from angelslim.engine import compress as run
    from common import environment

    cuda = torch.cuda.is_available()
    if cuda and options.gpu_limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(options.gpu_limit * 1e9 / total, 1.0))
    start = time.perf_counter()
    result = run(
        options.folder / "model",
        options.recipe or RECIPES[options.task],
        out=options.folder / "out",
        global__device="cuda" if cuda else "cpu",
        dataset__data_path=str(options.folder / "ids.safetensors"),
        dataset__num_samples=options.samples,
        dataset__max_seq_length=options.tokens,
        evaluation__enabled=False,
    )
    found = {
        "seconds": time.perf_counter() - start,
        "gpu_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "gpu_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
        "host_peak_bytes": resident(os.getpid()),
        "bytes_before": result.report.bytes_before,
        "bytes_after": result.report.bytes_after,
        "layers": len(result.report.layers),
        "warnings": result.report.warnings[:5],
        "environment": environment(),
    }
    (options.folder / "measured.json").write_text(json.dumps(found), "utf-8")


def resident(pid: int) -> int:
    """Return the largest resident set of a process so far, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def gpu_used() -> int:
    """Return the bytes in use on the GPU, as the driver counts them; 0 without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(said.split()[0]) * 2**20


class Watch:
    """The row of one run, and the results file that holds it from the first second on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.row: dict[str, Any] = {
            key: getattr(options, key)
            for key in ("task", "blocks", "dense", "samples", "tokens", "gpu_limit")
        }
        self.row |= {
            "recipe": options.recipe or RECIPES[options.task],
            "gpu_peak_bytes": 0,
            "host_peak_bytes": 0,
        }

    def step(self, name: str, program: list[str]) -> bool:
        """Run one step of the work, looking at it until it ends."""
        used_before = gpu_used()
        start, began = time.perf_counter(), time.time()
        process = subprocess.Popen(program, cwd=HERE)
        units: dict[str, float] = {}
        while process.poll() is None:
            time.sleep(EVERY)
            for file in (self.options.folder / "out.partial" / "units").glob("*.safetensors"):
                with suppress(OSError):  # it may be gone, joined to a shard
                    units.setdefault(file.stem, round(file.stat().st_mtime - began, 2))
            self.row[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
            if name == "compress":
                self.row["gpu_peak_bytes"] = max(self.row["gpu_peak_bytes"], gpu_used() - used_before)
                self.row["host_peak_bytes"] = max(self.row["host_peak_bytes"], resident(process.pid))
                self.row["units_done_at"] = units
            self.write()
        self.row[f"{name}_exit"] = process.returncode
        return process.returncode == 0

    def finish(self) -> None:
        """Take over what the compressing process measured, and what all blocks would take."""
        measured = self.options.folder / "measured.json"
        if measured.is_file():
            self.row |= json.loads(measured.read_text("utf-8"))
        units = self.row.get("units_done_at", {})
        done = sorted(value for name, value in units.items() if name.startswith("block"))
        if len(done) > 1:
            each = statistics.median(after - before for before, after in itertools.pairwise(done))
            rest = ALL_BLOCKS[self.options.task] - self.options.blocks
            self.row["seconds_a_block"] = round(each, 2)
            self.row["seconds_of_all_blocks"] = round(self.row["compress_seconds"] + rest * each, 1)
        self.write()

    def write(self) -> None:
        """Write the results file; rows of other tasks stay."""
        path: Path = self.options.json
        held = json.loads(path.read_text("utf-8")) if path.is_file() else {"bars": [], "raw": []}
        raw = [row for row in held["raw"] if row["task"] != self.options.task] + [self.row]
        bars = [bar for row in raw for bar in bars_of(row)]
        place = next((row["environment"] for row in raw if "environment" in row), held.get("environment"))
        kept = [{key: value for key, value in row.items() if key != "environment"} for row in raw]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(
            json.dumps({"environment": place, "bars": bars, "raw": kept}, indent=1) + "\n", "utf-8"
        )
        temporary.replace(path)


def bars_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what has to hold of a finished row: the DeepSeek slice stays under 24 GB."""
    if row["task"] != "deepseek" or row.get("compress_exit") != 0:
        return []
    peak = max(row["gpu_peak_bytes"], row.get("gpu_reserved_bytes", 0))
    name = "DeepSeek-V3-shaped blocks, W4A8-FP8: peak bytes of GPU memory"
    return [{"name": name, "value": peak, "goal": 24e9, "holds": peak <= 24e9}]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(RECIPES))
    parser.add_argument("--blocks", type=int, help="decoder blocks (default: 36; 2 for deepseek)")
    parser.add_argument("--dense", type=int, default=0, help="deepseek: how many of them are dense")
    parser.add_argument("--samples", type=int, help="default: 128; 16 for deepseek")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--recipe", help=f"default: {RECIPES}")
    parser.add_argument(
        "--gpu-limit", type=float, help="GB that may be allocated (default: none; 24 for deepseek)"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/angelslim-large"))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "ptq_gpu_large.json")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for a next run")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script anywhere")
    parser.add_argument("--step", choices=["make", "compress"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    large = options.task == "gptq"
    options.blocks = options.blocks or (36 if large else 2)
    options.samples = options.samples or (128 if large else 16)
    options.gpu_limit = options.gpu_limit or (None if large else 24.0)
    options.folder, options.json = options.folder.resolve(), options.json.resolve()
    return options


def main() -> None:
    """Make the checkpoint if it is not there, compress it, and report."""
    options = arguments()
    if options.step:
        {"make": make, "compress": compress}[options.step](options)
        return
    watch = Watch(options)
    program = [
        sys.executable,
        str(HERE / "ptq_gpu_large.py"),
        *sys.argv[1:],
        "--folder",
        str(options.folder),
        "--step",
    ]
    made = (options.folder / "ids.safetensors").is_file() or watch.step("make", [*program, "make"])
    if made and watch.step("compress", [*program, "compress"]):
        shutil.rmtree(options.folder / "out", ignore_errors=True)
    watch.finish()
    if not options.keep:
        shutil.rmtree(options.folder, ignore_errors=True)
    print(json.dumps(watch.row, indent=1))


if __name__ == "__main__":
    main()
