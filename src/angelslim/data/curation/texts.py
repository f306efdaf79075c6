"""The text of a record, its words and its shingles.

Words are found without knowing the language: runs of letters and digits, save that scripts written without spaces
(Han, kana, Thai, Lao, Khmer, Burmese) count every character as a word. A *shingle* is `n` words in a row.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from ..records import Record

SNIPPET = 200  # characters of an example
_WITHOUT_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_WORD = re.compile(f"[{_WITHOUT_SPACES}]|[^\\W{_WITHOUT_SPACES}]+")
_SPACE = re.compile(r"\s+")


def text_of(record: Record) -> str:
    """Return a record's text: itself, or the contents of a conversation's turns, a line each."""
    return record if isinstance(record, str) else "\n".join(turn["content"] for turn in record)


def changed_record(record: Record, change: Callable[[str], str]) -> Record:
    """Return the record with every text in it changed; the shape and the roles stay."""
    if isinstance(record, str):
        return change(record)
    return [{**turn, "content": change(turn["content"])} for turn in record]


def words(text: str) -> list[str]:
    """Return the words of a text.

    >>> words("It's 3 o'clock. 東京")
    ['It', 's', '3', 'o', 'clock', '東', '京']
    """
    return _WORD.findall(text)


def normalised(text: str) -> str:
    """Return what two copies share whatever their case, width, spacing or punctuation: the words alone.

    A text without any word (only symbols) is its own characters without spaces, so that not all of them are alike.

    >>> normalised("The  CAT,\\n sat!") == normalised("the cat sat")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(words(folded)) or _SPACE.sub("", folded)


def shingles(text: str, size: int) -> set[str]:
    """Return the set of runs of `size` normalised words; a shorter text is one shingle.

    >>> sorted(shingles("a b c d", 3))
    ['a b c', 'b c d']
    """
    found = normalised(text).split(" ")
    return {" ".join(found[start : start + size]) for start in range(max(len(found) - size + 1, 1))}


def snippet(text: str) -> str:
    """Return the first characters of a text on one line, for people to look at."""
    short = _SPACE.sub(" ", text[: 4 * SNIPPET]).strip()
    return short if len(short) <= SNIPPET else short[: SNIPPET - 1] + "…"
