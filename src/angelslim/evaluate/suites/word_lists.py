"""The words of RULER's keys and lists: those of the package wonderwords where it is installed, else our own.

RULER (arXiv 2404.06654) draws from three lists of that package (MIT): adjectives, nouns and verbs. With the extra `ruler` the
keys and the list of common words are therefore RULER's own. Without it keys come from the words of our recall task, and
common words from the local text. The lists are read as files, for the package has no public name for them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ...data.words import ADJECTIVES, NOUNS

PACKAGE = "wonderwords"


@cache
def _listed(kind: str) -> tuple[str, ...]:
    """The package's list of a kind of word; empty where the package is missing or keeps its lists elsewhere."""
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent / "assets" if found and found.origin else Path("assets")
    path = folder / f"{kind}list.txt"
    if not (found and path.is_file()):
        return ()
    return tuple(word.strip() for word in path.read_text("utf-8").splitlines() if word.strip())


def adjectives() -> Sequence[str]:
    """The first words of keys."""
    return _listed("adjective") or ADJECTIVES


def nouns() -> Sequence[str]:
    """The second words of keys."""
    return _listed("noun") or NOUNS


def every_word() -> list[str]:
    """RULER's whole list for common words; empty without the package."""
    return sorted({*_listed("noun"), *_listed("adjective"), *_listed("verb")})


def source() -> str:
    """Where words come from, for the record."""
    return PACKAGE if _listed("noun") else "built in"
