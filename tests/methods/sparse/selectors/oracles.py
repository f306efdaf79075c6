"""What the tests of all selectors share: cases, and the common rules one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from angelslim.methods.sparse.plan import BlockPlan, Context
from angelslim.methods.sparse.selectors.base import SELECTORS


@dataclass(frozen=True)
class Case:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 128
    keys: int = 128
    block: int = 16
    start: tuple[int, ...] | None = None
    stop: tuple[int, ...] | None = None

    def context(self, layer: int = 2, **more: int) -> Context:
        return Context(
            layer=layer,
            layers=4,
            scaling=0.5,
            q_offset=self.keys - self.queries,
            prompt_len=more.get("prompt_len", self.keys),
            block=self.block,
            kv_start=None if self.start is None else torch.tensor(self.start),
            kv_stop=None if self.stop is None else torch.tensor(self.stop),
            kv_len=self.keys,
        )

    def tensors(self, seed: int = 0, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        return (
            torch.randn(self.batch, self.heads, self.queries, width),
            torch.randn(self.batch, self.kv_heads, self.keys, width),
            torch.randn(self.batch, self.kv_heads, self.keys, width),
        )

    def real(self, row: int) -> tuple[int, int]:
        """The first real key of a batch row and the one after the last."""
        return self.start[row] if self.start else 0, self.stop[row] if self.stop else self.keys


CASES = {
    "plain": Case(),
    "groups": Case(2, 4, 2, 100, 100),
    "chunk": Case(1, 4, 2, 64, 192),
    "chunk off the grid": Case(1, 2, 1, 37, 150),
    "padded left": Case(2, 4, 2, 120, 120, start=(0, 37)),
    "padded right": Case(2, 4, 2, 120, 120, stop=(120, 83)),
}


def heads_of(case: Case, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Every batch row and head by itself, in float64: row, head, q, k, v."""
    group = case.heads // case.kv_heads
    return [
        (b, h, q[b, h].double(), k[b, h // group].double(), v[b, h // group].double())
        for b in range(case.batch)
        for h in range(case.heads)
    ]


def rows_of(case: Case, row: int) -> list[int]:
    """The query blocks that hold a real query of a batch row; what a plan says of others does not matter."""
    begin, end = case.real(row)
    offset, b = case.keys - case.queries, case.block
    count = -(-case.queries // b)
    return [
        i
        for i in range(count)
        if any(begin <= offset + t < end for t in range(i * b, min((i + 1) * b, case.queries)))
    ]


def own(case: Case, i: int) -> range:
    """The diagonal blocks of a query block."""
    offset, b = case.keys - case.queries, case.block
    return range((offset + i * b) // b, (offset + min((i + 1) * b, case.queries) - 1) // b + 1)


def allowed(case: Case, row: int, i: int, j: int) -> bool:
    begin, end = case.real(row)
    return j <= own(case, i)[-1] and j * case.block < end and (j + 1) * case.block > begin


def forced(case: Case, row: int, i: int, j: int) -> bool:
    return j in own(case, i) or j == case.real(row)[0] // case.block


def check(plan: BlockPlan, case: Case, wanted: dict[tuple[int, int], set[tuple[int, int]]]) -> None:
    """The plan keeps the wanted blocks of each (row, head), after the common rules, and no others."""
    mask = plan.to_mask()
    assert mask.shape[:2] == (case.batch, case.heads)
    for (b, h), blocks in wanted.items():
        for i in rows_of(case, b):
            row = [j for j in range(mask.shape[-1]) if allowed(case, b, i, j) or j in own(case, i)]
            expected = [j for j in row if (i, j) in blocks or forced(case, b, i, j)]
            assert mask[b, h, i].nonzero().flatten().tolist() == expected, (b, h, i)


def blocks_of_tokens(case: Case, row: int, keep: Tensor) -> set[tuple[int, int]]:
    """The blocks in which a token mask [Lq, Lk] keeps a pair of a real query position's block and an allowed key."""
    found = set()
    offset = case.keys - case.queries
    for t, j in keep.nonzero().tolist():
        if j <= offset + t:
            found.add((t // case.block, j // case.block))
    return found


def check_rule(name: str, options: dict[str, Any], case: Case, rule: Callable[[int, int, int], bool]) -> None:
    """A static pattern keeps the blocks of a rule on (batch row, position of the query, position of the key)."""
    offset = case.keys - case.queries
    wanted = {}
    for b in range(case.batch):
        tokens = [[rule(b, offset + t, j) for j in range(case.keys)] for t in range(case.queries)]
        blocks = blocks_of_tokens(case, b, torch.tensor(tokens))
        wanted |= {(b, h): blocks for h in range(case.heads)}
    check(SELECTORS.get(name)(options).select(*case.tensors(), case.context()), case, wanted)


def attention(case: Case, row: int, q: Tensor, k: Tensor, scaling: float = 0.5) -> Tensor:
    """The attention map of one head [Lq, Lk]; zero in rows of padding."""
    offset, (begin, end) = case.keys - case.queries, case.real(row)
    scores = q @ k.T * scaling
    for t in range(case.queries):
        for j in range(case.keys):
            if j > offset + t or not begin <= j < end:
                scores[t, j] = -torch.inf
    return torch.softmax(scores, -1).nan_to_num(0.0)


def last_queries(case: Case, row: int, count: int) -> list[int]:
    """The numbers of the last real queries of a batch row."""
    _, end = case.real(row)
    offset = case.keys - case.queries
    return [t for t in range(case.queries) if end - count <= offset + t < end]


def fewest(mass: list[float], first: list[int], share: float, candidates: list[int]) -> set[int]:
    """The fewest candidates that hold `share` of the mass, `first` before all others."""
    order = [j for j in candidates if j in first]
    order += sorted((j for j in candidates if j not in first), key=lambda j: -mass[j])
    total, found, before = sum(mass[j] for j in candidates), set(first), 0.0
    for j in order:
        if before < share * total:
            found.add(j)
        before += mass[j]
    return found


def mean_of(x: Tensor, places: list[int]) -> Tensor:
    """The mean of some rows of x [L, D]; zero when there are none."""
    return x[places].mean(0) if places else torch.zeros_like(x[0])


def real_places(case: Case, row: int, begin: int, size: int, query: bool) -> list[int]:
    """The real tokens of a block of queries or keys, as indexes into q or k."""
    low, high = case.real(row)
    offset, count = (case.keys - case.queries, case.queries) if query else (0, case.keys)
    return [t for t in range(begin, min(begin + size, count)) if low <= offset + t < high]
