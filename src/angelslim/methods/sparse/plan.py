"""What a selector is told, and the rules that every plan keeps.

A selector is a pure function ``(q, k, v, context) -> BlockPlan``: queries [B, H, Lq, D], keys [B, Hkv, Lk, D] and
values [B, Hkv, Lk, Dv] with positions and normalisation already applied, keys and values not repeated. It scores blocks
in its own way, makes a bool mask [B, H, nQ, nK] and hands it to `finish`, which enforces what all methods share:

* causality on blocks, bottom-right aligned: query t stands at position ``q_offset + t``;
* each row keeps its diagonal, the blocks that hold its own positions;
* each row keeps the sink: the block with the first real key;
* blocks of padding are dropped, and no row is empty.

`BlockPlan` lives with the kernels that read it (`kernels.attention.blocks`) and is offered here for selectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ...kernels.attention.blocks import BlockPlan, causal_area, causal_blocks, diagonal

T = TypeVar("T")
__all__ = ["BlockPlan", "Context", "Selector", "causal_area", "causal_blocks", "diagonal", "finish"]


@dataclass(frozen=True)
class Context:
    """Where a selector is: the layer, the scale of the scores, and how these queries lie in the prompt.

    `prompt_len` is the number of tokens of the whole prompt as far as it is known, which budgets are tied to;
    `kv_len` the number of keys of this call, equal to it unless given. `kv_start` and `kv_stop` are int64 [B]: the
    first real key of each batch row and the one after its last, for padding; None means that nothing is padded. `part` is
    set where a selector is asked about some query heads of a layer only: which ones, and how many the layer has.
    """

    layer: int
    layers: int
    scaling: float
    q_offset: int
    prompt_len: int
    block: int
    kv_start: Tensor | None = None
    kv_stop: Tensor | None = None
    kv_len: int | None = None
    part: tuple[tuple[int, ...], int] | None = None

    def of_layer(self, heads: int) -> int:
        """How many query heads the layer has, for a call with `heads` of them."""
        return heads if self.part is None else self.part[1]

    def own(self, values: Sequence[T]) -> tuple[T, ...]:
        """Of one value a query head of the layer, those of this call's heads."""
        return tuple(values) if self.part is None else tuple(values[head] for head in self.part[0])

    @property
    def keys(self) -> int:
        """The number of keys of this call."""
        return self.prompt_len if self.kv_len is None else self.kv_len

    @property
    def queries(self) -> int:
        """The number of queries of this call."""
        return self.keys - self.q_offset


class Selector(Protocol):
    """Chooses the blocks of one call of one layer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context, /) -> BlockPlan:
        """Return the plan for q [B, H, Lq, D], k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv]."""


def finish(mask: Tensor, ctx: Context) -> BlockPlan:
    """Make the plan of a bool mask [B, H, nQ, nK], after the rules that all methods share; the mask is not changed."""
    size = (ctx.block, ctx.block, ctx.q_offset, ctx.keys)
    first, last = diagonal(*size, device=mask.device)
    columns = torch.arange(mask.shape[-1], device=mask.device)
    if ctx.kv_start is None:
        mask = mask | (columns == 0)
    else:
        sink = (ctx.kv_start.to(mask.device) // ctx.block)[:, None, None, None]
        mask = (mask & (columns >= sink)) | (columns == sink)
    if ctx.kv_stop is not None:
        mask = mask & (columns * ctx.block < ctx.kv_stop.to(mask.device)[:, None, None, None])
    own = (columns >= first[:, None]) & (
        columns <= last[:, None]
    )  # also where it is padding: no row is empty
    mask = (mask & (columns <= last[:, None])) | own
    return BlockPlan.from_mask(
        mask, block_q=ctx.block, block_k=ctx.block, q_offset=ctx.q_offset, kv_len=ctx.keys
    )
