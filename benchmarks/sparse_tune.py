"""What makes sparse prefill fast on this GPU: cuts of the kernels, and where a selector's time goes.

    python benchmarks/sparse_tune.py                      one GPU, under three minutes
    python benchmarks/sparse_tune.py --parts selection    half a minute

Each candidate is first compiled and compared with the dense masked reference in a process of its own, many at once, so
that one that crashes or hangs costs nothing but itself. Those that agree are timed at density .10, one layer of
Qwen3-8B's shape. Cuts of the program that sums up union's cells are timed too. Selectors are traced: their kernels by
time, and how many they launch. A part that is not measured keeps its figures in the results file.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from angelslim.kernels.attention import dense, hopper, triton_flash
from angelslim.kernels.attention.triton_flash import Tiles
from angelslim.kernels.selection import fused
from common import RESULTS
from sparse_speed import BLOCK, context, dense_candidates, flops, inputs, milliseconds, random_plan

LENGTHS = (32768, 131072)
SMALL = 2048
CUTS = {
    f"triton {numbers}": Tiles(*numbers)
    for numbers in (
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (128, 32, 4, 4),
        (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3),
    )
}  # fmt: skip
HOPPER = {"hopper 2": 2, "hopper 3": 3}
TRACED = (("union", 0.1), ("stem", 0.1))
CELL_CUTS = ((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
             (128, 128, 8, 2))  # fmt: skip
LIMIT, HOPPER_LIMIT = 100, 45  # seconds of one candidate's process


def runner(name: str) -> Callable[..., Tensor]:
    """The candidate as a function of q, k, v, plan."""

    def run(q: Tensor, k: Tensor, v: Tensor, plan: Any) -> Tensor:
        scaling = q.shape[-1] ** -0.5
        if name in HOPPER:
            return hopper.run(q, k, v, plan, scaling=scaling, stages=HOPPER[name])
        return triton_flash.run(q, k, v, plan, scaling=scaling, tiles=CUTS[name])

    return run


def alone(name: str) -> dict[str, Any]:
    """Compile one candidate and compare it; those that may hang are timed here too."""
    device, run = torch.device("cuda"), runner(name)
    q, k, v = inputs(SMALL, device)
    plan = random_plan(SMALL, q.shape[1], 0.3, device)
    begun = time.perf_counter()
    out = run(q, k, v, plan)
    torch.cuda.synchronize()
    found: dict[str, Any] = {"first_call_s": time.perf_counter() - begun}
    expected = dense.run(q.float(), k.float(), v.float(), plan, scaling=q.shape[-1] ** -0.5)
    found["largest_difference"] = float((out.float() - expected).abs().max())
    if not found["largest_difference"] < 2e-2:
        return found | {"error": "wrong"}
    return found | (timed(name) if name in HOPPER else {})


def timed(name: str) -> dict[str, Any]:
    """Milliseconds and TFLOP/s at each length."""
    device, run, found = torch.device("cuda"), runner(name), {}
    for length in LENGTHS:
        q, k, v = inputs(length, device)
        plan = random_plan(length, q.shape[1], 0.1, device)
        once = functools.partial(run, q, k, v, plan)
        once()
        ms = statistics.median(milliseconds(once, device) for _ in range(9))
        work = flops(length, q.shape[1], q.shape[3], plan.density())
        found[str(length)] = {"ms": ms, "tflops": work / ms / 1e9}
    return found


def apart(names: list[str], limit: float) -> dict[str, dict[str, Any]]:
    """`alone` for some candidates, each in its own process, at once."""
    begun, running = time.monotonic(), {}
    for name in names:
        command = [sys.executable, __file__, "--alone", name]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found: dict[str, dict[str, Any]] = {}
    for name, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(limit - (time.monotonic() - begun), 0.1))
            last = said.strip().rpartition("\n")[2]
            found[name] = json.loads(last) if last.startswith("{") else {"error": said[-3000:]}
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            found[name] = {"error": f"over {limit} s", "said": said[-3000:]}
        print(name, json.dumps(found[name])[:400] if "error" not in found[name] else found[name], flush=True)
    return found


def dense_times() -> dict[str, Any]:
    """The dense baselines."""
    found: dict[str, Any] = {}
    for length in LENGTHS:
        q, k, v = inputs(length, torch.device("cuda"))
        for name, run in dense_candidates(q, k, v).items():
            if name not in ("sdpa", "sdpa cudnn"):
                continue
            run()
            ms = statistics.median(milliseconds(run, q.device) for _ in range(5))
            found[f"{name}, {length}"] = ms
    return found


def traced(method: str, density: float, length: int) -> dict[str, Any]:
    """A selector's time, launches, and its 15 longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    from angelslim.methods.sparse.selectors.base import SELECTORS

    q, k, v = inputs(length, torch.device("cuda"))
    ctx = context(length, q.shape[3])
    select = SELECTORS.get(method)({"density": density}).select
    for _ in range(2):
        select(q, k, v, ctx)
    ms = statistics.median(milliseconds(lambda: select(q, k, v, ctx), q.device) for _ in range(7))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        select(q, k, v, ctx)
        torch.cuda.synchronize()
    kernels = [e for e in trace.events() if str(e.device_type).endswith("CUDA")]
    by_name: dict[str, list[float]] = {}
    for event in kernels:
        by_name.setdefault(event.name[:90], []).append(event.device_time)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:15]
    table = [{"us": round(sum(times)), "count": len(times), "name": name} for name, times in longest]
    busy = sum(sum(times) for times in by_name.values()) / 1e3
    return {"ms": ms, "busy_ms": busy, "launches": len(kernels), "longest": table}


def cell_cuts(length: int) -> dict[str, Any]:
    """Milliseconds of each cut of the program over cells."""
    from angelslim.methods.sparse.selectors.union import cells_for

    (q, k, _), found = inputs(length, torch.device("cuda")), {}
    cells = cells_for(BLOCK, length)
    for numbers in CELL_CUTS:
        once = functools.partial(
            fused.cell_masses, q, k, cells, 0, BLOCK, q.shape[3] ** -0.5, fused.Cut(*numbers)
        )
        try:
            once()
            found[str(numbers)] = statistics.median(milliseconds(once, q.device) for _ in range(9))
        except Exception as error:  # noqa: BLE001  a cut may not fit
            found[str(numbers)] = f"{type(error).__name__}: {error}"[:300]
    return found


def kernels_part(book: dict[str, Any], only: str) -> None:
    """Cuts of the attention kernels."""
    names = [name for name in CUTS if name.startswith(only)]
    book["checked"] = apart(names, LIMIT)
    for name in HOPPER:
        if name.startswith(only):
            book["checked"] |= apart([name], HOPPER_LIMIT)
    book["dense_ms"] = dense_times()
    print(book["dense_ms"], flush=True)
    for name in [name for name in names if "error" not in book["checked"][name]]:
        book["checked"][name] |= timed(name)
        print(name, {key: book["checked"][name][str(key)] for key in LENGTHS}, flush=True)


def selection_part(book: dict[str, Any]) -> None:
    """Cuts and traces of selection."""
    for length in LENGTHS:
        book[f"cells, {length}"] = cell_cuts(length)
        print("cells", length, json.dumps(book[f"cells, {length}"]), flush=True)
        for method, density in TRACED:
            try:
                found = traced(method, density, length)
            except Exception:  # noqa: BLE001
                found = {"error": traceback.format_exc()}
            book[f"{method}, {length}"] = found
            print(method, length, json.dumps(found, indent=1), flush=True)


def main() -> None:
    """Measure everything; what fails is recorded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alone", help="one candidate, for this script's own processes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--parts", default="kernels,selection", help="what to measure")
    parser.add_argument("--only", default="", help="candidates whose names begin so")
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(alone(given.alone)), flush=True)
        return
    path = given.out / "sparse_tune.json"
    book: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    book |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if "kernels" in given.parts:
        kernels_part(book, given.only)
    if "selection" in given.parts:
        selection_part(book)
    given.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(book, indent=1) + "\n")


if __name__ == "__main__":
    main()
