"""Means over tasks and families, with intervals that hold, and times against dense attention."""

from typing import Any

import numpy as np
import pytest

from angelslim.evaluate.suites.means import OVER_FAMILIES, averages, families, interval


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(1), 0
    for trial in range(200):
        low, high = interval(rng.normal(0.3, 1.0, 60).tolist(), trial)
        inside += low <= 0.3 <= high
    assert 0.89 <= inside / 200 <= 0.99


def row(task: str, length: int, scores: list[float], attention: str = "dense", ttft: float = 5.0) -> Any:
    count = len(scores)
    return {
        **{"task": task, "length": length, "attention": attention, "scores": scores, "density": 1.0},
        **{"value": 100 * sum(scores) / count, "ttft": ttft, "ttft_ms": [99.0] + [ttft] * (count - 1)},
        **{"selector_ms": [50.0] + [1.0] * (count - 1), "kernel_ms": [2.0] * count},
    }


def test_averages_are_over_tasks_of_one_length_and_attention() -> None:
    found = averages([row("a", 64, [1.0] * 4), row("b", 64, [0.0, 1.0]), row("a", 128, [0.0])])
    assert [(mean["length"], mean["value"]) for mean in found] == [(64, 75.0), (128, 0.0)]
    assert found[0]["low"] == pytest.approx(50.0) and found[0]["high"] == pytest.approx(100.0)


def test_times_are_against_dense_on_the_same_prompts_without_the_first() -> None:
    """The first prompt of a task compiles kernels; its times do not count."""
    rows = [row("a", 64, [1.0] * 3, ttft=12.0), row("a", 64, [1.0] * 3, "union", ttft=4.0)]
    dense, union = averages(rows)
    assert (dense["times_dense"], union["times_dense"]) == (1.0, 3.0)
    assert (union["selector_ms"], union["kernel_ms"]) == (1.0, 2.0)
    assert averages(rows[1:])[0]["times_dense"] is None


def test_families_have_means_of_their_tasks_and_a_mean_of_means() -> None:
    """A family with one task weighs as much as one with two."""
    rows = [
        {**row("a", 64, [1.0]), "family": "QA"},
        {**row("b", 64, [0.0]), "family": "QA"},
        {**row("c", 64, [1.0, 1.0]), "family": "code"},
    ]
    found = {one["family"]: one["value"] for one in families(rows)}
    assert found == {"QA": 50.0, "code": 100.0, OVER_FAMILIES: 75.0}
    assert all(one["low"] <= one["value"] <= one["high"] for one in families(rows))
    assert families([{**row("a", 64, [1.0]), "family": ""}]) == []


def test_the_mean_over_families_varies_with_its_prompts() -> None:
    rows = [{**row("a", 64, [1.0, 0.0] * 20), "family": "QA"}, {**row("b", 64, [1.0]), "family": "code"}]
    qa, _, overall = families(rows)
    assert overall["high"] - overall["low"] == pytest.approx((qa["high"] - qa["low"]) / 2)
