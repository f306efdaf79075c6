"""Learning rates of every schedule, and which settings decide the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from angelslim.train import TrainSettings, rate_at


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.5, 2: 1.0, 19: 1.0}),
        ("wsd", {0: 0.5, 2: 1.0, 10: 1.0, 15: 0.55, 19: 0.19}),
        ("cosine", {0: 0.5, 2: 1.0, 6: 0.8947, 11: 0.55, 18: 0.1271}),
    ],
)
def test_rates(schedule: Any, expected: dict[int, float]) -> None:
    settings = TrainSettings(steps=20, lr=1.0, warmup=2, schedule=schedule, decay=0.5, lowest=0.1)
    assert {step: rate_at(step, settings) for step in expected} == pytest.approx(expected, abs=1e-4)


def test_what_only_costs_time_or_memory_may_change_between_restarts() -> None:
    settings = TrainSettings(steps=5)
    free = {"workers": 2, "compile": True, "gradient_checkpointing": True, "fsdp": True, "tensorboard": True}
    assert replace(settings, **free).identity() == settings.identity()
    assert replace(settings, seed=1).identity() != settings.identity()
