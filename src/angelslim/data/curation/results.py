"""What a curation did, as plain records: the report's JSON, table and page are drawn from them alone.

Counts are documents and characters (of the text, before any tokenizer). Nothing here depends on the day or on how long
something took, so equal inputs give an equal report.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXAMPLES = 5
Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """The beginning of one document that something happened to."""

    source: str
    document: int  # its place in the order of reading
    text: str
    note: str = ""  # such as which document it repeats


@dataclass
class Reason:
    """Why documents were dropped, or what was changed in them."""

    documents: int = 0
    characters: int = 0  # of the dropped documents; for a change, by how many the text became shorter
    sources: dict[str, int] = field(default_factory=dict)  # documents of each source
    examples: list[Example] = field(default_factory=list)

    def count(self, characters: int, example: Example) -> None:
        """Count one document, and keep it as an example while there are few."""
        self.documents += 1
        self.characters += characters
        self.sources[example.source] = self.sources.get(example.source, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Reason:
        """Take what JSON holds."""
        return cls(**{**raw, "examples": [Example(**example) for example in raw["examples"]]})


@dataclass(frozen=True)
class Flow:
    """What went into a stage and what came out, documents counted as often as they are taken."""

    documents_in: int
    documents_out: int
    characters_in: int
    characters_out: int


@dataclass
class StageResult:
    """One stage: its options, what it let through of each source, and every reason with its count."""

    name: str
    options: dict[str, Any]
    flow: Flow
    sources: dict[str, Flow]
    dropped: dict[str, Reason]
    changed: dict[str, Reason]
    notes: list[str]

    @classmethod
    def read(cls, raw: dict[str, Any]) -> StageResult:
        """Take what JSON holds."""
        return cls(
            raw["name"],
            raw["options"],
            Flow(**raw["flow"]),
            {name: Flow(**flow) for name, flow in raw["sources"].items()},
            {name: Reason.read(reason) for name, reason in raw["dropped"].items()},
            {name: Reason.read(reason) for name, reason in raw["changed"].items()},
            raw["notes"],
        )


@dataclass
class CurationReport:
    """The whole run. Histograms count documents with text by length: entry ``i`` has ``2^i .. 2^(i+1) - 1`` characters."""

    fingerprint: str
    recipe: dict[str, Any]
    stages: list[StageResult]
    lengths_before: list[int]
    lengths_after: list[int]
    shards: list[str]
    bytes: int

    def to_json(self) -> str:
        """Everything, with sorted keys."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CurationReport:
        """Read what `to_json` wrote."""
        raw = json.loads(text)
        return cls(**{**raw, "stages": [StageResult.read(stage) for stage in raw["stages"]]})


def flows(
    names: list[str],
    sources: NDArray[np.uint16],
    before: tuple[Sizes, Sizes],
    after: tuple[Sizes, Sizes],
) -> tuple[Flow, dict[str, Flow]]:
    """Return the flow of all documents and of each source; a state is (times taken, characters) by document."""

    def totals(state: tuple[Sizes, Sizes], mask: NDArray[np.bool_]) -> tuple[int, int]:
        times, sizes = (part[mask] for part in state)
        return int(times.sum()), int((times * sizes).sum())

    def flow(mask: NDArray[np.bool_]) -> Flow:
        (documents_in, characters_in), (documents_out, characters_out) = (
            totals(before, mask),
            totals(after, mask),
        )
        return Flow(documents_in, documents_out, characters_in, characters_out)

    each = {name: flow(sources == number) for number, name in enumerate(names)}
    return flow(np.ones(len(sources), dtype=np.bool_)), each


def length_histogram(times: Sizes, sizes: Sizes) -> list[int]:
    """Count documents by the power of two below their length; empty ones stand with those of one character.

    >>> length_histogram(np.array([1, 1, 2]), np.array([1, 3, 5]))
    [1, 1, 2]
    """
    if not len(sizes):
        return []
    bins = np.frexp(np.maximum(sizes, 1).astype(np.float64))[1] - 1
    counts = [int(count) for count in np.bincount(bins, weights=times)]
    while counts and not counts[-1]:
        counts.pop()
    return counts
