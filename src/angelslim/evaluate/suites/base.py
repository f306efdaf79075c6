"""What a suite is made of: samples, tasks that make them, and the search for the size that fills a length.

A length counts tokens of the model's own tokenizer and includes the answer's, as in RULER (arXiv 2404.06654): the largest
size of a prompt (sentences, lines, words, documents) is sought that leaves room for the answer. Every sample has a random
stream of its own, so the first ten of a hundred are the ten of ten.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...base.errors import DataError

LARGEST = 2**20  # sentences, lines, words or documents of one prompt


@dataclass(frozen=True)
class Sample:
    """One prompt: `prefix` begins the answer and stands behind the chat template, if there is one."""

    prompt: str
    answers: tuple[str, ...]
    prefix: str = ""
    classes: tuple[str, ...] = ()  # of classification tasks


Score = Callable[[str, Sample], float]  # reply, sample -> 0 to 1
Build = Callable[
    [random.Random, int], Sample | None
]  # random numbers, size -> a sample; None: it cannot be so large


@dataclass(frozen=True)
class Task:
    """A kind of sample: how it is built, the tokens an answer may have, how it is scored."""

    name: str
    build: Build
    new_tokens: int
    score: Score
    least: int = 1  # the smallest size that makes sense
    chat: bool = True


def stream(seed: int, *names: object) -> random.Random:
    """Return the random numbers that belong to these names."""
    return random.Random("/".join(map(str, ("angelslim", seed, *names))))  # noqa: S311  not for secrets


def written(tokenizer: Any, sample: Sample, chat: bool = True) -> str:
    """Write the whole prompt: in the tokenizer's chat format without thinking, if it has one, then the answer's beginning."""
    if not (chat and tokenizer.chat_template):
        return sample.prompt + sample.prefix
    messages = [{"role": "user", "content": sample.prompt}]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text + sample.prefix.lstrip()


def tokens_of(tokenizer: Any, sample: Sample, chat: bool = True) -> list[int]:
    """Return the prompt's tokens; a chat format brings its own special tokens."""
    special = not (chat and tokenizer.chat_template)
    ids: list[int] = tokenizer(
        written(tokenizer, sample, chat), add_special_tokens=special, verbose=False
    ).input_ids
    return ids


def samples(task: Task, tokenizer: Any, length: int, count: int, seed: int = 0) -> list[Sample]:
    """Return `count` samples of at most `length` tokens, answer included; a length that holds none is a `DataError`."""
    room = length - task.new_tokens

    def fits(rng: random.Random, size: int) -> Sample | None:
        sample = task.build(rng, size)
        return sample if sample and len(tokens_of(tokenizer, sample, task.chat)) <= room else None

    low, high = task.least - 1, task.least
    while high < LARGEST and fits(stream(seed, task.name, length, "size"), high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(stream(seed, task.name, length, "size"), middle) else (low, middle)
    found = []
    for index in range(count):
        size, sample = low, None
        while sample is None and size >= task.least:
            sample = fits(stream(seed, task.name, length, index), size)
            size -= max(size // 50, 1)
        if sample is None:
            raise DataError(
                f"No sample of {task.name} fits into {length} tokens.", fix="Ask for a longer length."
            )
        found.append(sample)
    return found
