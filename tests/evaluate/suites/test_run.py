"""A run gives every attention the same prompts and writes what greedy generation writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from angelslim.evaluate.suites.base import Sample, Task
from angelslim.evaluate.suites.run import Reader, answer, run_task


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
