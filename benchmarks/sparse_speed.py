"""How much faster sparse prefill is than the fastest dense attention of the same process, selection included.

    python benchmarks/sparse_speed.py cpu                 two threads, 4k to 16k tokens, minutes
    python benchmarks/sparse_speed.py cuda                one layer of Qwen3-8B's shape, 32k to 128k, under five minutes

Inputs are random, so nothing here speaks of quality: densities are fixed, by random lists of blocks for the kernels alone,
and by the selectors' iso-density budgets for the whole. Each figure is a median of runs that alternate with the dense
baseline, which is the fastest causal one of those that run; the ratio is the median of the pairs' ratios. FLOPs are those
of the pairs that are read: 4 x D for each pair and head. Whatever fails is recorded with its error, and the results
file is written after every measurement, so that a time limit loses nothing.

On a GPU everything is timed behind a few matrix products, as a layer's attention comes behind its projections: the host has
then launched what is timed before the GPU gets to it, as in a prefill. On an idle GPU the launches of a selector's programs
count too, some tenths of a millisecond that depend on the host; selectors are timed so as well (`idle`).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from angelslim.kernels.attention import flex, hopper, triton_flash
from angelslim.kernels.attention.base import Case
from angelslim.kernels.attention.choose import choose
from angelslim.methods.sparse.plan import BlockPlan, Context, finish
from common import RESULTS, bar, write

BLOCK = 128
SHAPES = {"cpu": (8, 2, 64, torch.float32), "cuda": (32, 8, 128, torch.bfloat16)}  # query heads, key heads, D
LENGTHS = {"cpu": [4096, 8192, 16384], "cuda": [32768, 65536, 131072]}
DENSITIES = (0.1, 0.05, 0.2)
SELECTORS = (("union", 0.1), ("stem", 0.1), ("union", 0.2), ("stem", 0.2))
TILES = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)]
PRODUCTS = 3  # of 8192 x 8192 matrices, about 1.4 ms each on a H200
TOGETHER_GOALS = {32768: 5.5, 131072: 8.0}


class Late(Exception):
    """The time limit was reached."""


class Book:
    """The measurements so far and the time that is left."""

    def __init__(self, name: str, folder: Path, limit: float) -> None:
        self.name, self.folder, self.end = name, folder, time.monotonic() + limit
        self.raw: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []

    def save(self, quietly: bool = True) -> None:
        """Write the results file."""
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()) if quietly else contextlib.nullcontext():
            write(self.name, self.raw, self.bars, self.folder)

    @contextmanager
    def entry(self, **what: Any) -> Iterator[dict[str, Any]]:
        """One measurement; what fails is recorded with its error, and what comes too late ends the run."""
        found: dict[str, Any] = dict(what)
        if time.monotonic() > self.end:
            raise Late
        try:
            yield found
        except Exception as error:  # noqa: BLE001  (whatever a kernel raises is a finding)
            found["error"] = f"{type(error).__name__}: {error}"[:600]
            found["trace"] = traceback.format_exc()[-900:]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.add(found)

    def add(self, found: dict[str, Any]) -> None:
        """Take in what was measured, however late it is."""
        self.raw.append(found)
        print(
            {key: value for key, value in found.items() if key not in ("trace", "samples", "idle_samples")},
            flush=True,
        )
        self.save()


@functools.cache
def _busy(device: torch.device) -> Callable[[], None]:
    """Work that keeps a GPU busy for some milliseconds."""
    left, right, out = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(3))

    def run() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=out)

    return run


def milliseconds(run: Callable[[], Any], device: torch.device, busy: bool = False) -> float:
    """One run's time; `busy` puts it behind other work of the GPU."""
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - begun)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if busy:
        _busy(device)()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def paired(
    dense: Callable[[], Any], run: Callable[[], Any], device: torch.device, repeats: int, busy: bool = True
) -> dict[str, Any]:
    """Alternate both after two warm-ups; medians, and the median of the ratios."""
    begun = time.perf_counter()
    run()
    warm = time.perf_counter() - begun
    run()
    pairs = [(milliseconds(dense, device, busy), milliseconds(run, device, busy)) for _ in range(repeats)]
    return {
        "ms": statistics.median(pair[1] for pair in pairs),
        "dense_ms": statistics.median(pair[0] for pair in pairs),
        "speedup": statistics.median(pair[0] / pair[1] for pair in pairs),
        "first_call_s": warm,
        "samples": pairs,
    }


def inputs(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values, laid out as models do it: tokens before heads."""
    heads, kv_heads, dim, dtype = SHAPES[device.type]
    torch.manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, length, count, dim, device=device, dtype=dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )


def context(length: int, dim: int) -> Context:
    """A whole prompt in the middle of a deep model."""
    return Context(layer=18, layers=36, scaling=dim**-0.5, q_offset=0, prompt_len=length, block=BLOCK)


def random_plan(length: int, heads: int, density: float, device: torch.device) -> BlockPlan:
    """Random blocks for each head beside the sink and the diagonal, at `density` of the causal area."""
    blocks, ctx = -(-length // BLOCK), context(length, 1)
    forced = finish(torch.zeros(1, 1, blocks, blocks, dtype=torch.bool, device=device), ctx).density()
    share = max(density - forced, 0) / (1 - forced)
    torch.manual_seed(1)
    return finish(torch.rand(1, heads, blocks, blocks, device=device) < share, ctx)


def dense_candidates(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Causal dense attentions; repeated keys are made beforehand, outside the timing."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    groups = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(groups, 1) for x in (k, v)]

    def sdpa(backend: SDPBackend | None, repeated: bool) -> Callable[[], Tensor]:
        keys, values = wide if repeated else (k, v)

        def run() -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(
                    q, keys, values, is_causal=True, enable_gqa=not repeated
                )
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, keys, values, is_causal=True, enable_gqa=not repeated
                )

        return run

    found = {"sdpa": sdpa(None, True), "sdpa, grouped": sdpa(None, False)}
    if q.is_cuda:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            name = str(backend).rpartition(".")[2].removesuffix("_ATTENTION").lower()
            found |= {f"sdpa {name}": sdpa(backend, True), f"sdpa {name}, grouped": sdpa(backend, False)}
        plan = BlockPlan.full(block_q=BLOCK, block_k=BLOCK, q_offset=0, kv_len=q.shape[2], device=q.device)
        found["triton, all blocks"] = lambda: triton_flash.run(q, k, v, plan, scaling=q.shape[-1] ** -0.5)
        found["flex, all blocks"] = lambda: flex.run(q, k, v, plan, scaling=q.shape[-1] ** -0.5)
    return found


def fastest_dense(
    book: Book, q: Tensor, k: Tensor, v: Tensor, repeats: int
) -> tuple[str, Callable[[], Tensor]] | None:
    """Measure every candidate and return the fastest that computes."""
    length, best = q.shape[2], []
    for name, run in dense_candidates(q, k, v).items():
        with book.entry(length=length, kind="dense", name=name) as found, torch.no_grad():
            for _ in range(2):
                run()
            found["ms"] = statistics.median(milliseconds(run, q.device, True) for _ in range(repeats))
            found["tflops"] = flops(length, q.shape[1], q.shape[3]) / found["ms"] / 1e9
            best.append((found["ms"], name, run))
    return min(best)[1:] if best else None


def flops(length: int, heads: int, dim: int, density: float = 1.0) -> float:
    """Floating-point operations of the pairs that are read."""
    return 4 * dim * heads * (length * (length + 1) / 2) * density


def kernels(book: Book, q: Tensor, k: Tensor, v: Tensor, tiles: triton_flash.Tiles | None) -> dict[str, Any]:
    """The sparse kernels that can run here, by name."""
    case, runs = Case.of(q, v, BLOCK), {}
    refused = {
        kernel.name: kernel.refuses(case) for kernel in (hopper.KERNEL, triton_flash.KERNEL, flex.KERNEL)
    }
    if not refused["hopper"]:
        runs["hopper"] = lambda plan: hopper.run(q, k, v, plan, scaling=q.shape[-1] ** -0.5)
    if not refused["triton"]:
        runs["triton"] = lambda plan: triton_flash.run(
            q, k, v, plan, scaling=q.shape[-1] ** -0.5, tiles=tiles
        )
    if not refused["flex"]:
        runs["flex"] = lambda plan: flex.run(q, k, v, plan, scaling=q.shape[-1] ** -0.5)
    for name, reason in refused.items():
        if reason:
            book.raw.append({"length": q.shape[2], "kind": "kernel", "name": name, "refused": reason})
    return runs


def tune(book: Book, q: Tensor, k: Tensor, v: Tensor) -> triton_flash.Tiles | None:
    """The fastest cut of the Triton kernel at density .10, or None where it does not run."""
    if triton_flash.refuses(Case.of(q, v, BLOCK)):
        return None
    plan, best = random_plan(q.shape[2], q.shape[1], 0.1, q.device), []
    for numbers in TILES:
        tiles = triton_flash.Tiles(*numbers)
        with book.entry(length=q.shape[2], kind="tiles", name=str(tiles)) as found:

            def run(tiles: triton_flash.Tiles = tiles) -> Tensor:
                return triton_flash.run(q, k, v, plan, scaling=q.shape[-1] ** -0.5, tiles=tiles)

            run()
            found["ms"] = statistics.median(milliseconds(run, q.device, True) for _ in range(7))
            found["tflops"] = flops(q.shape[2], q.shape[1], q.shape[3], plan.density()) / found["ms"] / 1e9
            best.append((found["ms"], numbers))
    return triton_flash.Tiles(*min(best)[1]) if best else None


def random_lists(book: Book, dense: Any, q: Tensor, runs: dict[str, Any], repeats: int) -> None:
    """The kernels alone, on random lists."""
    length, heads = q.shape[2], q.shape[1]
    for density in DENSITIES:
        plan, outputs = random_plan(length, heads, density, q.device), {}
        for name, run in runs.items():
            with book.entry(length=length, kind="kernel", name=name, density=density) as found:
                found["exact_density"] = plan.density()
                found |= paired(dense, lambda run=run, plan=plan: run(plan), q.device, repeats)
                done = flops(length, heads, q.shape[3], found["exact_density"])
                found["tflops"] = done / found["ms"] / 1e9
                outputs[name] = run(plan)
                if len(outputs) > 1:
                    first = next(iter(outputs.values()))
                    found["largest_difference"] = float((first - outputs[name]).abs().max())


def with_selection(
    book: Book, dense: Any, q: Tensor, k: Tensor, v: Tensor, runs: dict[str, Any], repeats: int
) -> None:
    """Selectors and the chosen kernel together."""
    from angelslim.methods.sparse.selectors.base import SELECTORS as REGISTRY

    length, name = q.shape[2], choose(Case.of(q, v, BLOCK))[0].name
    run, ctx = runs[name], context(length, q.shape[3])
    for method, density in SELECTORS:
        with book.entry(length=length, kind="selector", name=method, density=density, kernel=name) as found:
            select = REGISTRY.get(method)({"density": density}).select
            plan = select(q, k, v, ctx)
            found["exact_density"] = plan.density()

            def both(select: Any = select) -> Tensor:
                return run(select(q, k, v, ctx))  # type: ignore[no-any-return]

            found |= paired(dense, both, q.device, repeats)
            select(q, k, v, ctx)
            found["selector_ms"] = statistics.median(
                milliseconds(lambda select=select: select(q, k, v, ctx), q.device, True)
                for _ in range(repeats)
            )
            found["kernel_ms"] = statistics.median(
                milliseconds(lambda plan=plan: run(plan), q.device, True) for _ in range(repeats)
            )
            saved = found["dense_ms"] - found["kernel_ms"]
            found["selection_share_of_saved"] = found["selector_ms"] / saved
            if q.is_cuda:
                alone = paired(dense, both, q.device, repeats, busy=False)
                found |= {f"idle_{key}": alone[key] for key in ("ms", "speedup", "samples")}
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                select(q, k, v, ctx)
                found["selector_peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9


def layer(book: Book, device: torch.device, lengths: list[int], repeats: int, lists: bool) -> None:
    """Dense, kernels and selectors for one layer at each length."""
    tiles: triton_flash.Tiles | None = None
    for length in lengths:
        q, k, v = inputs(length, device)
        best = fastest_dense(book, q, k, v, repeats)
        if best is None:
            continue
        book.raw.append({"length": length, "kind": "baseline", "name": best[0]})
        tiles = tiles or tune(book, q, k, v)
        with torch.no_grad():
            runs = kernels(book, q, k, v, tiles)
            with_selection(book, best[1], q, k, v, runs, repeats)
            if lists:
                random_lists(book, best[1], q, runs, repeats)
        del q, k, v, best, runs
        if device.type == "cuda":
            torch.cuda.empty_cache()


def bars(raw: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """What has to hold."""
    found = []
    for item in raw:
        if item["kind"] != "selector" or "error" in item:
            continue
        name = f"{item['name']} at density {item['density']}, {item['length']} tokens"
        if device == "cpu" and item["length"] == 8192:
            found.append(bar(f"CPU, {name}: times causal SDPA", item["speedup"], 2.0, at_most=False))
        if device == "cuda" and item["density"] == 0.1:
            if item["length"] in TOGETHER_GOALS:
                goal = TOGETHER_GOALS[item["length"]]
                found.append(bar(f"{name}: times the fastest dense", item["speedup"], goal, at_most=False))
                title = f"{name}, on an idle GPU: times the fastest dense"
                found.append(bar(title, item["idle_speedup"], goal, at_most=False))
            share = item["selection_share_of_saved"]
            found.append(bar(f"{name}: selection over the time saved", share, 0.05, at_most=True))
    return found


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=LENGTHS)
    parser.add_argument("--lengths", help="tokens, with commas between")
    parser.add_argument("--without-lists", action="store_true", help="leave out the kernels on random lists")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=420, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    lengths = [int(word) for word in given.lengths.split(",")] if given.lengths else LENGTHS[given.mode]
    book = Book(f"sparse_speed_{given.mode}", given.out, given.limit)
    if given.mode == "cpu":
        torch.set_num_threads(2)
    device = torch.device("cpu" if given.mode == "cpu" else "cuda")
    try:
        layer(book, device, lengths, given.repeats, not given.without_lists)
    except Late:
        book.raw.append({"kind": "limit", "name": "the time limit ended the run", "seconds": given.limit})
    book.bars += bars(book.raw, device.type)
    book.save(quietly=False)


if __name__ == "__main__":
    main()
