"""What a stage is, and the registry of stages.

A stage sees every document that is still there, in the order of reading, as often as it likes, and tells its `Ledger`
what becomes of each: dropped for a named reason, changed, or (the last stage only) taken several times. What it does not
mention stays. It keeps hashes, signatures or vectors, never the texts.

Adding a stage is one file in ``stages/``: a pydantic `Section` of options and a class with this protocol, named
`STAGE`. A stage's constructor refuses what cannot work; all constructors run before the first document is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ...base.registry import Registry
from ...config.fields import Section
from ..records import Record
from .texts import text_of

if TYPE_CHECKING:
    from .ledger import Ledger


@dataclass(frozen=True, slots=True)
class Document:
    """One record, its place in the order of reading over all sources, and the number of its source."""

    index: int
    source: int
    record: Record

    @property
    def text(self) -> str:
        """The words of the record."""
        return text_of(self.record)


class Documents(Protocol):
    """Documents that can be read more than once."""

    def __iter__(self) -> Iterator[Document]:
        """Read them from the beginning."""

    def __len__(self) -> int:
        """How many there are."""


@dataclass(frozen=True)
class Context:
    """What a stage may know of the run it belongs to."""

    where: str  # names the stage in errors: "recipe.yaml, stage 2 (fuzzy)"
    seed: int
    sources: Sequence[str]  # names, in the recipe's order
    folder: Path  # for files that belong to the result, such as a classifier; made by the stage that needs it


class Stage(Protocol):
    """One step of a curation."""

    section: ClassVar[type[Section]]
    changes: ClassVar[
        bool
    ]  # it rewrites documents, so their new texts are kept in a file for the later stages
    last: ClassVar[bool]  # nothing can follow it

    def __init__(self, options: Any, context: Context) -> None:
        """Take the checked options; what cannot work is a `UserError` here."""

    def reads(self) -> Sequence[Path]:
        """Return the files beside the documents that the outcome depends on."""

    def run(self, documents: Documents, ledger: Ledger) -> None:
        """Decide on every document."""


STAGES: Registry[type[Stage]] = Registry("stage", "angelslim.data.curation.stages", "STAGE")
