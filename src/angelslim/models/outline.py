"""What was found out about a model, remembered between runs: its structure, and where each tensor goes.

Both take the modelling code of transformers, which is two seconds and 130 MB to import, and a network without
memory to run once. They depend on nothing but the configuration, the tensors' names and shapes, and the versions of
the code: their hash is the name of a small JSON file in the user's cache folder. So the second `plan`, and every run
that rounds without data, starts without building the network, and a folder that was opened before (`shortcut_of`)
without transformers at all.

The folder is ``$ANGELSLIM_CACHE``, or ``angelslim`` in the user's cache; an empty ``ANGELSLIM_CACHE`` turns this off.
A file that cannot be read or written is as good as none. Models that bring their own code are never remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .checkpoint import Checkpoint, write_atomically
from .structure import Experts, Group, Structure

VARIABLE = "ANGELSLIM_CACHE"


@dataclass(frozen=True)
class Target:
    """Where a checkpoint tensor goes: a parameter, directly or through a conversion rule's `pattern`."""

    parameter: str
    pattern: str | None = None


@dataclass(frozen=True)
class Outline:
    """The parts of a model and the target of each checkpoint tensor that has one."""

    structure: Structure
    targets: dict[str, Target]

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(asdict(self), default=list)  # the one set, `keep`, becomes a list

    @classmethod
    def from_json(cls, text: str) -> Outline:
        """Read what `to_json` wrote; anything else is a ValueError, TypeError or KeyError."""
        raw = json.loads(text)
        targets = {tensor: Target(**target) for tensor, target in raw["targets"].items()}
        return cls(_structure(raw["structure"]), targets)


def _structure(raw: dict[str, Any]) -> Structure:
    groups = {
        block: tuple(Group(each["source"], tuple(each["linears"]), tuple(each["others"])) for each in found)
        for block, found in raw["groups"].items()
    }
    experts = tuple(Experts(**{**each, "weights": tuple(each["weights"])}) for each in raw["experts"])
    linears = {name: (shape[0], shape[1]) for name, shape in raw["linears"].items()}
    simple: dict[str, Any] = {
        "blocks": tuple(raw["blocks"]),
        "embeddings": tuple(raw["embeddings"]),
        "keep": frozenset(raw["keep"]),
    }
    return Structure(**{**raw, **simple, "groups": groups, "experts": experts, "linears": linears})


def file_of(config: Any, checkpoint: Checkpoint) -> Path | None:
    """Return the file that remembers a model of this configuration and these tensors; None if nothing shall be."""
    if _folder() is None or getattr(config, "auto_map", None):
        return None
    return _named(config.to_dict(), checkpoint, "outlines", "json")


def shortcut_of(settings: dict[str, Any], checkpoint: Checkpoint) -> Path | None:
    """Return the file that names `file_of` without asking transformers: by config.json as it is."""
    return None if settings.get("auto_map") else _named(settings, checkpoint, "shortcuts", "txt")


def behind(shortcut: Path | None) -> Path | None:
    """Return the file that a shortcut leads to, if it leads anywhere."""
    with suppress(OSError, UnicodeDecodeError):
        if shortcut is not None and shortcut.is_file():
            return shortcut.parent.parent / "outlines" / Path(shortcut.read_text("utf-8")).name
    return None


def shorten(shortcut: Path | None, file: Path | None) -> None:
    """Let a shortcut lead to a file."""
    if shortcut is not None and file is not None and behind(shortcut) != file:
        with suppress(OSError):
            shortcut.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(shortcut, file.name.encode())


def _named(settings: dict[str, Any], checkpoint: Checkpoint, kind: str, suffix: str) -> Path | None:
    folder = _folder()
    if folder is None:
        return None
    changing = ("_name_or_path", "transformers_version")
    kept = {name: value for name, value in settings.items() if name not in changing}
    tensors = [(info.name, list(info.shape)) for info in checkpoint.tensors.values()]
    versions = [__version__, torch.__version__, version("transformers"), *_code()]
    parts = json.dumps([kept, sorted(tensors), versions], sort_keys=True, default=str)
    return folder / kind / f"{hashlib.sha256(parts.encode()).hexdigest()}.{suffix}"


def _code() -> Iterable[str]:
    """Yield what changes when the code that finds structures does, also between two versions."""
    for name in ("structure.py", "exceptions.py", "loading.py", "outline.py", "rules.py"):
        status = (Path(__file__).parent / name).stat()
        yield f"{status.st_size} {status.st_mtime_ns}"


def _folder() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    with suppress(RuntimeError):  # a user without a home
        cache = os.environ.get("XDG_CACHE_HOME")
        return (Path(cache) if cache else Path.home() / ".cache") / "angelslim"
    return None


def remembered(file: Path | None) -> Outline | None:
    """Return what a file holds; None if it is not there or cannot be read."""
    if file is None or not file.is_file():
        return None
    with suppress(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return Outline.from_json(file.read_text("utf-8"))
    return None


def remember(file: Path | None, outline: Outline) -> None:
    """Write an outline; a folder that cannot be written costs nothing but time."""
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, outline.to_json().encode())
