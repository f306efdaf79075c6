"""What a run trains on: packed rows, a few of them held back to measure the loss on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import DataError
from ..data import builtin
from ..data.packing import IGNORED, Rows, Stream, pack, read_stream
from ..data.records import Record, read_records

BUILTIN_CHARACTERS = 6_000_000  # of the built-in text
BUILTIN_EXAMPLES = 4_000  # of each built-in task
HELD_BACK = 0.01  # share of the tokens whose loss is measured, never trained on
MOST_HELD_BACK = 64  # rows of it at most


@dataclass(frozen=True)
class Data:
    """Batches to train on, and rows ``[rows, length]`` to measure."""

    rows: Rows
    dev: dict[str, Tensor]


def open_data(
    tokenizer: Any,
    path: str | None,
    folder: Path,
    *,
    rows: int,
    length: int,
    seed: int,
    share: float = 1.0,
) -> Data:
    """Pack the records of a file, or the built-in ones, into `folder` once; the same call later reads them again.

    `share` is the part of the training rows that is used. The rows held back are the same whatever it is.
    """
    file = folder / "data.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        records = read_records(path) if path else builtin_records(seed)
        pack(tokenizer, records, path or "the built-in data").save(file)
    stream = read_stream(file)
    whole = len(stream.tokens) // length
    held = min(max(round(whole * HELD_BACK), 1), MOST_HELD_BACK)
    if whole < 2:
        raise DataError(
            f"{len(stream.tokens)} tokens are fewer than two rows of {length}.",
            where=path or "the built-in data",
            fix="Use shorter rows (dataset.max_seq_length) or more text.",
        )
    cut = (whole - held) * length
    kept = replace(stream, tokens=stream.tokens[:cut], learnt=stream.learnt[:cut])
    return Data(Rows(kept, rows, length, seed, share), _rows(stream, cut, held, length))


def _rows(stream: Stream, start: int, count: int, length: int) -> dict[str, Tensor]:
    stop = start + count * length
    ids = stream.tokens[start:stop].long().view(count, length)
    learnt = stream.learnt[start:stop].view(count, length)
    return {"input_ids": ids, "labels": torch.where(learnt, ids, IGNORED)}


def builtin_records(seed: int) -> Iterator[Record]:
    """Yield the training split of the built-in data: text and conversations of both tasks, with and without thinking."""
    records: list[Record] = list(builtin.text("train", BUILTIN_CHARACTERS))
    for task in builtin.TASKS:
        for item in builtin.examples(task, "train", BUILTIN_EXAMPLES, seed):
            records.append([*item.messages, {"role": "assistant", "content": item.completion}])
    random.Random(seed).shuffle(records)  # noqa: S311  not for secrets
    yield from records
