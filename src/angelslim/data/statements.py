"""The words of `tiny-long`, the small model that looks things up in long texts, and what it can be asked with them.

Ordinary text stands between *statements*, and each statement is a few whole words:

    REMEMBER bakiru 39213 END                a value that belongs to a key (or several values)
    LINK moluda bakiru END                   a key that stands for another key
    RECALL bakiru 39213 END                  a question for the values, and its answer
    TRACE moluda bakiru 39213 END            a question that follows the links down to the value
    LIST pudaro gatimu pudaro ...            words, one of them more often than the others
    COMMON pudaro END                        a question for that one

Keys and values are single tokens of a word tokenizer, so looking one up is what attention can learn in minutes: find the
earlier place where this word stood, read what came next. Markers are written in capitals, keys in three syllables and
values in five digits, which ordinary text seldom has.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

REMEMBER, RECALL, LINK, TRACE, LIST, COMMON, END = (
    "REMEMBER",
    "RECALL",
    "LINK",
    "TRACE",
    "LIST",
    "COMMON",
    "END",
)
MARKERS = (REMEMBER, RECALL, LINK, TRACE, LIST, COMMON, END)
PAD, UNKNOWN = "<pad>", "<unk>"
MOST_WORDS = 4096  # keys, or values

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aiou"


def key_words(count: int) -> tuple[str, ...]:
    """Return the first `count` keys: three syllables each, all different, the same at every call."""
    assert count <= MOST_WORDS
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    rng = random.Random("tiny-long/keys")  # noqa: S311  not for secrets
    words: dict[str, None] = {}
    while len(words) < MOST_WORDS:
        words["".join(rng.choices(syllables, k=3))] = None
    return tuple(words)[:count]


def value_words(count: int) -> tuple[str, ...]:
    """Return the first `count` values: numbers of five digits, all different, the same at every call."""
    assert count <= MOST_WORDS
    rng = random.Random("tiny-long/values")  # noqa: S311  not for secrets
    return tuple(map(str, rng.sample(range(10_000, 100_000), MOST_WORDS)))[:count]


def statement(marker: str, words: Iterable[str]) -> str:
    """Write one statement."""
    return " ".join([marker, *words, END])
