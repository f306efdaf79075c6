"""Step time and memory of quantization-aware training beside plain bfloat16 training of the same model.

Both models live in one process and take turns of a few steps; each turn gives one ratio, and their median is the figure.
A second plain model in place of the quantized one says how much of a ratio is noise. Peak memory is the allocator's, of
each model alone, everything included: masters, moments, activations.

Twice: on a GPU first with layers of the width of a model of a billion parameters, the ratio that users see, then with the
study's model, whose steps are short and so mostly launches. Quantizers are one kernel each on CUDA (`methods/qat/_fused.py`); `--compile`
compiles the whole step of both models besides. `busy` is what the GPU computes of a step by the profiler's account: a ratio
of steps above that of these means that the program, not the GPU, is what a step waits for. What is measured is on disk after
every method.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from angelslim.methods.qat.base import set_progress
from angelslim.teacher.objective import objective

from .board import Deadline
from .corpus import Batches
from .model import build
from .runs import Bench, quantize
from .study import CE, METHODS, SPEED, WIDE_SPEED, Shape

WARM = 8  # steps that are not timed: compilation, allocation
STEPS = 5  # steps of a turn
ROUNDS = 15
WIDE = Shape(2048, 4, 5632)  # layers as wide as those of a model of a billion parameters, a few of them
WIDE_TOKENS = 8192  # of a step
FOREVER = Deadline(None)


class Stepper:
    """A model and its optimizer, one step at a time, as the training loop takes them."""

    def __init__(self, bench: Bench, method: str) -> None:
        torch._dynamo.config.recompile_limit = 64  # two models of one process share their code
        study, cuda = bench.study, bench.device == "cuda"
        self.model = build(study.shape, study.length, seed=0).to(bench.device)
        quantize(self.model, METHODS[method])
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=cuda)
        self.batches, self.done, self.bench = Batches(bench.corpus.train, study.rows, 0), 0, bench
        loss_of: Callable[..., Any] = objective(None, CE)
        self.loss_of = torch.compile(loss_of, dynamic=False) if bench.compile else loss_of

    def steps(self, count: int) -> float:
        """Take `count` steps and return the seconds they took."""
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            set_progress(self.model, self.done % 100, 100)
            batch = self.batches(self.done)
            with torch.autocast(self.bench.device, torch.bfloat16) if self.bench.bf16 else nullcontext():
                loss = self.loss_of(self.model, batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.bench.device == "cuda":
            torch.cuda.synchronize()


def peak_memory(bench: Bench, method: str) -> int | None:
    """Return the peak bytes of a model's training alone, None without a GPU."""
    if bench.device != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stepper = Stepper(bench, method)
    stepper.steps(4)
    peak = torch.cuda.max_memory_allocated() - before
    del stepper
    return peak


def busy_seconds(stepper: Stepper) -> float:
    """Return for how long of a step the GPU computes; the rest of it waits for the start of kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        stepper.steps(2)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 2e6


def compare(bench: Bench, method: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the ratios of one method's steps to plain steps; `fp` compares plain with plain."""
    plain, other = Stepper(bench, "fp"), Stepper(bench, method)
    plain.steps(WARM)
    other.steps(WARM)
    times: list[tuple[float, float]] = []
    for turn in range(rounds):
        if turn % 2:
            second, first = other.steps(STEPS), plain.steps(STEPS)
        else:
            first, second = plain.steps(STEPS), other.steps(STEPS)
        times.append((first / STEPS, second / STEPS))
    ratios = sorted(second / first for first, second in times)
    busy = {"plain_busy": busy_seconds(plain), "busy": busy_seconds(other)} if bench.device == "cuda" else {}
    return {
        "ratio": statistics.median(ratios),
        **busy,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "plain_seconds": statistics.median(first for first, _ in times),
        "seconds": statistics.median(second for _, second in times),
    }


def measure(
    bench: Bench,
    methods: tuple[str, ...] = SPEED,
    rounds: int = ROUNDS,
    post: Callable[[dict[str, Any]], None] = lambda _row: None,
    deadline: Deadline = FOREVER,
) -> dict[str, Any]:
    """Return what ``rows/speed.json`` (or speed-compiled) holds; `post` gets it after every method, as far as it is.

    Wide layers come first: they are what users see. After the deadline no other method is begun.
    """
    row: dict[str, Any] = {"kind": "speed", "method": "speed", "compile": bench.compile, "methods": {}}
    if bench.device == "cuda":
        wide = replace(bench.study, shape=WIDE, rows=WIDE_TOKENS // bench.study.length)
        row["wide"] = {"model": vars(WIDE), "tokens_a_step": WIDE_TOKENS, "methods": {}}
        for found in measure_shape(replace(bench, study=wide), WIDE_SPEED, max(rounds // 2, 1), deadline):
            row["wide"] |= found
            post(row)
    for found in measure_shape(bench, methods, rounds, deadline):
        row |= found
        post(row)
    return row


def measure_shape(
    bench: Bench, methods: tuple[str, ...], rounds: int, deadline: Deadline = FOREVER
) -> Iterator[dict[str, Any]]:
    """Yield the figures of one model after every method, those of the methods before included."""
    plain = peak_memory(bench, "fp")
    found: dict[str, Any] = {}
    for method in ("fp", *methods):
        if deadline.left() <= 0:
            return
        peak = peak_memory(bench, method)
        found[method] = {**compare(bench, method, rounds), "peak_bytes": peak}
        if peak is not None and plain:
            found[method]["memory_ratio"] = peak / plain
        print(f"speed {method}: {found[method]['ratio']:.3f}", flush=True)
        gc.collect()
        torch.compiler.reset()
        yield {"plain_peak_bytes": plain, "methods": dict(found)}
