"""RULER's aggregation tasks: the most common words of a numbered list, and of a coded text with a steep distribution."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from .base import Build, Sample

LIST_QUESTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
CODED_QUESTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
COMMON = 10  # words to be named
LETTERS = 6  # of a coded word
LONG = 4096  # tokens from which on words come 30 and 3 times instead of 6 and once


def common_words(words: Sequence[str], length: int) -> Build:
    """Return the builder of common words extraction; size counts the different words.

    A solved example goes before. When all words are used, the list grows no longer.
    """
    often, seldom, example = (30, 3, (40, 10, 3)) if length >= LONG else (6, 1, (20, 3, 1))

    def build(rng: random.Random, size: int) -> Sample | None:
        if size > len(words):
            return None
        context, common = _numbered(rng, words, *example)
        solved = LIST_QUESTION.format(context=context) + LIST_PREFIX
        solved += " " + " ".join(f"{index + 1}. {word}" for index, word in enumerate(common))
        context, common = _numbered(rng, words, size, often, seldom)
        return Sample(f"{solved}\n{LIST_QUESTION.format(context=context)}", tuple(common), LIST_PREFIX)

    return build


def _numbered(
    rng: random.Random, words: Sequence[str], size: int, often: int, seldom: int
) -> tuple[str, list[str]]:
    chosen = rng.sample(words, size)
    listed = chosen[:COMMON] * often + chosen[COMMON:] * seldom
    rng.shuffle(listed)
    return " ".join(f"{index + 1}. {word}" for index, word in enumerate(listed)), chosen[:COMMON]


def frequent_words(length: int, new_tokens: int = 50, alpha: float = 2.0) -> Build:
    """Return the builder of frequent words extraction; size counts words, ten at a time.

    The k-th word of the vocabulary has the share ``k^-alpha / zeta(alpha)``; the first is written as dots, and the next three
    are to be named. The vocabulary has one word for every fifty tokens of the prompt.
    """
    count = max((length - new_tokens) // 50, 4)
    zeta = sum(k**-alpha for k in range(1, 20_000)) + 20_000 ** (1 - alpha) / (alpha - 1)

    def build(rng: random.Random, size: int) -> Sample:
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            drawn["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
        vocabulary = ["...", *list(drawn)[1:]]
        words = [
            word
            for rank, word in enumerate(vocabulary, 1)
            for _ in range(math.floor(10 * size * rank**-alpha / zeta))
        ]
        rng.shuffle(words)
        return Sample(CODED_QUESTION.format(context=" ".join(words)), tuple(vocabulary[1:4]), CODED_PREFIX)

    return build
