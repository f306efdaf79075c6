"""A teacher's logits on disk: the teacher runs once, students learn from it as often as they like.

A folder holds ``manifest.json`` and shards of consecutive batches, ``00000.safetensors`` and so on:

===========  ==================================  ==================================================
``tokens``   uint16 or uint32 [rows, length]     what was read
``learnt``   bool [rows, length]                 which tokens have labels
``indices``  uint16 or uint32 [rows, length, k]  the teacher's most likely next tokens, best first
``values``   float16 [rows, length, k]           their logits minus the largest one
``peak``     float32 [rows, length]              the largest logit
``tail``     float32 [rows, length]              log-sum-exp of all other logits, minus the largest
``gold``     float32 [rows, length]              log-probability of the token that follows
===========  ==================================  ==================================================

That is 4k + 15 bytes a token for vocabularies of up to 65 536 words and 6k + 17 beyond, whatever their size: 271 bytes at
k = 64, where the full logits of 65 536 words in bfloat16 take 131 072. float16 holds a logit 10 below the largest
to 0.004, which changes a probability of 5e-5 by half a percent.

A shard is written under another name and renamed, so a killed run goes on at the first missing shard; processes
of one run share the shards. The manifest names the model, the tokenizer (a hash of its vocabulary), k and a
fingerprint of the data: a folder that was begun with others is refused, and so is a student with other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base import console, parallel
from ..base.errors import ConfigError, DataError
from ..models.checkpoint import write_atomically
from ..numerics.distillation import IGNORED, TopLogits, top_logits
from .live import Batch, Lesson, Teacher
from .vocabulary import Vocabulary, require_same

MANIFEST = "manifest.json"
_VERSION = 1
_SMALLEST = torch.finfo(torch.float16).min  # finite: zero probability times it is zero


@dataclass(frozen=True)
class Manifest:
    """What a folder of stored logits holds."""

    model: str
    vocabulary: Vocabulary
    k: int
    data: str  # fingerprint of the batches
    batches: int
    rows: int  # of a batch
    length: int
    batches_a_shard: int
    version: int = _VERSION

    @property
    def shards(self) -> int:
        """How many files there are when all is written."""
        return -(-self.batches // self.batches_a_shard)

    @property
    def bytes_a_token(self) -> int:
        """How much is stored for each token."""
        number = _integers(self.vocabulary.size).itemsize
        return self.k * (number + 2) + number + 1 + 3 * 4


def _integers(words: int) -> torch.dtype:
    return torch.uint16 if words <= 2**16 else torch.uint32


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def write_teacher(
    folder: Path,
    teacher: Teacher,
    batch_at: Callable[[int], dict[str, Tensor]],
    *,
    batches: int,
    k: int,
    model: str,
    vocabulary: Vocabulary,
    data: str,
    batches_a_shard: int = 64,
    device: str | torch.device = "cpu",
) -> Manifest:
    """Run the teacher over the first `batches` batches and store its k largest logits; resumable.

    Batches are ``{"input_ids", "labels"}`` of one shape; a label is its token or -100. A folder begun with
    another model, vocabulary, k or data is a `ConfigError`.
    """
    rows, length = batch_at(0)["input_ids"].shape
    k = min(k, vocabulary.size)
    manifest = Manifest(model, vocabulary, k, data, batches, rows, length, batches_a_shard)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).is_file():
        _same(folder, asdict(read_manifest(folder)), asdict(manifest))
    elif parallel.first():
        write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=2).encode())
    missing = [number for number in range(manifest.shards) if not _shard(folder, number).is_file()]
    missing = parallel.share(missing)
    with console.bar("teacher", len(missing)) as bar:
        for number in missing:
            first = number * batches_a_shard
            numbers = range(first, min(first + batches_a_shard, batches))
            parts = [_store(teacher, batch_at(index), manifest, device) for index in numbers]
            temporary = _shard(folder, number).with_suffix(".partial")
            save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, temporary)
            temporary.replace(_shard(folder, number))
            bar.advance()
    parallel.wait()
    return manifest


def _store(
    teacher: Teacher, batch: dict[str, Tensor], manifest: Manifest, device: str | torch.device
) -> dict[str, Tensor]:
    tokens, labels = batch["input_ids"], batch["labels"]
    learnt = labels != IGNORED
    assert torch.equal(labels[learnt], tokens[learnt]), "labels are tokens"
    logits = teacher({"input_ids": tokens.to(device)}).logits
    assert isinstance(logits, Tensor), "a stored teacher is not stored again"
    words = manifest.vocabulary.size
    if logits.shape[-1] < words:
        raise ConfigError(
            f"{manifest.model} has {logits.shape[-1]} logits for {words} tokens.",
            fix="Use the tokenizer that belongs to the model.",
        )
    top = top_logits(logits[..., :words], labels.to(device), manifest.k)
    numbers = _integers(words)
    stored = {
        "tokens": tokens.to(numbers),
        "learnt": learnt,
        "indices": top.indices.to(numbers),
        "values": top.values.clamp(min=_SMALLEST).half(),
        "peak": top.peak,
        "tail": top.tail,
        "gold": top.gold,
    }
    return {name: value.cpu().contiguous() for name, value in stored.items()}


def _same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ConfigError(
            f"The folder holds logits of another run ({'; '.join(changed)}).",
            where=str(folder),
            fix="Name another folder or remove this one.",
        )


def read_manifest(folder: Path) -> Manifest:
    """Read what a folder holds; one without a readable manifest is a `DataError`."""
    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
        return Manifest(**{**found, "vocabulary": Vocabulary(**found["vocabulary"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "This is no folder of stored logits.", where=str(folder / MANIFEST), fix="Write it anew."
        ) from error


class StoredTeacher:
    """Reads a folder: `batch_at` gives batches that carry their lesson, and the teacher itself hands it over.

    Every pass over the stored batches is another permutation of them, the first one included; all follow from
    the seed. `share` below 1 keeps that part of the batches, each a subset of the larger ones.
    """

    def __init__(self, folder: Path, student: Vocabulary, *, seed: int = 0, share: float = 1.0) -> None:
        self.folder, self.seed, self.share = folder, seed, share
        self.manifest = read_manifest(folder)
        self.count = max(int(self.manifest.batches * share + 1e-9), 1)  # batches in use
        require_same(self.manifest.vocabulary, student)
        missing = [n for n in range(self.manifest.shards) if not _shard(folder, n).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {self.manifest.shards} shards of the stored logits are missing.",
                where=str(folder),
                fix="Run the teacher again; it continues where it stopped.",
            )

    def batch_at(self, index: int) -> dict[str, Any]:
        """Return ``{"input_ids", "labels", "lesson"}`` of batch number `index` of the endless sequence."""
        turn, inside = divmod(index, self.count)
        place = int(_order(self.count, self.seed, turn)[inside])
        if self.count < self.manifest.batches:
            place = int(_order(self.manifest.batches, self.seed, -1)[place])
        number, inside = divmod(place, self.manifest.batches_a_shard)
        rows = slice(inside * self.manifest.rows, (inside + 1) * self.manifest.rows)
        path = _shard(self.folder, number)
        try:
            with safe_open(path, framework="pt") as file:
                part = {name: file.get_slice(name)[rows] for name in file.keys()}  # noqa: SIM118  no mapping
        except SafetensorError as error:
            raise DataError(
                "This shard of stored logits is damaged.",
                where=str(path),
                fix="Remove it and run the teacher again.",
            ) from error
        tokens = part["tokens"].long()
        return {
            "input_ids": tokens,
            "labels": torch.where(part["learnt"], tokens, IGNORED),
            "lesson": TopLogits(*(part[name] for name in TopLogits._fields)),
        }

    def __call__(self, batch: Batch, states: bool = False) -> Lesson:
        """Return the lesson that the batch carries; there are no hidden states in it."""
        return Lesson(batch["lesson"], (), self.manifest.vocabulary.size)


@lru_cache(maxsize=4)
def _order(count: int, seed: int, turn: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
