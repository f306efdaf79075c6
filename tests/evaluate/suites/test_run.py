"""A run gives every attention the same prompts and writes what greedy generation writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from angelslim.evaluate.suites.base import Sample, Task
from angelslim.evaluate.suites.run import Reader, answer, averages, interval, run_task


def test_the_answer_is_that_of_greedy_generation(model: Any) -> None:
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        written, spent = answer(model, ids, 6, [])
        stopped, _ = answer(model, ids, 6, [written[2]])
    assert written == expected[0, 40:].tolist() and spent > 0
    assert stopped == written[: written.index(written[2])]


def test_all_attentions_read_all_prompts(model: Any, tokenizer: Any) -> None:
    seen: list[str] = []

    @contextmanager
    def attend(name: str) -> Iterator[Any]:
        seen.append(name)
        density = {"dense": 1.0, "half": 0.5}[name]
        yield SimpleNamespace(density=density, fallbacks={"decode": 2}, selector_ms=3.0, kernel_ms=1.0)

    found = [Sample(f"prompt {index}", ("",)) for index in range(3)]
    task = Task("any", lambda *_: None, 2, lambda reply, sample: 1.0)
    rows = run_task(Reader(model, tokenizer, attend), task, found, 64, ["dense", "half"])
    assert seen == ["dense", "half"] * 3
    assert [row["density"] for row in rows] == [1.0, 0.5]
    assert all(row["value"] == 100 and len(row["ttft_ms"]) == 3 and row["ttft"] > 0 for row in rows)
    assert rows[1]["fallbacks"] == {"decode": 6} and rows[1]["selector_ms"] == [3.0] * 3


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
