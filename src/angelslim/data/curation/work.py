"""The working folder of a curation, ``OUT.partial``: what makes it resumable.

============================  =====================================================================================
entry                         what it holds
============================  =====================================================================================
``job.json``                  the fingerprint: recipe, files with sizes and times, version
``00-read.*``                 each document's source and length
``NN-NAME.npy``               ``[2, documents]`` int64 after stage NN: how often each is taken, its characters
``NN-NAME.jsonl``             the documents as a changing stage left them; removed when a later one exists
``NN-NAME.json``              the stage's part of the report; written last, so a stage is done when it is there
``kept/``                     files that go into the result beside the shards, such as a classifier
``result/``                   the folder that becomes ``OUT``
============================  =====================================================================================
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...base.errors import DataError
from ...base.files import write_atomically
from ...base.place import is_marked, open_place
from .ledger import Ledger
from .results import CurationReport, Sizes, StageResult

REPORT = "report.json"
READ = "00-read"


class Workplace:
    """The files of one unfinished run."""

    def __init__(self, out: Path) -> None:
        self.root = out.with_name(out.name + ".partial")
        self.kept, self.result = self.root / "kept", self.root / "result"

    def open(self, fingerprint: str, overwrite: bool) -> bool:
        """Make the folder, or find the same run's; returns whether there is something to continue."""
        return open_place(
            self.root,
            fingerprint,
            "an unfinished curation of another recipe or of other files",
            fix="Give it back its recipe, choose another --out, or pass --overwrite.",
            overwrite=overwrite,
        )

    def clear(self, mark: str) -> None:
        """Remove what a run left that was killed after its result had got its name."""
        if is_marked(self.root, mark):
            shutil.rmtree(self.root)

    def save_reading(
        self, sources: NDArray[np.uint16], state: tuple[Sizes, Sizes], result: StageResult
    ) -> None:
        """Commit the first pass."""
        write_atomically(self.root / f"{READ}-sources.npy", _npy(sources))
        self._commit(READ, state, result)

    def sources(self) -> NDArray[np.uint16]:
        """Return the number of each document's source."""
        found: NDArray[np.uint16] = np.load(self.root / f"{READ}-sources.npy", allow_pickle=False)
        return found

    def spool(self, stem: str) -> Path:
        """Where a changing stage's documents are once it is done."""
        return self.root / f"{stem}.jsonl"

    def open_spool(self, stem: str) -> BinaryIO:
        """Open the file that a changing stage writes to."""
        return self.spool(stem).with_suffix(".jsonl.tmp").open("wb")

    def save(self, stem: str, ledger: Ledger, result: StageResult, *, older: Path | None = None) -> None:
        """Commit a stage; `older` is the spool that its own one replaces."""
        temporary = self.spool(stem).with_suffix(".jsonl.tmp")
        if temporary.exists():
            temporary.replace(self.spool(stem))
        self._commit(stem, (ledger.times, ledger.sizes), result)
        if older is not None:
            older.unlink(missing_ok=True)

    def load(self, stem: str) -> tuple[tuple[Sizes, Sizes], StageResult] | None:
        """Return a finished stage, or None."""
        record = self.root / f"{stem}.json"
        if not record.exists():
            return None
        state = np.load(self.root / f"{stem}.npy", allow_pickle=False)
        return (state[0], state[1]), StageResult.read(json.loads(record.read_text("utf-8")))

    def _commit(self, stem: str, state: tuple[Sizes, Sizes], result: StageResult) -> None:
        write_atomically(self.root / f"{stem}.npy", _npy(np.stack(state)))
        text = json.dumps(asdict(result), ensure_ascii=False, allow_nan=False)
        write_atomically(self.root / f"{stem}.json", text.encode())


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def finished(out: Path, mark: str, overwrite: bool) -> CurationReport | None:
    """Return the report of an equal finished run; refuse a folder that is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        report = CurationReport.from_json((out / REPORT).read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        fix = "Choose another --out."
        raise DataError(f"{out} exists and is no curated set.", fix=fix) from None
    if report.fingerprint == mark:
        return report
    if not overwrite:
        fix = "Choose another --out, or pass --overwrite."
        raise DataError(f"{out} holds another curated set.", fix=fix)
    return None
