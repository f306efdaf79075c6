"""Planted documents, and one stage run by itself on them."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from angelslim.config.curation import checked
from angelslim.data.curation.base import STAGES, Context, Document
from angelslim.data.curation.ledger import Ledger, everything
from angelslim.data.records import Record

_HEADS = ["ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va"]
_TAILS = ["ra", "ne", "ti", "so", "lu", "va", "me", "pi", "do", "gu", "shi", "nor", "kel", "bam"]
VOCABULARY = [head + tail for head in _HEADS for tail in _TAILS]


def babble(seed: int, count: int = 100, vocabulary: Sequence[str] = VOCABULARY) -> str:
    """`count` words drawn at random: two such texts share next to no runs of words."""
    rng = random.Random(seed)
    return " ".join(rng.choice(vocabulary) for _ in range(count))


class Pile:
    """Documents in memory that can be read again and again; counts how often they were."""

    def __init__(self, records: Sequence[Record], sources: Sequence[int] = ()) -> None:
        numbers = sources or [0] * len(records)
        self.documents = [Document(i, s, r) for i, (s, r) in enumerate(zip(numbers, records, strict=True))]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def __len__(self) -> int:
        return len(self.documents)


def context(folder: Path = Path("none"), sources: Sequence[str] = ("web", "science")) -> Context:
    return Context("recipe, stage", 0, sources, folder)


def made(name: str, options: dict[str, Any], where: Context | None = None) -> Any:
    """The stage `name` with checked options."""
    kind = STAGES.get(name)
    return kind(checked(kind.section, options, "recipe, stage"), where or context())


def run(
    name: str,
    options: dict[str, Any],
    records: Sequence[Record],
    sources: Sequence[int] = (),
    where: Context | None = None,
) -> tuple[Ledger, list[Record]]:
    """The ledger of a stage, and what is left in order; a changing stage's documents as it wrote them."""
    import json

    pile, stage = Pile(records, sources), made(name, options, where)
    sizes = np.array([len(document.text) for document in pile], dtype=np.int64)
    spool = io.BytesIO() if stage.changes else None
    ledger = Ledger(list((where or context()).sources), everything(len(records)), sizes, spool)
    stage.run(pile, ledger)
    if spool is not None:
        return ledger, [json.loads(line)[2] for line in spool.getvalue().splitlines()]
    return ledger, [document.record for document in pile for _ in range(ledger.times[document.index])]


def counts(ledger: Ledger) -> dict[str, int]:
    """How many documents each reason dropped, without those that dropped none."""
    return {name: reason.documents for name, reason in ledger.dropped.items() if reason.documents}
