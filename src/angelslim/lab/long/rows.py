"""The rows that `tiny-long` reads, drawn as whole tensors on the device.

A row of T tokens is text with statements written over it at random places, and often questions at its end. Each
function returns tokens int64 [R, T] and weights float32 [R, T]: 1 where an answer is to be predicted, `TEXT` where the
text goes on, 0 where nothing can be known. Everything follows from the generator's state and the arguments, so a batch is
a pure function of its number (on one kind of device).

Every kind asks for something that some sparse pattern loses: facts far back, questions in the middle of the text (which
estimates from the last rows do not know of), short needles, links to follow, words to count over the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...data.statements import COMMON, END, LINK, LIST, RECALL, REMEMBER, TRACE
from .tokens import Tokens

TEXT = 0.05  # the weight of a word of text beside an answer's
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Maker:
    """Draws rows: the ranges of the tokens, the text to write over (int [N], on the device), the random numbers."""

    tokens: Tokens
    corpus: Tensor
    generator: Generator

    @property
    def device(self) -> torch.device:
        """Where the rows are made."""
        return self.corpus.device

    def text(self, rows: int, length: int) -> Rows:
        """Text alone: pieces of the corpus."""
        begin = self._below(len(self.corpus) - length, rows, 1)
        tokens = self.corpus[begin + torch.arange(length, device=self.device)].long()
        return tokens, torch.full(tokens.shape, TEXT, device=self.device) * (tokens != 1)

    def repeats(self, rows: int, length: int, period: int) -> Rows:
        """Random tokens again and again: what teaches a model to look for the last time it saw this one."""
        size = self.tokens.size - self.tokens.first_key
        once = self._below(size, rows, period) + self.tokens.first_key
        tokens = once.repeat(1, -(-length // period))[:, :length]
        weights = (torch.arange(length, device=self.device) >= period + 1).float()
        return tokens, weights.expand(rows, -1).clone()

    def middle(self, rows: int, length: int, pairs: int, width: int) -> Rows:
        """`pairs` keys with `width` values each, every one asked for once, anywhere behind its fact."""
        keys, values = self._facts(rows, pairs, width)
        slots = self._order(rows, 2 * pairs).view(rows, pairs, 2).sort(-1).values
        facts, facts_w = self._statements(REMEMBER, keys, values, 0.0)
        asked, asked_w = self._statements(RECALL, keys, values, 1.0)
        both, both_w = torch.stack([facts, asked], 2), torch.stack([facts_w, asked_w], 2)
        where = slots.flatten(1).argsort(-1)  # slot -> statement
        return self._place(
            self._taken(both.flatten(1, 2), where), self._taken(both_w.flatten(1, 2), where), length
        )

    def ending(self, rows: int, length: int, pairs: int, width: int, asked: int) -> Rows:
        """`pairs` facts anywhere, then `asked` questions for some of them at the row's end."""
        keys, values = self._facts(rows, pairs, width)
        facts, weights = self._statements(REMEMBER, keys, values, 0.0)
        which = self._order(rows, pairs)[:, :asked]
        tail, tail_w = self._statements(RECALL, self._taken(keys, which), self._taken(values, which), 1.0)
        return self._place(facts, weights, length, tail.flatten(1), tail_w.flatten(1))

    def chains(self, rows: int, length: int, chains: int, hops: int) -> Rows:
        """`chains` values, each behind `hops` links; one chain is to be followed at the row's end."""
        keys = self._keys(rows, chains * (hops + 1)).view(rows, chains, hops + 1)
        values = self._values(rows, chains, 1)
        first, first_w = self._statements(REMEMBER, keys[..., 0], values, 0.0)
        links, links_w = self._statements(LINK, keys[..., 1:], keys[..., :-1, None], 0.0)
        statements = torch.cat([first[:, :, None], links], 2)  # [R, chains, hops + 1, 4]
        weights = torch.cat([first_w[:, :, None], links_w], 2)
        slots = self._order(rows, chains * (hops + 1)).view(rows, chains, hops + 1).sort(-1).values
        where = slots.flatten(1).argsort(-1)
        answer = torch.cat([keys[:, 0].flip(1)[:, 1:], values[:, 0]], 1)  # down the first chain
        tail, tail_w = self._statements(TRACE, keys[:, 0, -1:], answer[:, None], 1.0)
        placed = (self._taken(statements.flatten(1, 2), where), self._taken(weights.flatten(1, 2), where))
        return self._place(*placed, length, tail.flatten(1), tail_w.flatten(1))

    def common(self, rows: int, length: int, pool: int, often: int) -> Rows:
        """A list over the whole row in which one of `pool` words comes `often` times as often as each other."""
        words = self._keys(rows, pool)
        drawn = (self._below(pool - 1 + often, rows, length - 4) - (often - 1)).clamp_min(0)
        tail = torch.stack(
            [self._all(COMMON, rows), words[:, 0], self._all(END, rows)], 1
        )  # the word at 0 is the frequent one
        tokens = torch.cat([self._all(LIST, rows)[:, None], words.gather(1, drawn), tail], 1)
        weights = torch.zeros(tokens.shape, device=self.device)
        weights[:, -2] = 1.0
        return tokens, weights

    def _facts(self, rows: int, pairs: int, width: int) -> tuple[Tensor, Tensor]:
        return self._keys(rows, pairs), self._values(rows, pairs, width)

    def _keys(self, rows: int, count: int) -> Tensor:
        """Different keys in each row, [R, count]."""
        assert count <= self.tokens.keys, "a row has fewer keys than the language"
        return self._order(rows, self.tokens.keys)[:, :count] + self.tokens.first_key

    def _values(self, rows: int, count: int, width: int) -> Tensor:
        drawn = self._below(self.tokens.values, rows, count * width)
        return drawn.view(rows, count, width) + self.tokens.first_value

    def _statements(self, marker: str, keys: Tensor, rest: Tensor, weight: float) -> Rows:
        """``marker key rest END`` for keys [...] and rest [..., w]: tokens and weights [..., w + 3]."""
        edge = torch.full_like(keys[..., None], self.tokens.marker(marker))
        end = torch.full_like(edge, self.tokens.marker(END))
        tokens = torch.cat([edge, keys[..., None], rest, end], -1)
        weights = torch.zeros(tokens.shape, device=self.device)
        weights[..., 2:-1], weights[..., -1] = weight, TEXT
        return tokens, weights

    def _place(
        self,
        statements: Tensor,
        weights: Tensor,
        length: int,
        tail: Tensor | None = None,
        tail_weights: Tensor | None = None,
    ) -> Rows:
        """Write statements [R, S, w] in their order at random places over text, the tail [R, t] at the end."""
        rows, count, width = statements.shape
        room = length - (0 if tail is None else tail.shape[1])
        assert count * width <= room, f"{count} statements of {width} tokens do not fit in {room}"
        tokens, weight = self.text(rows, length)
        gaps = self._below(room - count * width + 1, rows, count).sort(-1).values
        begin = gaps + torch.arange(count, device=self.device) * width
        where = (begin[..., None] + torch.arange(width, device=self.device)).flatten(1)
        tokens.scatter_(1, where, statements.flatten(1))
        weight.scatter_(1, where, weights.flatten(1))
        if tail is not None and tail_weights is not None:
            tokens[:, room:], weight[:, room:] = tail, tail_weights
        return tokens, weight

    @staticmethod
    def _taken(x: Tensor, index: Tensor) -> Tensor:
        """Reorder x [R, S, ...] by index [R, n]."""
        shape = (*index.shape, *x.shape[2:])
        return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(shape))

    def _below(self, limit: int, rows: int, count: int) -> Tensor:
        return torch.randint(limit, (rows, count), generator=self.generator, device=self.device)

    def _order(self, rows: int, count: int) -> Tensor:
        """Random orders of 0 .. count - 1, [R, count]."""
        return torch.rand(rows, count, generator=self.generator, device=self.device).argsort(-1)

    def _all(self, marker: str, rows: int) -> Tensor:
        return torch.full((rows,), self.tokens.marker(marker), device=self.device)
