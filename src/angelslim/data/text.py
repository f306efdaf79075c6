"""Calibration samples: token ids of the text that a model is shown while it is compressed.

A sample is a tensor ``[1, T]`` of int64 token ids with its own length ``T <= max_length``: nothing is padded,
so no statistic is ever taken over padding. Files are read by `records`; conversations go through the
tokenizer's chat template; plain texts are cut into windows of `max_length` tokens. From more records than
needed, a seeded sample spread over the whole source is taken, and every record is checked either way.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..base import console
from ..base.errors import ConfigError, DataError
from . import builtin
from .chat import has_specials, render
from .records import Record, read_records
from .tokens import SUFFIX as TOKENS
from .tokens import read_token_rows

T = TypeVar("T")

BUILTIN = "builtin"
_SHORTEST = 2  # tokens; one token alone has nothing to attend to and nothing to predict


def calibration_batches(
    tokenizer: Any, source: str | Path | None, *, samples: int, max_length: int, seed: int = 0
) -> list[Tensor]:
    """Return up to `samples` samples of at most `max_length` tokens, shape ``[1, T]`` each.

    `source` is a data file, a cached hub data set ``"owner/name,config"``, token ids (``.safetensors``, see
    `tokens`), or None / ``"builtin"`` for the built-in mixture. A source with fewer usable records gives fewer samples and a warning; one with none is
    a `DataError`.
    """
    for name, value, least in (("num_samples", samples, 1), ("max_seq_length", max_length, _SHORTEST)):
        if value < least:
            raise ConfigError(f"dataset.{name} is {value}; it must be at least {least}.")
    if source is None or str(source) == BUILTIN:
        source = BUILTIN
        mixture = builtin_records(samples, max_length, seed)
        rows = (next(_encode(tokenizer, record, max_length)) for record in mixture)
    elif str(source).endswith(TOKENS):
        rows = (row[:max_length] for row in read_token_rows(Path(source).expanduser()))
    else:
        rows = (row for record in read_records(source) for row in _encode(tokenizer, record, max_length))
    chosen = _sample((row for row in rows if len(row) >= _SHORTEST), samples, seed)
    if not chosen:
        raise DataError("No usable record: all are empty.", where=str(source), fix="Name a file with text.")
    if len(chosen) < samples:
        console.log.warning("%s holds %d samples; %d were asked for.", source, len(chosen), samples)
    return [torch.tensor([row], dtype=torch.int64) for row in chosen]


def builtin_records(samples: int, max_length: int, seed: int) -> list[Record]:
    """Return the built-in mixture of the calibration split: additions, recall and text in turn."""
    third = -(-samples // 3)
    chats = [
        [*example.messages, {"role": "assistant", "content": example.completion}]
        for task in builtin.TASKS
        for example in builtin.examples(task, "calibration", third, seed)
    ]
    # Six characters are more than a token holds on average, so a piece fills its one window.
    width = max_length * 6
    pieces = [
        document[start : start + width]
        for document in builtin.text("calibration")
        for start in range(0, max(len(document) - width, 1), width)
    ]
    random.Random(seed).shuffle(pieces)  # noqa: S311  not for secrets
    texts = [pieces[index % len(pieces)] for index in range(third)]
    mixed: list[Record] = []
    for addition, recall, text in zip(chats[:third], chats[third:], texts, strict=True):
        mixed += [addition, recall, text]
    return mixed[:samples]


def _encode(tokenizer: Any, record: Record, max_length: int) -> Iterator[list[int]]:
    if isinstance(record, str):
        yield from windows(tokenizer, record, max_length)
    else:
        text = render(tokenizer, record)
        yield _ids(tokenizer, text, specials=not has_specials(tokenizer))[:max_length]


def windows(tokenizer: Any, text: str, max_length: int) -> Iterator[list[int]]:
    """Cut a text into windows of at most `max_length` tokens, each opened as the tokenizer opens a text.

    Many models put much attention on the first token (``<s>``), so every window gets it, not only the first.
    A last window shorter than a quarter is dropped unless it is the only one.
    """
    opening = _opening(tokenizer)
    ids = _ids(tokenizer, text, specials=False)
    width = max_length - len(opening)
    for start in range(0, len(ids), width):
        if start == 0 or len(ids) - start >= width // 4:
            yield opening + ids[start : start + width]


def _opening(tokenizer: Any) -> list[int]:
    begin = getattr(tokenizer, "bos_token_id", None)
    return [begin] if begin is not None and _ids(tokenizer, "a", specials=True)[:1] == [begin] else []


def _ids(tokenizer: Any, text: str, *, specials: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=specials, verbose=False)["input_ids"])


def _sample(rows: Iterable[T], count: int, seed: int) -> list[T]:
    """Keep `count` rows of a stream, each with the same chance, in the stream's order (reservoir sampling)."""
    rng = random.Random(seed)  # noqa: S311  not for secrets
    kept: list[tuple[int, T]] = []
    for index, row in enumerate(rows):
        if index < count:
            kept.append((index, row))
        elif (place := rng.randrange(index + 1)) < count:
            kept[place] = (index, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]
