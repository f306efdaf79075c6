"""RULER's 13 tasks (Hsieh et al., arXiv 2404.06654) from seeded generators of our own, without any download.

| here | in RULER | what differs |
|---|---|---|
| niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe, fwe | the same | nothing with the extra `ruler`; without it, words (`word_lists`) |
| niah_text_single_2, _single_3, _multikey_1, _multivalue, _multiquery | niah_* | hay is the local text, not essays from the web |
| facts_1, facts_2 | qa_1, qa_2 | generated documents, not SQuAD and HotpotQA |

"Nothing" is about how a sample is drawn: random numbers are ours, a key that is asked for stands in no other line, the largest
size that fits is found exactly, and `cwe` grows no longer when all words are used (at about 100k tokens).
Prompts are worded as published, answers are scored by containment, lengths count the answer's tokens too. Tokenizers of
`tiny-long`'s language get the same tasks in that language, as far as it goes (`small_language`).
"""

from __future__ import annotations

import re
from typing import Any

from ...base.errors import ConfigError, DataError, did_you_mean
from ...data.statements import MARKERS
from . import small_language as small
from .base import Task
from .counting import COMMON, LONG, common_words, frequent_words
from .facts import documents
from .haystack import EXAMPLE_NOISE, SHORT_EXAMPLE_NOISE, chain, needles
from .scorers import string_match_all, string_match_part
from .word_lists import every_word

TASKS = (
    "niah_single_1",
    "niah_text_single_2",
    "niah_text_single_3",
    "niah_text_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_text_multivalue",
    "niah_text_multiquery",
    "vt",
    "cwe",
    "fwe",
    "facts_1",
    "facts_2",
)
LONGEST_SENTENCE = 300  # characters; longer pieces of a text are tables or code


def tasks(tokenizer: Any, length: int, text: str, wanted: list[str] | None = None) -> list[Task]:
    """Return the tasks for one length, all or those wanted; `text` is what they are hidden in."""
    known(wanted or [])
    language = small.vocabulary(tokenizer)
    every = english(length, text) if language is None else simple(tokenizer, language, text)
    missing = [name for name in wanted or [] if name not in every]
    if missing:
        raise ConfigError(
            f"The language of this model cannot ask {', '.join(missing)}.", fix=f"Known: {', '.join(every)}."
        )
    return [task for name, task in every.items() if not wanted or name in wanted]


def known(names: list[str]) -> None:
    """Refuse names of no task."""
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"RULER has no task {name!r} here.", fix=did_you_mean(name, TASKS))


def english(length: int, text: str) -> dict[str, Task]:
    """Return the tasks in English."""
    hay = sentences(text)
    niah = {
        "niah_single_1": needles("noise", "words", "numbers"),
        "niah_text_single_2": needles("text", "words", "numbers", hay),
        "niah_text_single_3": needles("text", "words", "uuids", hay),
        "niah_text_multikey_1": needles("text", "words", "numbers", hay, keys=4),
        "niah_multikey_2": needles("lines", "words", "numbers"),
        "niah_multikey_3": needles("lines", "uuids", "uuids"),
        "niah_text_multivalue": needles("text", "words", "numbers", hay, values=4),
        "niah_text_multiquery": needles("text", "words", "numbers", hay, queries=4),
    }
    found = {name: Task(name, build, 128, string_match_all, least=4) for name, build in niah.items()}
    example = EXAMPLE_NOISE if length >= LONG else SHORT_EXAMPLE_NOISE
    found["vt"] = Task("vt", chain(example), 30, string_match_all, least=5)
    words = every_word() or sorted({w for w in re.findall(r"\b[a-z]+\b", text) if 3 <= len(w) <= 12})
    found["cwe"] = Task("cwe", common_words(words, length), 120, string_match_all, least=COMMON)
    found["fwe"] = Task("fwe", frequent_words(length), 50, string_match_all, least=6)
    for hops in (1, 2):
        name = f"facts_{hops}"
        found[name] = Task(name, documents(hay, hops), 32, string_match_part, least=hops)
    return found


def simple(tokenizer: Any, language: tuple[list[str], list[str]], text: str) -> dict[str, Task]:
    """Return the tasks in the small language."""
    keys, values = language
    vocabulary = tokenizer.get_vocab()
    words = [word for word in re.findall(r"\w+|[^\w\s]", text) if word in vocabulary and word not in MARKERS]
    builds = {
        "niah_single_1": (small.facts(keys, values, words, hay="noise"), 4),
        "niah_text_single_2": (small.facts(keys, values, words), 4),
        "niah_text_single_3": (small.facts(keys, values, words, width=4), 8),
        "niah_text_multikey_1": (small.facts(keys, values, words, count=4), 4),
        "niah_multikey_2": (small.facts(keys, values, words, hay="lines"), 4),
        "niah_text_multivalue": (small.facts(keys, values, words, width=2, count=4), 6),
        "vt": (small.links(keys, values, words, 4, 2), 8),
        "fwe": (small.frequent(keys, 16, 4), 4),
    }
    return {name: Task(name, build, new, small.exact, chat=False) for name, (build, new) in builds.items()}


def sentences(text: str) -> list[str]:
    """Cut a text into sentences without line breaks."""
    pieces = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    found = [piece for piece in pieces if 1 < len(piece) <= LONGEST_SENTENCE]
    if not found:
        raise DataError("The text has no sentence.", fix="Give a longer text with --text.")
    return found
