"""The rows that the tiny language model is trained on: token ids with a loss weight each.

A row holds one kind of data, packed to a fixed length:

- *text*: a window of the standard library's sources;
- *addition*: conversations of one addition each, with and without thinking;
- *recall*: a list of key-value pairs and one question, or questions for several of them in turn;
- *copy*: random tokens, repeated;
- *lines*: the lines of a recall list, repeated in other orders.

The last two are scaffolding. Recall needs "induction heads" (arXiv 2209.11895): find the place where the same
words stood before, copy what followed. Met only as a question at the end of a list, it stays for thousands of
steps on the plateau of guessing any of the values. Repeating random tokens teaches to match one token within a
few hundred steps, but not to match a key that stands a token away from its value; lines teach that within a
thousand steps, with a signal at every line, provided that they come first, in quantity, and with two pairs.

Loss weights: 1 on text and on the assistant's words, `PROMPT` on words that are only read, 0 on the empty
thought that the chat template writes by itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..data import builtin
from .tokenizer import END, THINK, TURN_END, TURN_START, UNTHINK

PROMPT = 0.1
EMPTY_THOUGHT = f"{THINK}\n\n{UNTHINK}\n\n"

Part = tuple[str, float]  # a piece of a row and its loss weight
Row = tuple[Any, Any]  # int64 [length] token ids, float32 [length] loss weights (numpy)


def conversation(turns: Sequence[tuple[str, str]]) -> list[Part]:
    """Write questions and completions as the chat template does, in pieces with their loss weights."""
    parts: list[Part] = []
    for question, completion in turns:
        parts.append((f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n", PROMPT))
        if completion.startswith(EMPTY_THOUGHT):
            parts.append((EMPTY_THOUGHT, 0.0))
            completion = completion.removeprefix(EMPTY_THOUGHT)
        parts += [(completion + TURN_END, 1.0), ("\n", PROMPT)]
    return parts


def addition_parts(rng: random.Random) -> list[Part]:
    """Draw one addition of the training split."""
    example = builtin.addition(rng, "train", rng.random() < 0.5)
    return conversation([(example.messages[0]["content"], example.completion)])


def recall_parts(rng: random.Random, most: int) -> list[Part]:
    """Draw one recall conversation of the training split with 2 to `most` pairs, usually `most`."""
    pairs = most if rng.random() < 0.7 else rng.randint(2, most)
    if rng.random() < 0.5:
        example = builtin.recall(rng, "train", rng.random() < 0.5, pairs)
        return conversation([(example.messages[0]["content"], example.completion)])
    table = builtin.recall_pairs(rng, "train", pairs)
    turns = []
    for key in rng.choices(list(table), k=rng.randint(1, pairs)):
        question = rng.choice(builtin.RECALL_QUESTIONS).format(key=key)
        turns.append((question, builtin.recall_reply(key, table[key], thinking=False)))
    turns[0] = (f"{builtin.recall_list(table)}\n{turns[0][0]}", turns[0][1])
    turns[-1] = (turns[-1][0], builtin.recall_reply(key, table[key], rng.random() < 0.5))
    return conversation(turns)


class Rows:
    """Makes rows; `core` is the tokenizer's backend, `corpus` the training text as int16 [tokens]."""

    def __init__(self, core: Any, corpus: Tensor) -> None:
        self.core, self.corpus = core, corpus

    @cached_property
    def size(self) -> int:
        """The size of the vocabulary."""
        return int(self.core.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text by itself, with no special token added."""
        return [encoding.ids for encoding in self.core.encode_batch(list(texts), add_special_tokens=False)]

    def chats(self, rng: random.Random, length: int, pairs: int | None) -> Row:
        """Pack conversations: additions when `pairs` is None, else recall with that many pairs at most."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            parts = addition_parts(rng) if pairs is None else recall_parts(rng, pairs)
            for encoded, (_, weight) in zip(self.encode([text for text, _ in parts]), parts, strict=True):
                ids += encoded
                weights += [weight] * len(encoded)
        return np.array(ids[:length], np.int64), np.array(weights[:length], np.float32)

    def copy(self, rng: random.Random, length: int) -> Row:
        """Repeat a random sequence; only the repetition counts."""
        period = rng.randint(length // 8, length // 2)
        pattern = _numpy(rng).integers(0, self.size, period, dtype=np.int64)
        return np.resize(pattern, length), (np.arange(length) >= period).astype(np.float32)

    def lines(self, rng: random.Random, length: int, most: int) -> Row:
        """List 2 to `most` recall lines, then repeat any of them; only repeated values count fully.

        Lines are drawn with replacement: in a permutation, "not the value just used" would be a shortcut.
        """
        table = builtin.recall_pairs(rng, "train", rng.randint(2, most))
        encoded = self.encode(
            [piece for key, value in table.items() for piece in (f"- {key}", f"={value}\n")]
        )
        lines = list(zip(encoded[::2], encoded[1::2], strict=True))
        ids = [token for head, value in lines for token in head + value]
        weights = [PROMPT] * len(ids)
        while len(ids) < length:
            head, (equals, *digits, end) = rng.choice(lines)
            ids += [*head, equals, *digits, end]
            weights += [*[PROMPT] * (len(head) + 1), *[1.0] * len(digits), PROMPT]
        return np.array(ids[:length], np.int64), np.array(weights[:length], np.float32)

    def text(self, rng: random.Random, length: int) -> Row:
        """Cut a window out of the corpus."""
        start = rng.randrange(len(self.corpus) - length)
        return self.corpus[start : start + length].numpy().astype(np.int64), np.ones(length, np.float32)

    def corrupted(self, rng: random.Random, tokens: Any, share: float) -> Any:
        """Return the tokens with that share of them replaced by random ones."""
        draw = _numpy(rng)
        noise = draw.integers(0, self.size, tokens.shape, dtype=np.int64)
        return np.where(draw.random(tokens.shape) < share, noise, tokens)


def _numpy(rng: random.Random) -> Any:
    return np.random.default_rng(rng.getrandbits(64))


def encode_corpus(core: Any, documents: Sequence[str]) -> Any:
    """Encode documents to one int16 array of token ids, each document followed by ``END``."""
    end = core.token_to_id(END)
    encoded = core.encode_batch(list(documents), add_special_tokens=False)
    return np.concatenate([np.array([*one.ids, end], np.int16) for one in encoded])
