"""RULER's needles and chains of variables: what has to be found, and the hay that hides it.

Needles stand in one of three kinds of hay: `noise`, five sentences again and again; `lines`, in which every line is a
needle; `text`, sentences of a local file (RULER takes essays from the web, so its tasks with text have other names here).
Keys are an adjective and a noun with a hyphen (`word_lists`), values are numbers of seven digits or UUIDs. Wording, its slip in
the chain's answer too, numbers of needles and their places are RULER's; that no other line has the key that is asked for
is ours.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from .base import Build, Sample
from .word_lists import adjectives, nouns

Kind = Literal["words", "numbers", "uuids"]
Hay = Literal["noise", "lines", "text"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
QUESTION = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
DEPTHS = [round(100 * step / 39) for step in range(40)]  # percent of the text, where needles may stand

CHAIN_QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {query} in the text above."
)
CHAIN_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the value "
    "{query}, they are: "
)
# Groups in the solved example before a chain: RULER fills 500 tokens, which hold about as many.
EXAMPLE_NOISE = 15
SHORT_EXAMPLE_NOISE = 5  # in prompts shorter than RULER's


def needles(
    hay: Hay,
    key: Kind,
    value: Kind,
    sentences: Sequence[str] = (),
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Build:
    """Return the builder of a needle task; size counts sentences of hay (noise: groups of five)."""

    def build(rng: random.Random, size: int) -> Sample:
        names = _different(rng, key, max(keys, queries))
        told = [[drawn(rng, value) for _ in range(values)] for _ in names]
        hidden = [
            NEEDLE.format(kind=value, key=name, value=number)
            for name, numbers in zip(names, told, strict=True)
            for number in numbers
        ]
        rng.shuffle(hidden)
        context = _context(rng, hay, key, value, hidden, size, sentences, set(names))
        asked = rng.sample(range(len(names)), queries)
        wanted = [names[index] for index in asked]
        query = ", ".join(wanted[:-1]) + ", and " + wanted[-1] if queries > 1 else wanted[0]
        answers = tuple(number for index in asked for number in told[index])
        question, prefix, kind = QUESTION, PREFIX, str(value)
        if queries * values == 1:
            question, prefix, kind = _singular(question), _singular(prefix), kind[:-1]
        return Sample(
            question.format(kind=kind, context=context, query=query),
            answers,
            prefix.format(kind=kind, query=query),
        )

    return build


def _context(
    rng: random.Random,
    hay: Hay,
    key: Kind,
    value: Kind,
    hidden: list[str],
    size: int,
    sentences: Sequence[str],
    taken: set[str],
) -> str:
    if hay == "text":
        lines = [sentences[index % len(sentences)] for index in range(size)]
        depths = sorted(rng.sample(DEPTHS, len(hidden)), reverse=True)
        for needle, depth in zip(hidden, depths, strict=True):
            lines.insert(size * depth // 100, needle)
        return " ".join(lines)
    lines = [NOISE] * size
    if hay == "lines":
        lines = [
            NEEDLE.format(kind=value, key=_other(rng, key, taken), value=drawn(rng, value))
            for _ in range(size)
        ]
    places = sorted(rng.sample(range(size), len(hidden)), reverse=True)
    for place, needle in zip(places, hidden, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def _singular(text: str) -> str:
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is")


def drawn(rng: random.Random, kind: Kind) -> str:
    """Draw a key or a value."""
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(adjectives())}-{rng.choice(nouns())}"


def _other(rng: random.Random, kind: Kind, taken: set[str]) -> str:
    """A key that nobody asks for: with two of the same, a question would have two answers."""
    while (name := drawn(rng, kind)) in taken:
        pass
    return name


def _different(rng: random.Random, kind: Kind, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[drawn(rng, kind)] = None
    return list(found)


def chain(example_noise: int, chains: int = 1, hops: int = 4) -> Build:
    """Return the builder of variable tracking: a solved short example, then the question; size counts groups of noise."""

    def build(rng: random.Random, size: int) -> Sample:
        example = _chain_sample(rng, max(example_noise, chains * (hops + 1)), chains, hops, letters=3)
        solved = f"{example.prompt}{example.prefix} {' '.join(example.answers)}\n\n"
        asked = _chain_sample(rng, size, chains, hops, letters=5)
        return Sample(solved + asked.prompt, asked.answers, asked.prefix)

    return build


def _chain_sample(rng: random.Random, size: int, chains: int, hops: int, letters: int) -> Sample:
    names: dict[str, None] = {}
    while len(names) < chains * (hops + 1):
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    listed, lines, value = list(names), [NOISE] * size, ""
    for number in range(chains):
        own = listed[number * (hops + 1) : (number + 1) * (hops + 1)]
        start = str(rng.randint(10_000, 99_998))
        value = value or start  # the first chain is asked for
        links = [f"VAR {own[0]} = {start}"]
        links += [f"VAR {after} = VAR {before} " for before, after in pairwise(own)]
        places = sorted(rng.sample(range(len(lines)), len(links)))
        for shift, (place, link) in enumerate(zip(places, links, strict=True)):
            lines.insert(place + shift, link)
    context = "\n".join(lines).replace(". \n", ".\n")
    return Sample(
        CHAIN_QUESTION.format(context=context, query=value),
        tuple(listed[: hops + 1]),
        CHAIN_PREFIX.format(count=hops + 1, query=value),
    )
