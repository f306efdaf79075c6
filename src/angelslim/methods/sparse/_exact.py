"""The dense attention that the hook falls back to: what the model would have computed without it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ._masks import pairs

# Arguments that SDPA does not know; a model's own eager function does.
EAGER_ONLY = ("softcap", "s_aux", "position_bias")


def exact(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    arguments: dict[str, Any],
) -> Tensor:
    """Return [B, Lq, H, Dv] for q [B, H, Lq, D], k and v [B, Hkv, Lk, .]; `mask` is None, [B, Lk] or [B, 1, Lq, Lk]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if causal and (mask is None or mask.dim() == 2):
        mask = pairs(mask, q.shape[2], k.shape[2], arguments.get("sliding_window"), q.device)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
    used = {name: arguments[name] for name in EAGER_ONLY if arguments.get(name) is not None}
    common = {"scaling": arguments.get("scaling"), "dropout": arguments.get("dropout", 0.0)}
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if used and eager is not None:
        if mask is None and causal and q.shape[2] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        out: Tensor = eager(module, q, k, v, mask, **common, **used)[0]
        return out
    flag = causal and mask is None and q.shape[2] > 1
    out = sdpa_attention_forward(module, q, k, v, mask, is_causal=flag, **common, **used)[0]
    return out
