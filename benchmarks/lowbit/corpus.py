"""Text for a model that is trained from nothing: what lies in the environment's packages, in three splits.

Files of Python, Markdown, reStructuredText and plain text, each content once, mixed by the hash of their names and
assigned to train, dev or test by another hash of them: no file is in two splits, though files that resemble each other
may be. Tables and generated code are left out by their size and line length. The tokenizer (byte-level BPE) is learnt
from the train split alone.

The streams are flat uint16 files, every document followed by the end token. The same environment gives the same streams;
their hash is kept, so results from two corpora cannot be mixed.
"""

from __future__ import annotations

import hashlib
import json
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from angelslim.base.errors import DataError
from angelslim.lab.tokenizer import END, save_tokenizer, train_tokenizer
from angelslim.models.checkpoint import write_atomically

from .study import VOCABULARY, Study

ENDINGS = {".py", ".md", ".rst", ".txt"}
LARGEST, WIDEST = 300_000, 120  # bytes of a file; mean characters of a line
LEARNT_FROM = 10_000_000  # characters that the tokenizer is learnt from
TURN = 400  # documents that are encoded together
SPLITS = ("train", "dev", "test")


def split_of(name: str) -> str:
    """Assign a file to a split by its name: 96 % train, 2 % dev, 2 % test."""
    bucket = hashlib.blake2b(f"split {name}".encode(), digest_size=4).digest()
    place = int.from_bytes(bucket, "big") % 100
    return "train" if place < 96 else "dev" if place < 98 else "test"


def roots() -> list[Path]:
    """Return the folders of installed packages and of the standard library."""
    named = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    named += [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    found: list[Path] = []
    for entry in (*named, sysconfig.get_path("stdlib")):
        path = Path(entry).resolve()
        if path.is_dir() and path not in found:
            found.append(path)
    return found


def files_of(folders: list[Path]) -> list[tuple[str, Path]]:
    """Return (name, file) of every candidate, in an order that mixes the packages and is always the same."""
    found: dict[str, Path] = {}
    for root in folders:
        for path in root.rglob("*"):
            if path.suffix in ENDINGS:
                found.setdefault(path.relative_to(root).as_posix(), path)
    return sorted(found.items(), key=lambda item: hashlib.blake2b(item[0].encode()).digest())


def documents(files: list[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    """Yield (split, text) of the files that are text, each content once."""
    seen: set[bytes] = set()
    for name, path in files:
        try:
            if not path.is_file() or not 200 <= path.stat().st_size <= LARGEST:
                continue
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        key = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if key in seen or len(text) > WIDEST * (text.count("\n") + 1):
            continue
        seen.add(key)
        yield split_of(name), text


@dataclass
class _Stream:
    """One split while it is written."""

    wanted: int
    parts: list[np.ndarray[Any, Any]]
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def add(self, core: Any, texts: list[str]) -> None:
        end = core.token_to_id(END)
        for text, one in zip(texts, core.encode_batch(texts, add_special_tokens=False), strict=True):
            self.parts.append(np.array([*one.ids, end], np.uint16))
            self.tokens += len(one.ids) + 1
            self.bytes += len(text.encode())
            self.documents += 1


def prepare(study: Study, folder: Path, folders: list[Path] | None = None) -> dict[str, Any]:
    """Write tokenizer and streams into `folder`, if they are not there, and return what ``meta.json`` says."""
    meta = folder / "meta.json"
    if meta.is_file():
        return dict(json.loads(meta.read_text("utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    files = files_of(folders or roots())
    tokenizer = _tokenizer(study, files, folder)
    streams = {split: _Stream(study.held_tokens, []) for split in SPLITS}
    streams["train"].wanted = study.train_tokens
    waiting: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, text in documents(files):
        if streams[split].tokens < streams[split].wanted:
            waiting[split].append(text)
        if len(waiting[split]) >= (TURN if split == "train" else 8):
            streams[split].add(tokenizer.backend_tokenizer, waiting[split])
            waiting[split] = []
        if all(stream.tokens >= stream.wanted for stream in streams.values()):
            break
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    found: dict[str, Any] = {}
    for split, stream in streams.items():
        if waiting[split] and stream.tokens < stream.wanted:
            stream.add(tokenizer.backend_tokenizer, waiting[split])
        if not stream.parts:
            raise DataError(f"No text for the {split} split.", where=", ".join(map(str, folders or roots())))
        content = np.concatenate(stream.parts)
        digest.update(content.tobytes())
        write_atomically(folder / f"{split}.bin", content.tobytes())
        found[split] = {
            "tokens": stream.tokens,
            "bytes": stream.bytes,
            "documents": stream.documents,
        }
    found["hash"] = digest.hexdigest()[:16]
    write_atomically(meta, (json.dumps(found, indent=1) + "\n").encode())
    return found


def _tokenizer(study: Study, files: list[tuple[str, Path]], folder: Path) -> Any:
    """Learn the tokenizer from the train split's first documents."""
    texts, left = [], min(LEARNT_FROM, study.train_tokens * 2)
    for split, text in documents(files):
        if split == "train":
            texts.append(text)
            left -= len(text)
            if left <= 0:
                break
    tokenizer = train_tokenizer(texts, VOCABULARY, longest=study.length)
    save_tokenizer(tokenizer, folder)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """The streams as rows ``[rows, length]``, int32 on the device; `held` are whole rows of dev and test."""

    train: Tensor
    dev: Tensor
    test: Tensor
    bytes_per_token: float  # of the test split
    hash: str


def load(folder: Path, study: Study, device: str) -> Corpus:
    """Read the streams of a prepared folder."""
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    rows = {}
    for split, most in (
        ("train", study.train_tokens),
        ("dev", study.held_tokens),
        ("test", study.held_tokens),
    ):
        flat = np.fromfile(folder / f"{split}.bin", np.uint16)[:most].astype(np.int32)
        count = len(flat) // study.length
        rows[split] = torch.from_numpy(flat[: count * study.length]).view(count, study.length).to(device)
    ratio = meta["test"]["bytes"] / meta["test"]["tokens"]
    return Corpus(rows["train"], rows["dev"], rows["test"], ratio, meta["hash"])


class Batches:
    """Batch number `index` as a pure function of the seed: every pass over the rows is another permutation."""

    def __init__(self, rows: Tensor, size: int, seed: int) -> None:
        assert len(rows) >= size, "more text, or smaller batches"
        self.rows, self.size, self.seed = rows, size, seed
        self.order: dict[int, Tensor] = {}

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return ``{"input_ids", "labels"}``, int64 ``[size, length]``."""
        turn, inside = divmod(index, len(self.rows) // self.size)
        if turn not in self.order:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            order = torch.randperm(len(self.rows), generator=generator)
            self.order = {turn: order.to(self.rows.device)}
        ids = self.rows[self.order[turn][inside * self.size : (inside + 1) * self.size]].long()
        return {"input_ids": ids, "labels": ids}
