"""The folder of unfinished work, beside its output: what identifies the work, and whose the folder is.

Long work keeps its finished parts there and goes on with them after a kill. They may be taken over by the same work only,
so the folder has a marker, ``job.json``, with a fingerprint of everything that the results depend on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import parallel
from .errors import UserError
from .files import write_atomically

MARKER = "job.json"
TEMPORARY = MARKER + ".tmp"  # all that a kill before the marker leaves


def fingerprint(facts: dict[str, Any], files: Sequence[str | Path], version: str) -> str:
    """Return what identifies work: its facts, and every file it reads by name, size and time."""
    parts: list[Any] = [version, facts]
    for name in files:
        path = Path(name)
        stat = path.stat() if path.exists() else None  # a data set of the hub has no file
        parts.append([str(name), stat and stat.st_size, stat and stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_place(place: Path, mark: str, holds: str, *, fix: str, overwrite: bool = False) -> bool:
    """Make the folder, or find the one that was begun with this mark; return, in every process, whether there was one.

    `holds` and `fix` word the refusal of any other.
    """
    found = False
    if parallel.first():
        if (place / MARKER).exists():
            found = is_marked(place, mark)
            if not found:
                if not overwrite:
                    raise UserError(f"{place} holds {holds}.", fix=fix)
                shutil.rmtree(place)
        elif place.exists() and not overwrite and {entry.name for entry in place.iterdir()} - {TEMPORARY}:
            raise UserError(f"{place} is in the way.", fix="Move it, or choose another --out.")
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / MARKER, json.dumps({"fingerprint": mark}).encode())
    return parallel.total_count(int(found)) > 0  # the others wait here


def leave(place: Path) -> None:
    """Take the folder away if nothing was kept in it, so that a command that was refused is in nobody's way."""
    if (
        parallel.first()
        and place.is_dir()
        and {entry.name for entry in place.iterdir()} <= {MARKER, TEMPORARY}
    ):
        shutil.rmtree(place)


def is_marked(place: Path, mark: str) -> bool:
    """Say whether the folder was begun with this mark; a torn marker belongs to nobody."""
    try:
        found = json.loads((place / MARKER).read_text("utf-8"))["fingerprint"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return bool(found == mark)
