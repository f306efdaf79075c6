"""What a selector's module defines: ``SELECTOR``, a class that options make and that chooses blocks.

``SELECTORS.get("stem")({"alpha": 0.7}).select`` is a pure function ``(q, k, v, context) -> BlockPlan``. Every selector
has two budgets: its *native* one, the parameters of its paper, and the *iso-density* one, which the option `density`
turns on: the best blocks of each row by the method's own score, as many as the density allows (`_budget`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from ....base.registry import Registry
from ..plan import BlockPlan, Context


class SelectorClass(Protocol):
    """Chooses the blocks that one call of one layer reads."""

    reads: frozenset[str]

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Take the options from the recipe; wrong ones are a `ConfigError`."""

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Choose blocks for q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]; see `plan.Selector`."""


SELECTORS: Registry[type[SelectorClass]] = Registry(
    "selector", "angelslim.methods.sparse.selectors", "SELECTOR"
)
