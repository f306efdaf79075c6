"""Several runs in one report: which method gives the most for the least?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .html import write_html
from .record import RunRecord


def load_records(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the records of several output folders (or ``run.json`` files), in the order given."""
    return [RunRecord.load(folder) for folder in folders]


def compare(folders: Sequence[Path], path: Path) -> list[RunRecord]:
    """Write one page on all the runs to `path` and return their records, for the terminal's table."""
    records = load_records(folders)
    write_html(records, path)
    return records
