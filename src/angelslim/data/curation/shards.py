"""Write the curated documents as ``part-00000.jsonl``, ... of a given size, in one shuffled order.

The order is a random permutation of all copies, drawn from the seed. It is carried out with bounded memory: each copy
first goes to the bucket file that holds its stretch of the permutation; then one bucket after the other is sorted and
written. Without shuffling the order is that of reading, copies of a document in a row.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from .base import Document
from .corpus import Corpus
from .results import Sizes

BUCKET = 128 * 10**6  # characters that are sorted in memory at a time
_MOST_BUCKETS = 512  # files that are open at a time


def line_of(document: Document, source: str) -> bytes:
    """Return a document as one line of JSON, which `records.read_records` reads back."""
    key = "text" if isinstance(document.record, str) else "messages"
    return json.dumps({key: document.record, "source": source}, ensure_ascii=False).encode() + b"\n"


class ShardWriter:
    """Writes lines to numbered files of at most `size` bytes each; a longer line has a file to itself."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.names: list[str] = []
        self.bytes = 0
        self._lines: list[bytes] = []
        self._held = 0

    def write(self, line: bytes) -> None:
        """Add a line."""
        if self._held and self._held + len(line) > self.size:
            self.close()
        self._lines.append(line)
        self._held += len(line)
        self.bytes += len(line)

    def close(self) -> None:
        """Write what is held, if anything."""
        if not self._lines:
            return
        name = f"part-{len(self.names):05d}.jsonl"
        with (self.folder / name).open("wb") as stream:
            stream.writelines(self._lines)
            stream.flush()
            os.fsync(stream.fileno())
        self.names.append(name)
        self._lines, self._held = [], 0


def write_shards(
    corpus: Corpus,
    names: list[str],
    times: Sizes,
    sizes: Sizes,
    folder: Path,
    *,
    size: int,
    shuffle: int | None,
) -> ShardWriter:
    """Write every document as often as `times` says; `shuffle` is the seed of the order, or None to keep it."""
    writer = ShardWriter(folder, size)
    lines = ((line_of(document, names[document.source]), int(times[document.index])) for document in corpus)
    if shuffle is None:
        for line, copies in lines:
            for _ in range(copies):
                writer.write(line)
    else:
        buckets = int(min(-(-int((times * sizes).sum()) // BUCKET) or 1, _MOST_BUCKETS))
        for line in _shuffled(lines, int(times.sum()), buckets, folder / "buckets", shuffle):
            writer.write(line)
    writer.close()
    return writer


def _shuffled(
    lines: Iterator[tuple[bytes, int]], total: int, buckets: int, folder: Path, seed: int
) -> Iterator[bytes]:
    ranks = np.random.default_rng([seed, 1]).permutation(total)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    done = 0
    with ExitStack() as stack:
        streams = [stack.enter_context((folder / str(number)).open("wb")) for number in range(buckets)]
        for line, copies in lines:
            for rank in ranks[done : done + copies].tolist():
                streams[rank * buckets // total].write(b"%d\t" % rank + line)
            done += copies
    for number in range(buckets):
        path = folder / str(number)
        with path.open("rb") as stream:
            pairs = [line.partition(b"\t") for line in stream]
        for _, _, line in sorted(pairs, key=lambda pair: int(pair[0])):
            yield line
        path.unlink()
    folder.rmdir()
