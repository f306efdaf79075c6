"""How a model's mask reaches the hook: as None, as real tokens of each row, or whole.

transformers asks one mask function per attention implementation. Ours keeps a plain causal mask implicit: None without
padding, the bool [B, Lk] of real tokens with it. Models that pick their own keys get the mask whole. Everything that is not plain causality (windows, images that see
all of themselves, packed sequences, a static cache with room behind the last token) becomes a bool
[B, 1, Lq, Lk], which the hook takes as a reason to stay dense and exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> Tensor | None:
    """The signature of transformers' mask interface; see the module's docstring for what is returned."""
    from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask

    window = more.get("local_size")
    picks = "indexed_attention" in (getattr(more.get("config"), "layer_types", None) or ())
    plain = mask_function in (None, causal_mask_function) and not picks  # an indexer reads the whole mask
    if window is not None and kv_offset + kv_length <= window and more.get("allow_is_causal_skip", True):
        plain = True  # nothing lies outside the window yet
    if plain and int(q_offset) + q_length == kv_offset + kv_length:
        found: Tensor | None = flash_attention_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask
        )
        if found is None or found.shape[1] == kv_length:
            return found
    more["allow_is_causal_skip"] = False
    whole: Tensor = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function or causal_mask_function,
        attention_mask=attention_mask,
        **more,
    )
    return whole


def spans(real: Tensor) -> list[tuple[int, int]] | None:
    """The first real token of each row and the one after its last, from bool [B, Lk]; None if a row has holes."""
    real = real.bool()
    length = real.shape[1]
    first = torch.where(real.any(1), real.int().argmax(1), 0)
    last = torch.where(real.any(1), length - real.flip(1).int().argmax(1), 0)
    rows: list[list[int]] = torch.stack([first, last, real.sum(1)], 1).tolist()
    if any(stop - start != count for start, stop, count in rows):
        return None
    return [(start, stop) for start, stop, _ in rows]


def pairs(
    real: Tensor | None, q_len: int, kv_len: int, window: int | None, device: torch.device
) -> Tensor | None:
    """The allowed pairs as bool [B or 1, 1, Lq, Lk], or None if SDPA's own causal flag (or no mask) says the same."""
    if real is None and q_len in (1, kv_len) and (window is None or kv_len <= window):
        return None
    queries = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    keys = torch.arange(kv_len, device=device)
    allowed = (keys <= queries)[None, None]
    if window is not None:
        allowed = allowed & (keys > queries - window)
    if real is not None:
        allowed = allowed & real.bool()[:, None, None, :]
        # Padding before the first token reads its own key: what it computes is never used, but must be a number.
        allowed = allowed | (~allowed.any(-1, keepdim=True) & (keys == queries))
    return allowed
