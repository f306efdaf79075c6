"""The documents of a run, streamed: from the sources, or from the file that the last changing stage wrote.

Nothing is held but one record. Files of a source are read in the order they are named, those of a pattern by name, so a
document's index means the same document in every pass and every run.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...base.errors import DataError
from ...config.curation import Source
from ..records import SUFFIXES, Record, read_records
from .base import Document
from .results import Sizes
from .texts import changed_record


@dataclass(frozen=True)
class SourceFiles:
    """A source with its patterns resolved: files, or names of cached hub data sets."""

    name: str
    paths: tuple[str, ...]


def resolve(sources: Sequence[Source], where: str) -> list[SourceFiles]:
    """Find the files of every source; a path or pattern without any is a `DataError`."""
    found = []
    for source in sources:
        paths: list[str] = []
        for pattern in source.path:
            path = str(Path(pattern).expanduser())
            if Path(path).is_file() or not glob.has_magic(path):
                paths.append(path)
                continue
            files = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
            if not files:
                fix = "Patterns and paths start at the current folder."
                place = f"{where}, source {source.name}"
                raise DataError(f"No file matches {pattern!r}.", where=place, fix=fix)
            paths += files
        for path in paths:
            if not Path(path).is_file() or Path(path).suffix not in SUFFIXES:
                next(read_records(path), None)  # says what is wrong with it now, not hours later
        found.append(SourceFiles(source.name, tuple(paths)))
    return found


def read_sources(sources: Sequence[SourceFiles]) -> Iterator[Document]:
    """Yield every record of every source."""
    index = 0
    for number, source in enumerate(sources):
        for path in source.paths:
            for record in read_records(path):
                yield Document(index, number, _sound(record))
                index += 1


class Corpus:
    """The documents whose `times` is above zero; iterate as often as you like."""

    def __init__(self, sources: Sequence[SourceFiles], times: Sizes, spool: Path | None = None) -> None:
        self._sources, self._times, self._spool = sources, times, spool

    def __len__(self) -> int:
        return int((self._times > 0).sum())

    def __iter__(self) -> Iterator[Document]:
        last = -1
        for document in self._all():
            last = document.index
            if last >= len(self._times):
                break
            if self._times[last]:
                yield document
        if last >= len(self._times) or (self._spool is None and last + 1 < len(self._times)):
            raise DataError(
                "The data files changed while they were being read.", fix="Start again with --overwrite."
            )

    def _all(self) -> Iterator[Document]:
        return read_sources(self._sources) if self._spool is None else _read_spool(self._spool)


def _read_spool(path: Path) -> Iterator[Document]:
    with path.open("rb") as lines:
        for line in lines:
            index, source, record = json.loads(line)
            yield Document(index, source, record)


def _sound(record: Record) -> Record:
    """Replace half surrogate pairs, which JSON can spell but no file can hold."""
    try:
        changed_record(record, lambda text: text if text.isascii() else (text.encode(), text)[1])
    except UnicodeEncodeError:
        return changed_record(
            record, lambda text: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
    return record
