"""Drop documents that measure like no text: too short, mostly symbols, the same lines over and over.

The rules are those of Gopher (arXiv 2112.11446) and C4 (arXiv 1910.10683) as far as they need no language; words are
found as `texts.words` does, in any script. Each rule has its own threshold and its own count in the report. A document
is dropped for the first rule it breaks, in the order of the options. The defaults spare mathematics and code; a share of
1 (or a least count of 0) turns a rule off. Stop words are a language's, so that rule waits for its list.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from ....base.errors import ConfigError
from ....config.fields import Int, Section, Share, Words, not_a_truth_value
from ..base import Context, Documents
from ..ledger import Ledger
from ..texts import words

Least = Annotated[Int, Field(ge=0)]
Length = Annotated[float, Field(gt=0), BeforeValidator(not_a_truth_value)]
_FEW = 4  # lines; fewer say nothing about repetition


class Options(Section):
    """The thresholds. Shares are of 1."""

    min_characters: Least = 200
    max_characters: Annotated[Int, Field(ge=1)] = 10_000_000
    min_words: Least = 20
    max_mean_word: Length = 20.0  # characters; base64 and URLs are long, whatever the language
    max_symbols: Share = 0.4  # neither letter, digit nor space, of the characters that are no space
    max_digits: Share = 0.4  # of the characters that are no space
    max_repeated_lines: Share = 0.3  # characters in lines that stood above already, of all in lines
    max_top_ngram: Share = 0.2  # characters in the most frequent run of `ngram` words, of all in words
    max_repeated_ngrams: Share = 0.4  # words within runs of `long_ngram` words that occurred before
    ngram: Annotated[Int, Field(ge=1, le=20)] = 3
    long_ngram: Annotated[Int, Field(ge=2, le=50)] = 10
    stop_words: Words = Field(default_factory=list)  # a language's commonest words; empty: no such rule
    min_stop_words: Share = 0.05  # of the words


Measure = Callable[["Sample"], float]


class Sample:
    """A document and what its rules look at."""

    def __init__(self, text: str, options: Options) -> None:
        self.text, self.options = text, options
        self.words = words(text)
        self.characters = Counter(text)
        self.solid = max(self._count(lambda c: not c.isspace()), 1)

    def _count(self, kind: Callable[[str], bool]) -> int:
        return sum(count for character, count in self.characters.items() if kind(character))

    def symbols(self) -> float:
        """Return the share of symbols; letters' combining marks are none, for many scripts need them."""
        return self._count(_is_symbol) / self.solid

    def digits(self) -> float:
        """Return the share of digits."""
        return self._count(str.isdigit) / self.solid

    def repeated_lines(self) -> float:
        """Return the share of characters in lines that occurred above."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        total = sum(map(len, lines))
        if len(lines) < _FEW:
            return 0.0
        return 1 - sum(map(len, set(lines))) / total

    def top_ngram(self) -> float:
        """Return the share of the words' characters that the most frequent run of words accounts for."""
        runs = Counter(_runs(self.words, self.options.ngram))
        if not runs:
            return 0.0
        # Of runs that are equally frequent the longest counts, so the order of words decides nothing.
        count, length = max((count, sum(map(len, run))) for run, count in runs.items())
        return min(count * length / sum(map(len, self.words)), 1.0) if count > 1 else 0.0  # runs may overlap

    def repeated_ngrams(self) -> float:
        """Return the share of words that lie in a long run of words which occurred before."""
        size = self.options.long_ngram
        seen: set[tuple[str, ...]] = set()
        inside = end = 0
        for start, run in enumerate(_runs(self.words, size)):
            if run in seen:
                inside += start + size - max(start, end)
                end = start + size
            seen.add(run)
        return inside / max(len(self.words), 1)

    def stop_words(self) -> float:
        """Return the share of stop words."""
        known = {word.casefold() for word in self.options.stop_words}
        return sum(word.casefold() in known for word in self.words) / max(len(self.words), 1)

    def mean_word(self) -> float:
        """Return the mean length of a word; symbols without spaces count as one word."""
        found = self.text.split()
        return sum(map(len, found)) / max(len(found), 1) if len(self.words) <= 2 * len(found) else 0.0


def _is_symbol(character: str) -> bool:
    return not (character.isalnum() or character.isspace() or unicodedata.category(character)[0] == "M")


def _runs(found: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(found[start:] for start in range(size)), strict=False)


# The rules in order: option, measure. "min" refuses what is below, "max" what is above.
RULES: dict[str, Measure] = {
    "min_characters": lambda sample: len(sample.text),
    "max_characters": lambda sample: len(sample.text),
    "min_words": lambda sample: len(sample.words),
    "max_mean_word": Sample.mean_word,
    "max_symbols": Sample.symbols,
    "max_digits": Sample.digits,
    "max_repeated_lines": Sample.repeated_lines,
    "max_top_ngram": Sample.top_ngram,
    "max_repeated_ngrams": Sample.repeated_ngrams,
    "min_stop_words": Sample.stop_words,
}


def broken_rule(text: str, options: Options) -> tuple[str, float] | None:
    """Return the first rule that a text breaks, with what was measured."""
    sample = Sample(text, options)
    for rule, measure in RULES.items():
        if rule == "min_stop_words" and not options.stop_words:
            continue
        value, limit = measure(sample), getattr(options, rule)
        if value < limit if rule.startswith("min") else value > limit:
            return rule, value
    return None


class Heuristics:
    """Keeps what breaks no rule."""

    section: ClassVar[type[Section]] = Options
    changes: ClassVar[bool] = False
    last: ClassVar[bool] = False

    def __init__(self, options: Options, context: Context) -> None:
        self.options = options
        if options.min_characters > options.max_characters:
            raise ConfigError(
                f"min_characters {options.min_characters} is above max_characters {options.max_characters}.",
                where=context.where,
                fix="Exchange them.",
            )

    def reads(self) -> Sequence[Path]:
        """Nothing but the documents."""
        return ()

    def run(self, documents: Documents, ledger: Ledger) -> None:
        """Measure every document."""
        ledger.expect(rule for rule in RULES if rule != "min_stop_words" or self.options.stop_words)
        for document in documents:
            broken = broken_rule(document.text, self.options)
            if broken is not None:
                rule, value = broken
                ledger.drop(document, rule, f"{value:.3g} against {getattr(self.options, rule):g}")


STAGE = Heuristics
