"""The crossover is the first length that sparse wins, with tensors shaped like the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from angelslim.kernels.attention.dense import KERNEL
from angelslim.methods.sparse import crossover
from angelslim.methods.sparse.assign import full
from angelslim.methods.sparse.plan import Context

CTX = Context(layer=3, layers=6, scaling=0.5, q_offset=0, prompt_len=7, block=16)
LIKE = (torch.ones(2, 4, 7, 8), torch.ones(2, 2, 7, 8), torch.ones(2, 2, 7, 6))


@pytest.mark.parametrize(("overhead", "expected"), [(0.0, 32), (3000.0, 64), (1e9, None)])
def test_where_the_curves_cross(
    overhead: float, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def cost(run: Callable[[], Any], device: torch.device, what: str, length: int) -> float:
        shapes.append(run().shape)
        return length**2 if what == "dense" else overhead + length**2 / 10

    monkeypatch.setattr(crossover, "milliseconds", cost)
    assert crossover.find(full, KERNEL, LIKE, CTX, (32, 64, 96)) == expected
    assert set(shapes) <= {(1, 4, length, 6) for length in (32, 64, 96)}, "dense and sparse see the same call"


def test_runs_are_timed() -> None:
    calls = []
    assert crossover.milliseconds(lambda: calls.append(1), torch.device("cpu"), "dense", 1) >= 0
    assert len(calls) == crossover.REPEATS + 1
