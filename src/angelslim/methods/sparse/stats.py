"""What the hook did, layer by layer: calls, density, time, and every dense fallback with its reason.

On a GPU nothing waits for a measurement: densities stay tensors and times stay pairs of events until somebody reads
them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Clock:
    """Milliseconds spent in a stretch of code, on the host for CPUs and on the device for GPUs."""

    spent: float = 0.0
    pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def running(self, device: torch.device, on: bool = True) -> Iterator[None]:
        """Add the time of the body; with `on` false nothing is measured."""
        if not on:
            yield
        elif device.type == "cuda":
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self.pending.append((begin, end))
        else:
            begun = time.perf_counter()
            yield
            self.spent += 1000 * (time.perf_counter() - begun)

    def read(self) -> float:
        """All milliseconds so far; waits for the device."""
        for begin, end in self.pending:
            end.synchronize()
            self.spent += begin.elapsed_time(end)
        self.pending.clear()
        return self.spent


@dataclass
class LayerStats:
    """One layer: sparse calls, their densities and times, and why other calls were dense."""

    calls: int = 0
    selector: Clock = field(default_factory=Clock)
    kernel: Clock = field(default_factory=Clock)
    fallbacks: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    densities: list[Tensor] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)  # that causality allows, for each of the densities

    def read(self, share: Tensor, queries: int, keys: int) -> None:
        """Take down the density of one call, whose queries are the last ones of its keys."""
        self.densities.append(share)
        self.pairs.append(queries * keys - queries * (queries - 1) / 2)

    def density(self) -> float | None:
        """The share of the pairs that all sparse calls read together, the chunks of a prompt too; None if there was none."""
        if not self.densities:
            return None
        means = torch.stack([part.mean().double() for part in self.densities])
        return float(means @ means.new_tensor(self.pairs)) / sum(self.pairs)

    def row(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {
            "calls": self.calls,
            "density": self.density(),
            "selector_ms": self.selector.read(),
            "kernel_ms": self.kernel.read(),
            "kernels": dict(self.kernels),
            "fallbacks": dict(self.fallbacks),
        }


def total(layers: dict[int, LayerStats]) -> dict[str, Any]:
    """All layers together: sums of calls and times, the mean density, kernels and reasons counted over layers."""
    rows = [layer.row() for layer in layers.values()]
    densities = [row["density"] for row in rows if row["density"] is not None]
    fallbacks, kernels = Counter[str](), Counter[str]()
    for row in rows:
        fallbacks.update(row["fallbacks"])
        kernels.update(row["kernels"])
    return {
        "calls": sum(row["calls"] for row in rows),
        "density": sum(densities) / len(densities) if densities else None,
        "selector_ms": sum(row["selector_ms"] for row in rows),
        "kernel_ms": sum(row["kernel_ms"] for row in rows),
        "kernels": dict(kernels),
        "fallbacks": dict(fallbacks),
    }
