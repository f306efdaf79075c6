"""`BlockPlan`: which blocks of keys each block of queries reads.

Queries are cut into blocks of `block_q` tokens and keys into blocks of `block_k`. Row i of the plan lists, for one
batch row and one query head, the key blocks that query block i reads. Queries are the *last* tokens of the keys
(bottom-right aligned): query t stands at position ``q_offset + t`` and may read key j iff ``j <= q_offset + t``, so
``q_len = kv_len - q_offset`` always. ``q_offset`` is 0 for a prompt read at once, and the number of cached tokens when
a prompt is read in chunks.

The blocks that hold a query's own position are the *diagonal*: one per row, or two where `q_offset` is no multiple of
the block. They are the only blocks that need a mask; every listed block before them is read whole. Heads are query
heads; kernels find the key-value head of a group themselves, so keys and values are never repeated.

Shapes: B batch rows, H query heads, nQ query blocks, nK key blocks, Kmax the longest list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class BlockPlan:
    """Lists of key blocks: `num` int32 [B, H, nQ] says how many, `idx` int32 [B, H, nQ, Kmax] which, ascending.

    Entries of `idx` beyond `num` are 0. B or H may be 1 when all rows or heads share one list.
    """

    block_q: int
    block_k: int
    num: Tensor
    idx: Tensor
    q_offset: int
    kv_len: int

    @property
    def q_len(self) -> int:
        """The number of queries."""
        return self.kv_len - self.q_offset

    @property
    def rows(self) -> int:
        """The number of query blocks, nQ."""
        return -(-self.q_len // self.block_q)

    @property
    def columns(self) -> int:
        """The number of key blocks, nK."""
        return -(-self.kv_len // self.block_k)

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_q: int, block_k: int, q_offset: int, kv_len: int) -> BlockPlan:
        """Make the lists from a bool mask [B, H, nQ, nK]; on a GPU this waits once, for the longest list's length."""
        assert mask.dtype == torch.bool and mask.dim() == 4, (mask.dtype, mask.shape)
        place = mask.cumsum(-1, dtype=torch.int32)
        num = place[..., -1].contiguous()
        longest = max(int(num.max()), 1)
        place = torch.where(mask, place - 1, longest).long()  # what is not kept lands in one spare column
        columns = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand_as(place)
        idx = torch.zeros(*num.shape, longest + 1, dtype=torch.int32, device=mask.device)
        idx = idx.scatter_(-1, place, columns)[..., :longest].contiguous()
        plan = cls(block_q, block_k, num, idx, q_offset, kv_len)
        assert mask.shape[2:] == (plan.rows, plan.columns), (mask.shape, plan.rows, plan.columns)
        return plan

    @classmethod
    def full(
        cls, *, block_q: int, block_k: int, q_offset: int, kv_len: int, device: torch.device | str = "cpu"
    ) -> BlockPlan:
        """Every block that causality allows, one list for all rows and heads: dense attention as a plan."""
        mask = causal_blocks(block_q, block_k, q_offset, kv_len, device=device)[None, None]
        return cls.from_mask(mask, block_q=block_q, block_k=block_k, q_offset=q_offset, kv_len=kv_len)

    def to_mask(self) -> Tensor:
        """The lists as a bool mask [B, H, nQ, nK]."""
        listed = torch.arange(self.idx.shape[-1], device=self.idx.device) < self.num[..., None]
        mask = torch.zeros(*self.num.shape, self.columns + 1, dtype=torch.bool, device=self.idx.device)
        place = torch.where(listed, self.idx.long(), self.columns)
        return mask.scatter_(-1, place, True)[..., : self.columns].contiguous()

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """The first and the last diagonal key block of each query block, two int64 [nQ]."""
        return diagonal(self.block_q, self.block_k, self.q_offset, self.kv_len, device=self.num.device)

    def density(self) -> float:
        """The pairs (query, key) that are read over the pairs that causality allows, counted token by token."""
        return float(self.kept().mean())

    def kept(self) -> Tensor:
        """The density of each batch row and head, float64 [B, H]; on a GPU nothing waits for it."""
        area = causal_area(self.block_q, self.block_k, self.q_offset, self.kv_len, device=self.num.device)
        total = area.sum()
        listed = torch.arange(self.idx.shape[-1], device=self.idx.device) < self.num[..., None]
        rows = torch.arange(self.rows, device=self.idx.device)[:, None]
        return torch.where(listed, area[rows, self.idx.long()], 0).sum((-1, -2)) / total.double()

    def to_block_mask(self, kv_start: Tensor | None = None, kv_stop: Tensor | None = None) -> BlockMask:
        """The plan for FlexAttention: listed blocks before the diagonal are full, diagonal blocks are masked.

        `kv_start` and `kv_stop` (int64 [B]) bound each batch row's real keys; with them every listed block is masked.
        """
        from torch.nn.attention.flex_attention import BlockMask

        q_offset = self.q_offset
        start = None if kv_start is None else kv_start.to(self.num.device).clone()
        stop = None if kv_stop is None else kv_stop.to(self.num.device).clone()

        def allowed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            keep = kv <= q + q_offset
            if start is not None:
                keep = keep & (kv >= start[b])
            if stop is not None:
                keep = keep & (kv < stop[b])
            return keep

        listed = torch.arange(self.idx.shape[-1], device=self.idx.device) < self.num[..., None]
        first, _ = self.diagonal()
        partial = listed if start is not None or stop is not None else listed & (self.idx >= first[:, None])
        count = partial.sum(-1, dtype=torch.int32)
        # Lists ascend, so the diagonal ends each of them; FlexAttention wants both kinds from the front, and room
        # for every column.
        whole = self.num - count
        room = self.columns - self.idx.shape[-1]
        ends = whole[..., None] + torch.arange(int(count.max()), device=count.device)
        masked = self.idx.gather(-1, ends.clamp_max(self.idx.shape[-1] - 1).long())
        return BlockMask.from_kv_blocks(
            count,
            pad(masked, (0, self.columns - masked.shape[-1])),
            whole,
            pad(self.idx, (0, room)),
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=allowed,
            seq_lengths=(self.q_len, self.kv_len),
            compute_q_blocks=False,
        )


def diagonal(
    block_q: int, block_k: int, q_offset: int, kv_len: int, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The first and the last key block that holds a position of each query block, two int64 [nQ]."""
    starts = torch.arange(0, kv_len - q_offset, block_q, device=device)
    ends = (starts + block_q).clamp_max(kv_len - q_offset) - 1
    return (starts + q_offset) // block_k, (ends + q_offset) // block_k


def causal_blocks(
    block_q: int, block_k: int, q_offset: int, kv_len: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Which blocks hold at least one allowed pair, bool [nQ, nK]."""
    _, last = diagonal(block_q, block_k, q_offset, kv_len, device=device)
    return torch.arange(-(-kv_len // block_k), device=device) <= last[:, None]


def causal_area(
    block_q: int, block_k: int, q_offset: int, kv_len: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """How many pairs (query, key) causality allows in each block, int64 [nQ, nK].

    The pairs of queries below t and keys below s, both counted from the start, have a closed form; a block is the
    difference of four of them.
    """
    queries = torch.arange(0, kv_len - q_offset + block_q, block_q, device=device).clamp_max(
        kv_len - q_offset
    )
    keys = torch.arange(0, kv_len + block_k, block_k, device=device).clamp_max(kv_len)
    t, s = queries[:, None], keys[None, :]
    # Query u reads min(s, q_offset + u + 1) of the first s keys; the sum over u < t, split where s is reached.
    rising = torch.minimum(t, (s - q_offset - 1).clamp_min(0))
    below = rising * (q_offset + 1) + rising * (rising - 1) // 2 + (t - rising) * s
    below = below[: -(-(kv_len - q_offset) // block_q) + 1, : -(-kv_len // block_k) + 1]
    return below[1:, 1:] - below[:-1, 1:] - below[1:, :-1] + below[:-1, :-1]
