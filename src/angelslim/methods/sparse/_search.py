"""MInference's offline search: which pattern fits each head, from the attention of one long sample (arXiv 2407.02490).

For every candidate the tokens it would read are marked in the head's whole attention map; its score is the mass it keeps,
averaged over the rows from `first_row` on. The best candidate wins, and as in the public files the winner is then written
as what runs: a stream_llm head as vertical_and_slash (100, 800), a block_sparse one as vertical_and_slash (1000, 6096).

The sample should ask for something far away; MInference uses key-value retrieval over 30,000 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._patterns import HeadPattern
from ._scores import split

CANDIDATES = (
    HeadPattern("stream_llm", 100, 800),
    HeadPattern("vertical_and_slash", 30, 800),
    HeadPattern("vertical_and_slash", 100, 750),
    HeadPattern("vertical_and_slash", 500, 700),
    HeadPattern("vertical_and_slash", 3500, 100),
    HeadPattern("block_sparse", 8, 0),  # an eighth of each row's blocks
)
WRITTEN_AS = {
    "stream_llm": HeadPattern("vertical_and_slash", 100, 800),
    "block_sparse": HeadPattern("vertical_and_slash", 1000, 6096),
}
POOL, LAST, FIRST_COLUMNS, NEAR = 32, 64, 30, 100


def search_heads(
    q: Tensor,
    k: Tensor,
    scaling: float,
    candidates: tuple[HeadPattern, ...] = CANDIDATES,
    first_row: int = 2500,
    rewrite: bool = True,
) -> tuple[HeadPattern, ...]:
    """The best pattern of each head of one layer, with its score, for q [H, L, D] and k [Hkv, L, D] of one sample.

    Memory is one head's map at a time. Where the prompt is shorter than twice `first_row`, its second half is scored.
    """
    found, group = [], q.shape[0] // k.shape[0]
    for head in range(q.shape[0]):
        one_q, one_k = q[head].float(), k[head // group].float()
        length = one_q.shape[0]
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        attention = torch.softmax((one_q @ one_k.T * scaling).masked_fill(~causal, -torch.inf), -1)
        cut = length - length % POOL
        pooled = [split(x[:cut], 0, POOL).mean(1) for x in (one_q, one_k)]
        best = search_map(attention, pooled[0] @ pooled[1].T, candidates, first_row)
        found.append(WRITTEN_AS.get(best.kind, best)._replace(score=best.score) if rewrite else best)
    return tuple(found)


def search_map(
    attention: Tensor,
    pooled: Tensor,
    candidates: tuple[HeadPattern, ...] = CANDIDATES,
    first_row: int = 2500,
) -> HeadPattern:
    """The candidate that keeps most of one head's attention map [L, L]; `pooled` [L // 32, L // 32] scores its blocks."""
    rows = slice(min(first_row, attention.shape[0] // 2), None)
    scored = [
        pattern._replace(
            score=float((attention * pattern_mask(pattern, attention, pooled))[rows].sum(-1).mean())
        )
        for pattern in candidates
    ]
    return max(scored, key=lambda pattern: pattern.score)


def pattern_mask(pattern: HeadPattern, attention: Tensor, pooled: Tensor) -> Tensor:
    """The tokens that a pattern reads of one head's map, bool [L, L]."""
    length = attention.shape[0]
    place = torch.arange(length, device=attention.device)
    apart = place[:, None] - place
    causal = apart >= 0
    if pattern.kind == "stream_llm":
        return causal & ((place < pattern.first) | (apart < pattern.second))
    if pattern.kind == "block_sparse":
        count = max(pooled.shape[0] // pattern.first, 1)
        blocks = torch.ones_like(pooled, dtype=torch.bool).tril()
        best = pooled.masked_fill(~blocks, -torch.inf).topk(count, -1).indices
        kept = torch.zeros_like(blocks).scatter_(-1, best, True) | torch.eye(
            len(blocks), dtype=torch.bool, device=blocks.device
        )
        wide = torch.ones_like(causal)  # rows beyond the last whole block are read whole
        cut = kept.repeat_interleave(POOL, 0).repeat_interleave(POOL, 1)
        wide[: cut.shape[0], : cut.shape[1]] = cut
        return causal & wide
    last = attention[-LAST:]
    columns = last.sum(0)
    columns[:FIRST_COLUMNS] = torch.inf
    sums = torch.zeros(length, dtype=last.dtype, device=last.device)
    sums.index_add_(0, apart[-LAST:].clamp_min(0).flatten(), last.flatten())
    sums[:NEAR] = torch.inf
    vertical, slash = torch.zeros(length, dtype=torch.bool), torch.zeros(length, dtype=torch.bool)
    vertical, slash = vertical.to(last.device), slash.to(last.device)
    vertical[columns.topk(min(pattern.first, length)).indices] = True
    slash[sums.topk(min(pattern.second, length)).indices] = True
    return causal & (vertical | slash[apart.clamp_min(0)])
