"""What a kernel is: a function of queries, keys, values and a plan, and a reason why it cannot run something.

Every kernel computes, for each query of each head, ``softmax(scaling * q k^T) v`` over exactly the keys that the
plan lists and causality allows, inside ``[kv_start, kv_stop)`` of its batch row. A query that may read nothing (it is
padding) returns zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .blocks import BlockPlan


@dataclass(frozen=True)
class Case:
    """What is to be computed, as far as a kernel's ability depends on it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    block_q: int
    block_k: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, block: int) -> Case:
        """The case of these tensors with square blocks."""
        return cls(q.device, q.dtype, q.shape[-1], v.shape[-1], block, block)


class Run(Protocol):
    """The kernel itself."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        *,
        scaling: float,
        kv_start: Tensor | None = None,
        kv_stop: Tensor | None = None,
    ) -> Tensor:
        """From q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv] to [B, H, Lq, Dv] in the dtype of q."""


@dataclass(frozen=True)
class Kernel:
    """A named kernel; `refuses` says why it cannot compute a case, or returns an empty string."""

    name: str
    run: Run
    refuses: Callable[[Case], str]


def check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    """Shapes that only a programmer can get wrong."""
    assert q.shape[1] % k.shape[1] == 0 and k.shape[:3] == v.shape[:3], (q.shape, k.shape, v.shape)
    assert (q.shape[2], k.shape[2]) == (plan.q_len, plan.kv_len), (q.shape, k.shape, plan.q_len, plan.kv_len)
    assert plan.num.shape[0] in (1, q.shape[0]) and plan.num.shape[1] in (1, q.shape[1]), plan.num.shape
