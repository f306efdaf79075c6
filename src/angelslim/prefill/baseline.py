"""The dense prefill to beat: the fastest causal attention that runs in this process.

On a GPU PyTorch has several; which is fastest differs from device to device (cuDNN's is far ahead of flash on Hopper, where
grouped heads reach it only with repeated keys). Each is tried on the prompt and the fastest is the baseline. On a CPU
there is one. A baseline that computes twice the work, without causality, would flatter every sparse method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods.sparse.attach import tower_of

REPEATED = "angelslim_repeated"  # attention with repeated keys, for a batch without padding


@dataclass(frozen=True)
class Dense:
    """One way to compute dense attention: transformers' name of it, and the backend of SDPA, if one is fixed."""

    attention: str
    backend: str = ""

    def __str__(self) -> str:
        keys = " with repeated keys" if self.attention == REPEATED else ""
        return f"{self.backend or 'PyTorch'} SDPA{keys}".replace("_ATTENTION", "").replace(
            "PyTorch SDPA", "causal SDPA"
        )

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Give the model's text tower this attention inside the ``with``."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        tower = tower_of(model)
        before = tower.config._attn_implementation
        tower.set_attn_implementation(self.attention)
        try:
            with sdpa_kernel(getattr(SDPBackend, self.backend)) if self.backend else nullcontext():
                yield
        finally:
            tower.set_attn_implementation(before)


def candidates(model: Any, device: torch.device) -> list[Dense]:
    """What may be the fastest here, the stock one first."""
    stock = Dense("sdpa")
    if device.type != "cuda":
        return [stock]
    found = [stock, Dense("sdpa", "CUDNN_ATTENTION"), Dense("sdpa", "FLASH_ATTENTION")]
    config = tower_of(model).config
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
    special = [getattr(config, name, None) for name in ("sliding_window", "attn_logit_softcapping")]
    if full and not any(special):  # the simple function below knows causality alone
        from transformers import AttentionInterface

        AttentionInterface.register(REPEATED, _repeated)
        found.append(Dense(REPEATED, "CUDNN_ATTENTION"))
    return found


def _repeated(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=more["scaling"])
    return out.transpose(1, 2).contiguous(), None
