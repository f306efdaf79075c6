"""What is kept of an unfinished suite: prompts with all their attentions, taken over once, never from a torn file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from angelslim.evaluate.suites.base import Sample, Task
from angelslim.evaluate.suites.kept import Kept
from angelslim.evaluate.suites.run import Reader, run_task

ATTENTIONS = ["dense", "half"]
FOUND = [Sample(f"prompt {index}", (str(index),)) for index in range(4)]


class Stopped(BaseException):
    """The end of a process."""


class Asked:
    """Notes which attention reads, and stops before the `last`-th reading."""

    def __init__(self, last: int | None = None) -> None:
        self.seen: list[str] = []
        self.last = last

    @contextmanager
    def __call__(self, name: str) -> Iterator[Any]:
        if len(self.seen) == self.last:
            raise Stopped
        self.seen.append(name)
        yield SimpleNamespace(density=0.5, fallbacks={"decode": 2}, selector_ms=3.0, kernel_ms=1.0)


def measured(model: Any, tokenizer: Any, asked: Asked, kept: Kept | None) -> list[dict[str, Any]]:
    task = Task("any", lambda *_: None, 2, lambda reply, sample: int(sample.answers[0]) / 4)
    return run_task(Reader(model, tokenizer, asked), task, FOUND, 64, ATTENTIONS, kept)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if "ttft" not in key} for row in rows]


@pytest.mark.parametrize("last", range(9))
def test_a_stopped_task_goes_on_behind_its_last_whole_prompt(
    model: Any, tokenizer: Any, tmp_path: Path, last: int
) -> None:
    expected = measured(model, tokenizer, Asked(), None)
    kept = Kept(tmp_path)
    if last < 8:
        with pytest.raises(Stopped):
            measured(model, tokenizer, Asked(last), kept)
    else:
        measured(model, tokenizer, Asked(), kept)
    again, done = Asked(), last // 2
    rows = measured(model, tokenizer, again, kept)
    assert timeless(rows) == timeless(expected)
    # Between the first prompt and the last, the next one is read once more, to compile kernels without a clock.
    warm_ups = 1 if 0 < done < 4 else 0
    assert again.seen == ATTENTIONS * (4 - done + warm_ups)


def test_times_of_a_prompt_are_kept_together(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    with pytest.raises(Stopped):
        measured(model, tokenizer, Asked(5), kept)
    before = kept.read("any", 64, ATTENTIONS)
    assert before is not None and [len(cell.ttft_ms) for cell in before.values()] == [2, 2]
    rows = measured(model, tokenizer, Asked(), kept)
    assert [row["ttft_ms"][:2] for row in rows] == [cell.ttft_ms for cell in before.values()]


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _uneven(text: str) -> str:
    cells = json.loads(text)
    cells[1]["scores"].pop()
    return json.dumps(cells)


def _fewer(text: str) -> str:
    return json.dumps(json.loads(text)[:1])


@pytest.mark.parametrize("tear", [_cut, _uneven, _fewer, lambda _: "", lambda _: "{}", lambda _: "[1]"])
def test_a_torn_file_is_done_again(
    model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, tear: Any
) -> None:
    kept = Kept(tmp_path)
    expected = measured(model, tokenizer, Asked(), kept)
    (file,) = tmp_path.iterdir()
    file.write_text(tear(file.read_text()))
    again = Asked()
    assert timeless(measured(model, tokenizer, again, kept)) == timeless(expected)
    assert again.seen == ATTENTIONS * 4
    assert measured(model, tokenizer, Asked(0), kept) is not None, "whole again: nothing is read"
