"""RULER's tasks in the language of `tiny-long` (`data.statements`), which knows no English questions.

They ask for the same things, as far as the language can say them: a needle in repeated hay, in text, among others, in lines
that are all needles, several values of one key, a chain of links, the most common word. A question for several keys at once
and questions on documents have no words in it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise

from ...data.statements import COMMON, END, LINK, LIST, MARKERS, RECALL, REMEMBER, TRACE, statement
from .base import Build, Sample

HAY = "text"
NOISE_WORDS = 16


def vocabulary(tokenizer: object) -> tuple[list[str], list[str]] | None:
    """Return the keys and values that a tokenizer of this language knows, or None for any other tokenizer."""
    known = tokenizer.get_vocab()  # type: ignore[attr-defined]
    if any(marker not in known for marker in MARKERS) or "<unk>" not in known:
        return None
    words = sorted(known, key=known.__getitem__)
    first = known[MARKERS[-1]] + 1
    rest = words[first:]
    keys = [word for word in rest if re.fullmatch("([bdfgklmnprstvz][aiou]){3}", word)]
    values = [word for word in rest if re.fullmatch("[0-9]{5}", word)]
    return keys, values


def facts(
    keys: Sequence[str],
    values: Sequence[str],
    words: Sequence[str],
    *,
    hay: str = HAY,
    count: int = 1,
    width: int = 1,
) -> Build:
    """Return the builder of needle tasks: `count` facts of `width` values in hay of `size` times eight words.

    Hay is text, `noise` (the same few words again and again) or `lines` (every line is a fact; size counts them).
    """

    def build(rng: random.Random, size: int) -> Sample | None:
        number = size if hay == "lines" else count
        if number > len(keys):
            return None
        names = rng.sample(keys, number)
        told = [rng.choices(values, k=width) for _ in names]
        lines = [statement(REMEMBER, [name, *own]) for name, own in zip(names, told, strict=True)]
        if hay != "lines":
            lines = hidden(rng, lines, words[:NOISE_WORDS] if hay == "noise" else words, 8 * size)
        asked = rng.randrange(number)
        return Sample(f"{' '.join(lines)} {RECALL} {names[asked]}", (" ".join(told[asked]),))

    return build


def links(keys: Sequence[str], values: Sequence[str], words: Sequence[str], chains: int, hops: int) -> Build:
    """Return the builder of variable tracking: one of `chains` chains is to be followed to its value."""

    def build(rng: random.Random, size: int) -> Sample:
        names = rng.sample(keys, chains * (hops + 1))
        lists, answer, start = [], "", ""
        for number in range(chains):
            own = names[number * (hops + 1) : (number + 1) * (hops + 1)]
            value = rng.choice(values)
            steps = [statement(REMEMBER, [own[0], value])]
            steps += [statement(LINK, [after, before]) for before, after in pairwise(own)]
            lists.append(steps)
            if not number:
                start, answer = own[-1], " ".join([*own[-2::-1], value])
        order = [number for number, steps in enumerate(lists) for _ in steps]
        rng.shuffle(order)
        lines = [lists[number].pop(0) for number in order]
        return Sample(f"{' '.join(hidden(rng, lines, words, 8 * size))} {TRACE} {start}", (answer,))

    return build


def frequent(keys: Sequence[str], pool: int, often: int) -> Build:
    """Return the builder of the most common word of `pool`, which comes `often` times as often; size counts eight words."""

    def build(rng: random.Random, size: int) -> Sample:
        names = rng.sample(keys, pool)
        drawn = rng.choices(names, weights=[often] + [1] * (pool - 1), k=8 * size)
        return Sample(f"{LIST} {' '.join(drawn)} {COMMON}", (names[0],))

    return build


def hidden(rng: random.Random, lines: Sequence[str], words: Sequence[str], count: int) -> list[str]:
    """Return `count` words of text, from a random place on, with the lines among them in their order."""
    begin = rng.randrange(len(words))
    hay = [words[(begin + index) % len(words)] for index in range(count)]
    places = sorted((rng.randint(0, count) for _ in lines), reverse=True)
    for place, line in zip(places, reversed(lines), strict=True):
        hay.insert(place, line)
    return hay


def exact(reply: str, sample: Sample) -> float:
    """Return whether the reply, up to the end of its statement, is the answer."""
    return float(reply.partition(END)[0].split() == sample.answers[0].split())
