"""The measurements of a run: time to the first token, and what each head loses.

**Time to the first token.** From the prompt to the choice of the first token, with a cache, the last position's logits alone,
batch 1. Dense and sparse runs alternate in one process after warm-ups, so that both see the same machine; compilation falls
into the first sparse run and is reported apart. The baseline is the fastest causal dense attention (`baseline`). Times are
medians with the tenth and ninetieth percentile, the gain is the median of the ratios of neighbours. Selector and kernel are
timed in a run of their own, because clocks inside a forward cost time.

**Losses.** Density, attention mass and output error of each head (`methods.sparse.fidelity`) on text that nothing was chosen on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.console import bar
from ..evaluate.inference import last_logits
from ..methods.sparse.attach import Attached, attach
from ..methods.sparse.fidelity import Fidelity, compare
from ..methods.sparse.metadata import Metadata
from ..methods.sparse.plan import BlockPlan, Context
from ..report.prefill import HeadRow, LengthRow, Spread
from .baseline import Dense, candidates
from .job import PrefillJob

LEAST = 3  # repeats, whatever they take


def first_tokens(
    job: PrefillJob, model: Any, metadata: Metadata, prompt: Callable[[int], Tensor]
) -> list[LengthRow]:
    """Measure every length of the job with sparse attention from the first token on."""
    rows = []
    with bar("lengths", len(job.lengths)) as progress:
        for length in job.lengths:
            rows.append(_length(job, model, metadata, prompt(length).to(job.device)))
            progress.advance()
    return rows


def _length(job: PrefillJob, model: Any, metadata: Metadata, ids: Tensor) -> LengthRow:
    measure, cuda = job.measure, job.device.type == "cuda"
    fastest = _fastest(model, ids, job.device)

    def dense() -> float:
        with fastest.on(model):
            return prefill_ms(model, ids)

    def sparse() -> float:
        with _attached(model, metadata, measure=False):
            return prefill_ms(model, ids)

    dense()
    first = sparse()
    with _attached(model, metadata, measure=True) as attached:
        prefill_ms(model, ids)
    whole = attached.total()
    for _ in range(max(measure.warmups - 1, 0)):
        dense()
        sparse()
    peaks = [_peak(run) for run in (dense, sparse)] if cuda else [0, 0]
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < measure.repeats and (
        len(pairs) < LEAST or time.perf_counter() - began < measure.seconds
    ):
        pairs.append((dense(), sparse()))
    spreads = [spread([pair[side] for pair in pairs]) for side in (0, 1)]
    return LengthRow(
        tokens=ids.shape[1],
        baseline=str(fastest),
        dense_ms=spreads[0],
        sparse_ms=spreads[1],
        times=statistics.median(plain / fast for plain, fast in pairs),
        repeats=len(pairs),
        first_ms=first,
        density=whole["density"],
        selector_ms=whole["selector_ms"],
        kernel_ms=whole["kernel_ms"],
        calls=whole["calls"],
        kernels=whole["kernels"],
        fallbacks=whole["fallbacks"],
        dense_peak=peaks[0],
        sparse_peak=peaks[1],
    )


def head_losses(model: Any, metadata: Metadata, ids: Tensor) -> list[HeadRow]:
    """Measure each head of each layer on one prompt [1, L], sparse from the first token on."""
    found: dict[int, Fidelity] = {}

    def watch(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, ctx: Context) -> None:
        found[ctx.layer] = compare(q, k, v, plan, ctx)

    with _attached(model, metadata, measure=True) as attached:
        attached.observer = watch
        prefill_ms(model, ids)
    rows = []
    for layer, stats in sorted(attached.stats.items()):
        seen = found.get(layer)
        row = HeadRow(layer, fallbacks=dict(stats.fallbacks))
        if seen is not None:
            row.density, row.mass, row.error = (x.tolist() for x in (seen.density, seen.mass, seen.error))
        rows.append(row)
    return rows


def crossover_of(rows: list[LengthRow]) -> tuple[int, str]:
    """The shortest measured length from which on sparse is faster, and where that comes from."""
    found: int | None = None
    for row in reversed(rows):
        if row.times <= 1:
            break
        found = row.tokens
    if found is None:
        longest = rows[-1].tokens
        return (
            2 * longest,
            f"dense was faster at the longest prompt measured, {longest} tokens; longer ones are a guess",
        )
    if found == rows[0].tokens:
        return found, "sparse was faster at every length measured"
    return found, "sparse was faster from here on"


def prefill_ms(model: Any, ids: Tensor) -> float:
    """Milliseconds from the prompt [1, L] to the choice of the first token."""
    _wait(ids.device)
    began = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **last_logits(model, 1)).logits[:, -1].argmax(-1)
    _wait(ids.device)
    return 1000 * (time.perf_counter() - began)


def spread(samples: list[float]) -> Spread:
    """Median, tenth and ninetieth percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def _fastest(model: Any, ids: Tensor, device: torch.device) -> Dense:
    """Try what there is; what a device cannot compute drops out."""
    found = candidates(model, device)
    times: dict[Dense, float] = {}
    for way in found if len(found) > 1 else ():
        try:
            with way.on(model):
                prefill_ms(model, ids)
                times[way] = prefill_ms(model, ids)
        except RuntimeError:  # no kernel of this backend, or no memory for repeated keys
            continue
    return min(times, key=times.__getitem__) if times else found[0]


def _attached(model: Any, metadata: Metadata, measure: bool) -> Attached:
    return attach(model, metadata.make_rules(), metadata.settings(crossover=0, measure=measure))


def _peak(run: Callable[[], float]) -> int:
    torch.cuda.reset_peak_memory_stats()
    run()
    return int(torch.cuda.max_memory_allocated())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
