"""What the tiny language model reads at each step: batches as a pure function of the batch's index.

A row holds one kind of data, packed to a fixed length:

- *text*: a window of the standard library's sources;
- *addition*: conversations of one addition each, with and without thinking;
- *recall*: a list of key-value pairs and one question, or a question for several of them in turn;
- *copy*: random tokens, repeated. Copying needs the same two-step attention ("induction heads",
  arXiv 2209.11895) as recall and is learnt within a few hundred steps, while recall alone stays for
  thousands of steps on the plateau of guessing any of the values. So training starts with much copying and
  two pairs, and the number of pairs grows to eight.

Loss weights: 1 on text and on the assistant's words, `PROMPT` on the words of users, 0 on the empty thought
that the chat template writes by itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import builtin
from .tokenizer import END, THINK, TURN_END, TURN_START, UNTHINK

PROMPT = 0.1  # loss weight of words that the model reads and never has to write
EMPTY_THOUGHT = f"{THINK}\n\n{UNTHINK}\n\n"
WARM_UP = 0.05  # share of the run with much copying
LADDER = ((0.10, 2), (0.20, 4), (0.30, 6), (1.0, builtin.PAIRS))  # until this share of the run: pairs at most

Part = tuple[str, float]  # a piece of a row and its loss weight
Encoded = tuple[list[int], float]


@dataclass(frozen=True)
class Shares:
    """Shares of the rows of a batch, by kind of data; text gets the rest."""

    addition: float
    recall: float
    copy: float


def shares_at(progress: float) -> Shares:
    """Return the mixture at a point of the run, from 0 to 1."""
    return Shares(0.15, 0.35, 0.4) if progress < WARM_UP else Shares(0.35, 0.4, 0.05)


def pairs_at(progress: float) -> int:
    """Return the most pairs that a recall list has at a point of the run, from 0 to 1."""
    return next(pairs for until, pairs in LADDER if progress <= until)


def conversation(turns: Sequence[tuple[str, str]]) -> list[Part]:
    """Write questions and completions as the chat template does, in pieces with their loss weights."""
    parts: list[Part] = []
    for question, completion in turns:
        head = f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
        parts.append((head, PROMPT))
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
    for key in rng.sample(list(table), rng.randint(1, pairs)):
        question = rng.choice(builtin.RECALL_QUESTIONS).format(key=key)
        turns.append((question, builtin.recall_reply(key, table[key], thinking=False)))
    turns[0] = (f"{builtin.recall_list(table)}\n{turns[0][0]}", turns[0][1])
    turns[-1] = (turns[-1][0], builtin.recall_reply(key, table[key], rng.random() < 0.5))
    return conversation(turns)


@dataclass(frozen=True)
class Curriculum:
    """Makes the batches of a run: ``curriculum(index)`` is batch `index`, always the same.

    `core` is the tokenizer's backend; `corpus` the training text as token ids, documents joined by ``END``.
    Every `long_every`-th batch has rows of four times the length, so that the whole context is trained.
    """

    core: Any
    corpus: Tensor  # int16 [tokens]
    batches: int  # in the whole run
    rows: int
    length: int
    seed: int
    long_every: int = 16

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return ``tokens`` [rows, length] int64 and ``weights`` [rows, length] float32 of one batch."""
        rng = random.Random(f"tiny-lm/{self.seed}/{index}")  # noqa: S311  not for secrets
        long = index % self.long_every == self.long_every - 1
        rows, length = (self.rows // 4, self.length * 4) if long else (self.rows, self.length)
        progress = index / self.batches
        shares = shares_at(progress)
        counts = [round(share * rows) for share in (shares.addition, shares.recall, shares.copy)]
        made = [self._packed(rng, length, None) for _ in range(counts[0])]
        made += [self._packed(rng, length, pairs_at(progress)) for _ in range(counts[1])]
        made += [self._copied(rng, length) for _ in range(counts[2])]
        made += [self._text(rng, length) for _ in range(rows - sum(counts))]
        tokens, weights = zip(*made, strict=True)
        return {
            "tokens": torch.from_numpy(np.stack(tokens)),
            "weights": torch.from_numpy(np.stack(weights)),
        }

    def _packed(self, rng: random.Random, length: int, pairs: int | None) -> tuple[Any, Any]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            parts = addition_parts(rng) if pairs is None else recall_parts(rng, pairs)
            for encoding, (_, weight) in zip(self._encode([text for text, _ in parts]), parts, strict=True):
                ids += encoding
                weights += [weight] * len(encoding)
        return np.array(ids[:length], np.int64), np.array(weights[:length], np.float32)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.core.encode_batch(texts, add_special_tokens=False)]

    def _copied(self, rng: random.Random, length: int) -> tuple[Any, Any]:
        period = rng.randint(length // 8, length // 2)
        draw = np.random.default_rng(rng.getrandbits(64))
        pattern = draw.integers(0, self.core.get_vocab_size(), period)
        tokens = np.resize(pattern, length).astype(np.int64)
        return tokens, (np.arange(length) >= period).astype(np.float32)

    def _text(self, rng: random.Random, length: int) -> tuple[Any, Any]:
        start = rng.randrange(len(self.corpus) - length)
        return self.corpus[start : start + length].numpy().astype(np.int64), np.ones(length, np.float32)


def encode_corpus(core: Any, documents: Sequence[str]) -> Tensor:
    """Encode documents to one int16 tensor of token ids, each followed by ``END``."""
    end = core.token_to_id(END)
    encoded = core.encode_batch(list(documents), add_special_tokens=False)
    return torch.tensor([token for one in encoded for token in (*one.ids, end)], dtype=torch.int16)


def weighted_loss(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weighted mean cross-entropy of the next token, in nats."""
    tokens, weights = batch["tokens"], batch["weights"][:, 1:]
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return {"loss": (each * weights.flatten()).sum() / weights.sum()}
