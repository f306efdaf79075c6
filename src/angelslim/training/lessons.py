"""Store a teacher's logits for training runs: the rows that such a run would train on, none of those it holds back."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..base import console, parallel
from ..base.errors import ConfigError
from ..data.packing import Rows
from ..job import device_of
from ..models.loading import resolve
from ..teacher.live import open_teacher
from ..teacher.stored import MANIFEST, Manifest, write_teacher
from ..teacher.vocabulary import vocabulary_of
from ..work import tokenizer_of
from .data import open_data


def store_lessons(
    model: str,
    data: str | None,
    out: Path,
    *,
    k: int = 64,
    tokens: int | None = None,
    length: int = 512,
    batch: int = 8,
    device: str | None = None,
) -> Manifest:
    """Run a model over the rows of a file, or of the built-in data, and store its `k` largest logits in `out`.

    `tokens` limits how many are read, by default and at most once all. A killed call continues at the first missing
    shard; a folder that was begun with another model, data or `k` is a `ConfigError`.
    """
    for name, value in (("k", k), ("length", length), ("batch", batch), ("tokens", tokens or batch * length)):
        if value < 1:
            raise ConfigError(f"{name} is {value}.", fix="Give a whole number above 0.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} holds something else.", fix="Choose another --out.")
    parallel.start()
    place = device_of(device)
    if place.type == "cuda":
        place = torch.device("cuda", parallel.local_rank())
    folder = resolve(model)
    tokenizer = tokenizer_of(folder)
    work = out.with_name(out.name + ".data")
    rows = _rows(tokenizer, data, work, batch, length)
    whole = rows.count // batch
    batches = whole if tokens is None else min(max(tokens // (batch * length), 1), whole)
    if not batches:
        raise ConfigError(
            f"The data has {rows.count} rows, fewer than one batch of {batch}.", fix="Lower --batch."
        )
    vocabulary = vocabulary_of(tokenizer, model)
    sizes = Manifest(model, vocabulary, min(k, vocabulary.size), "", batches, batch, length, 64)
    total = batches * batch * length
    console.log.info(
        "%s tokens of %s, %d bytes each: %.1f MB.",
        f"{total:,}",
        f"{whole * batch * length:,}",
        sizes.bytes_a_token,
        total * sizes.bytes_a_token / 1e6,
    )
    manifest = write_teacher(
        out,
        open_teacher(folder, tokenizer, student_name=model, device=place),
        rows,
        batches=batches,
        k=k,
        model=model,
        vocabulary=vocabulary,
        data=rows.fingerprint,
        device=place,
    )
    if parallel.first():
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _rows(tokenizer: object, data: str | None, work: Path, batch: int, length: int) -> Rows:
    """Return the rows that a training run with seed 0 trains on."""
    if parallel.first():
        shutil.rmtree(work, ignore_errors=True)  # packed for another call, perhaps of other data
        open_data(tokenizer, data, work, rows=batch, length=length, seed=0)
    parallel.wait()
    return open_data(tokenizer, data, work, rows=batch, length=length, seed=0).rows
