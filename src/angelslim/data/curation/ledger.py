"""What one stage decided, written down while it decides: arrays by document, reasons with counts and examples.

`times` says how often each document is taken from here on (0 or 1; a mixture may say more), `sizes` how many characters
it has. A stage that changes texts hands every document that stays to `write`; those lines are a file that the later
stages read instead of the sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import BinaryIO

import numpy as np

from ..records import Record
from .base import Document
from .results import Example, Reason, Sizes
from .texts import snippet, text_of


class Ledger:
    """The decisions of one stage; `spool` is where a changing stage's documents go."""

    def __init__(self, names: list[str], times: Sizes, sizes: Sizes, spool: BinaryIO | None = None) -> None:
        self.names, self.times, self.sizes = names, times.copy(), sizes.copy()
        self.dropped: dict[str, Reason] = {}
        self.changed: dict[str, Reason] = {}
        self.notes: list[str] = []
        self._spool = spool

    def expect(self, reasons: Iterable[str], *, changes: bool = False) -> None:
        """Name reasons in advance, so that the report shows those that never applied too, in this order."""
        for reason in reasons:
            (self.changed if changes else self.dropped).setdefault(reason, Reason())

    def drop(self, document: Document, reason: str, note: str = "") -> None:
        """Leave a document out; `note` explains an example beyond its reason."""
        self.dropped.setdefault(reason, Reason()).count(
            int(self.sizes[document.index]), self._example(document, note)
        )
        self.times[document.index] = 0

    def write(self, document: Document, record: Record, changes: Mapping[str, int]) -> None:
        """Keep a document, as `record`; `changes` says what was changed and how many characters it took away."""
        assert self._spool is not None, "this stage does not say that it changes documents"
        for change, characters in changes.items():
            self.changed.setdefault(change, Reason()).count(characters, self._example(document, ""))
        self.sizes[document.index] = len(text_of(record))
        line = json.dumps([document.index, document.source, record], ensure_ascii=False)
        self._spool.write(line.encode() + b"\n")

    def take(self, index: int, times: int) -> None:
        """Take a document several times; for the last stage."""
        assert times >= 1
        self.times[index] = times

    def _example(self, document: Document, note: str) -> Example:
        return Example(self.names[document.source], document.index, snippet(document.text), note)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spool is not None:
            self._spool.close()


def everything(count: int) -> Sizes:
    """Return `count` ones: all documents, once."""
    return np.ones(count, dtype=np.int64)
