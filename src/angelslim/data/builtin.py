"""Data that needs no download: two generated tasks and the text that comes with Python.

- **addition**: two three-digit numbers, added column by column inside ``<think>`` tags, or answered at once.
- **recall**: a list of eight key-value pairs, then a question for one of them (associative recall, the
  standard probe of attention in "Zoology", arXiv 2312.04927).
- **text**: the sources of Python's standard library and the help topics of `pydoc`, found on the machine.

Each comes in three *splits*, so that no figure is ever taken on data a model was trained or calibrated on.
The split of an item is a hash of the item itself, not a position in a random stream: an addition belongs to
a split by its unordered operands (so ``a+b`` and ``b+a`` never part), a recall key by its words, a text by
its file name. Random streams are seeded by task, split and seed together. Everything is a pure function of
its arguments, on every Python version, and ``examples(..., count=10)`` begins ``examples(..., count=20)``.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from ..base.errors import ConfigError, DataError, did_you_mean
from .words import ADJECTIVES, NOUNS

Split = Literal["train", "calibration", "evaluation"]
TASKS = ("addition", "recall")
PAIRS = 8  # key-value pairs in a recall example

ADDITION_QUESTIONS = ("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "Compute {a} + {b}.")
RECALL_QUESTIONS = ("What is {key}?", "Look up {key}.", "Which number belongs to {key}?")
PLACES = ("Ones", "Tens", "Hundreds")

# Folders of the standard library that are missing from many installations or hold tables instead of text.
_NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Example:
    """One question and its reply: `messages` ends with the user, `completion` is the assistant's whole text."""

    task: str
    messages: list[dict[str, str]]
    thinking: bool
    answer: str
    completion: str


def split_of(item: str) -> Split:
    """Assign an item to a split by its hash: 90 % train, 5 % calibration, 5 % evaluation."""
    bucket = int.from_bytes(hashlib.blake2b(item.encode(), digest_size=4).digest(), "big") % 100
    return "train" if bucket < 90 else "calibration" if bucket < 95 else "evaluation"


def stream(task: str, split: Split, seed: int) -> random.Random:
    """Return the random stream of one task, split and seed; no two of them share a stream."""
    return random.Random(f"angelslim/{task}/{split}/{seed}")  # noqa: S311  not for secrets


def with_think(thought: str, answer: str) -> str:
    """Write an assistant's text: the thought, which may be empty, in tags, a blank line, the answer."""
    inside = f"{thought}\n" if thought else "\n"
    return f"<think>\n{inside}</think>\n\n{answer}"


def extract_answer(completion: str) -> str:
    """Return the text after ``</think>``; a completion that never stopped thinking has no answer."""
    before, tag, after = completion.partition("</think>")
    if not tag:
        after = "" if "<think>" in before else before
    return after.partition("<|im_end|>")[0].strip()


def examples(
    task: str, split: Split, count: int, seed: int = 0, thinking: bool | None = None
) -> list[Example]:
    """Draw `count` examples of a task; `thinking` None mixes both modes evenly.

    An unknown task or split is a `ConfigError`.
    """
    if task not in TASKS:
        raise ConfigError(f"Unknown task {task!r}.", fix=did_you_mean(task, TASKS))
    if split not in get_args(Split):
        raise ConfigError(f"Unknown split {split!r}.", fix=did_you_mean(split, get_args(Split)))
    rng = stream(task, split, seed)
    drawn = []
    for _ in range(count):
        mode = rng.random() < 0.5
        mode = mode if thinking is None else thinking
        drawn.append(addition(rng, split, mode) if task == "addition" else recall(rng, split, mode))
    return drawn


def addition(rng: random.Random, split: Split, thinking: bool) -> Example:
    """Draw one addition of two numbers from 100 to 999."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if split_of(f"{min(a, b)}+{max(a, b)}") == split:
            break
    question = rng.choice(ADDITION_QUESTIONS).format(a=a, b=b)
    completion = with_think(_addition_steps(a, b) if thinking else "", str(a + b))
    return Example("addition", [{"role": "user", "content": question}], thinking, str(a + b), completion)


def _addition_steps(a: int, b: int) -> str:
    lines, carry, left, right = [], 0, a, b
    for place in PLACES:
        x, y = left % 10, right % 10
        total = x + y + carry
        terms = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        carry = total // 10
        lines.append(f"{place}: {terms}={total}, write {total % 10}, carry {carry}.")
        left, right = left // 10, right // 10
    return "\n".join([*lines, f"Sum: {a + b}."])


@cache
def recall_keys(split: Split) -> tuple[str, ...]:
    """Return the two-word keys of a split; no key is in two splits."""
    return tuple(f"{a} {n}" for a in ADJECTIVES for n in NOUNS if split_of(f"key {a} {n}") == split)


def recall_pairs(rng: random.Random, split: Split, count: int) -> dict[str, str]:
    """Draw `count` distinct keys of the split, each with a four-digit value."""
    return {key: f"{rng.randrange(10_000):04d}" for key in rng.sample(recall_keys(split), count)}


def recall_list(pairs: dict[str, str]) -> str:
    """Write the pairs as the list that a recall question starts with."""
    return "\n".join(f"- {key}={value}" for key, value in pairs.items())


def recall_reply(key: str, value: str, thinking: bool) -> str:
    """Write the assistant's text for one recall question."""
    return with_think(f"I look for {key}.\n- {key}={value}" if thinking else "", value)


def recall(rng: random.Random, split: Split, thinking: bool, pairs: int = PAIRS) -> Example:
    """Draw one list of key-value pairs and a question for one of them."""
    table = recall_pairs(rng, split, pairs)
    key = rng.choice(list(table))
    question = f"{recall_list(table)}\n{rng.choice(RECALL_QUESTIONS).format(key=key)}"
    completion = recall_reply(key, table[key], thinking)
    return Example("recall", [{"role": "user", "content": question}], thinking, table[key], completion)


def text(split: Split, max_chars: int = 1_000_000) -> list[str]:
    """Return documents of the split, about `max_chars` characters in all (the last one is cut to fit).

    The order mixes the library's folders but is the same at every call. An installation without the
    library's sources is a `DataError`.
    """
    documents: list[str] = []
    left = max_chars
    for document in _documents(split):
        if left <= 0:
            break
        documents.append(document[:left])
        left -= len(document)
    if not documents:
        raise DataError(
            f"Found no {split} text: the standard library's sources are not on this machine.",
            where=sysconfig.get_path("stdlib"),
            fix="Name a data file of your own, or use a Python that ships its sources.",
        )
    return documents


def _documents(split: Split) -> Iterator[str]:
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    sources = {
        f"file {path.relative_to(root).as_posix()}": path
        for path in root.rglob("*.py")
        if _NOT_TEXT.isdisjoint(path.relative_to(root).parts)
    }
    names = [*sources, *(f"topic {name}" for name in topics)]
    for name in sorted(names, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        if split_of(name) != split:
            continue
        kind, _, key = name.partition(" ")
        document = topics[key] if kind == "topic" else sources[name].read_text("utf-8", errors="replace")
        if document.strip():
            yield document
