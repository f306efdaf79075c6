"""Training rows of a fixed length: documents one after another, each ended by the end-of-text token.

Nothing is padded, so every token that a step pays for is trained on. A row may begin inside one document and end
inside another; attention is not cut at the borders, as in pre-training.

Of a conversation only the assistant's words have labels, each turn's end included, so that the model learns to stop.
A chat template that marks these words itself (``{% generation %}``) is asked. For any other template a turn begins
where the conversation up to it, with the assistant's turn opened, stops agreeing with the whole text, and ends
with the special token after the turn's last words. That also holds for templates that leave out earlier thoughts: what is
not in the text has no label either. Nor has an empty thought: a template writes it where thinking is switched off or an
earlier thought was dropped, and a model that learnt it would stop thinking by itself.

`Rows` gives batch number `index` as a pure function of the seed: every pass over the data is another permutation of
its rows. That is what the training loop needs to continue after a kill without an iterator's state.

Tokens are kept as int32 and labels as one byte a token: 5 bytes a token in memory, or on disk, mapped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base import console
from ..base.errors import DataError
from .chat import Messages, has_specials, render
from .records import Record

IGNORED = -100
_MARKED = re.compile(r"\{%-?\s*generation\b")
_THOUGHT_END = "</think>"
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*")

Encoded = tuple[list[int], list[bool]]  # token ids; whether each has a label


def encode(tokenizer: Any, record: Record) -> Encoded:
    """Return a document's tokens, its end included, and which of them are learnt; empty when it holds no token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "The tokenizer has no end-of-text token, which separates documents.",
            fix="Set eos_token in its tokenizer_config.json.",
        )
    if isinstance(record, str):
        ids = list(tokenizer(record, add_special_tokens=False, verbose=False)["input_ids"])
        return ([*ids, end], [True] * (len(ids) + 1)) if ids else ([], [])
    ids, learnt = conversation(tokenizer, record)
    stops = not has_specials(tokenizer)  # a template ends the turn itself; then the separator teaches nothing
    return ([*ids, end], [*learnt, stops]) if ids else ([], [])


def conversation(tokenizer: Any, messages: Messages) -> Encoded:
    """Return a conversation's tokens and which of them are the assistant's."""
    if _MARKED.search(getattr(tokenizer, "chat_template", None) or ""):
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    text = render(tokenizer, messages)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(found["input_ids"]), list(found["offset_mapping"])
    learnt = [False] * len(ids)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for start, stop in _spans(tokenizer, messages, text):
        inside = [place for place, (low, high) in enumerate(offsets) if low < stop and high > start]
        last = inside[-1] + 1 if inside else len(ids)
        if last < len(ids) and ids[last] in special:
            inside.append(last)
        for place in inside:
            learnt[place] = True
    return ids, learnt


def _spans(tokenizer: Any, messages: Messages, text: str) -> list[tuple[int, int]]:
    """Where the assistant's words stand in the text of the whole conversation, in characters."""
    found, done = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = render(tokenizer, messages[:number], generate=True) if number else ""
        start = max(_agreement(opened, text), done)
        done = _end(text, start, done, message["content"].strip())
        if done < 0:
            raise DataError(
                f"The chat template changes the assistant's words of turn {number}: "
                f"{message['content'][:40]!r} is not in its text.",
                fix="Mark the assistant's words with {% generation %} in the chat template.",
            )
        thought = _NO_THOUGHT.match(text, start)
        found.append((thought.end() if thought else start, done))
    return found


def _end(text: str, start: int, least: int, words: str) -> int:
    """Where a turn's words end that begin at `start`, -1 if they are not there; `least` is where the last turn ended.

    With their thoughts they begin at `start`, or before it when the opened turn holds a first piece of them. Without,
    what the template put in place of the thoughts comes first.
    """
    whole = text.find(words, max(least, start - len(words) + 1))
    if 0 <= whole <= start:
        return whole + len(words)
    rest = words.rpartition(_THOUGHT_END)[2].strip()
    place = text.find(rest, start)
    return place + len(rest) if place >= 0 else -1


def _agreement(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Stream:
    """Encoded documents, one after another; `learnt` says which tokens have labels."""

    tokens: Tensor  # int32 [tokens]
    learnt: Tensor  # bool [tokens]
    documents: int = 0
    empty: int = 0  # documents without a token, left out

    def save(self, path: Path) -> None:
        """Write the stream to one safetensors file, whole or not at all."""
        temporary = path.with_name(path.name + ".partial")
        metadata = {"documents": str(self.documents), "empty": str(self.empty)}
        save_file({"tokens": self.tokens, "learnt": self.learnt}, temporary, metadata)
        temporary.replace(path)


def pack(tokenizer: Any, records: Iterable[Record], where: str = "") -> Stream:
    """Encode documents to one stream; empty ones are left out and counted, nothing else than empty is a `DataError`."""
    tokens, learnt = bytearray(), bytearray()
    documents = empty = 0
    for record in records:
        ids, marks = encode(tokenizer, record)
        documents, empty = documents + bool(ids), empty + (not ids)
        tokens += torch.tensor(ids, dtype=torch.int32).numpy().tobytes()
        learnt += bytes(marks)
    if not any(learnt):
        kind = "none holds words of an assistant" if documents else "all are empty"
        raise DataError(f"No usable record: {kind}.", where=where, fix="Name a file with text.")
    if empty:
        console.log.warning("%s: %d of %d documents are empty.", where or "data", empty, documents + empty)
    return Stream(
        torch.frombuffer(tokens, dtype=torch.int32),
        torch.frombuffer(learnt, dtype=torch.bool),
        documents,
        empty,
    )


def read_stream(path: Path) -> Stream:
    """Open a saved stream; its tensors are mapped, not read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parts = file.get_tensor("tokens"), file.get_tensor("learnt")
    except (OSError, SafetensorError) as error:
        raise DataError(
            "This is no stream of packed documents.", where=str(path), fix="Pack anew."
        ) from error
    return Stream(*parts, int(metadata.get("documents", 0)), int(metadata.get("empty", 0)))


@dataclass(frozen=True)
class Rows:
    """Batches of `rows` rows of `length` tokens: ``{"input_ids", "labels"}``, int64 ``[rows, length]``.

    `share` below 1 keeps that part of the rows, the same for every call of one seed and each a subset of the larger
    ones: what a study of data volumes needs.
    """

    stream: Stream
    rows: int
    length: int
    seed: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(
                f"{len(self.stream.tokens)} tokens are fewer than one row of {self.length}"
                + (f" at a share of {self.share:g}." if self.share < 1 else "."),
                fix="Use shorter rows or more text.",
            )

    @property
    def count(self) -> int:
        """How many rows there are; what is left at the stream's end is not used."""
        return int(len(self.stream.tokens) // self.length * self.share + 1e-9)

    @property
    def tokens(self) -> int:
        """How many tokens one pass over the data trains on or reads."""
        return self.count * self.length

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the batches."""
        digest = hashlib.sha256(f"{self.rows} {self.length} {self.seed} {self.share}".encode())
        for part in (self.stream.tokens, self.stream.learnt):
            digest.update(part.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return batch number `index`."""
        chosen = [self._row(place) for place in range(index * self.rows, (index + 1) * self.rows)]
        ids = torch.stack([self.stream.tokens[start : start + self.length] for start in chosen]).long()
        learnt = torch.stack([self.stream.learnt[start : start + self.length] for start in chosen])
        return {"input_ids": ids, "labels": torch.where(learnt, ids, IGNORED)}

    def _row(self, place: int) -> int:
        """Where row number `place` of the endless sequence begins in the stream."""
        turn, inside = divmod(place, self.count)
        whole = len(self.stream.tokens) // self.length
        kept = int(_order(whole, self.seed, 0)[int(_order(self.count, self.seed, turn + 1)[inside])])
        return kept * self.length


@lru_cache(maxsize=4)
def _order(count: int, seed: int, turn: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
