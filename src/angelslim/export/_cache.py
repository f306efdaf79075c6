"""What a ``quantization_config`` says about the key-value cache: the entry ``kv_cache_scheme``.

Beside it, a checkpoint holds one float32 tensor for each attention and role: ``self_attn.k_scale`` and ``v_scale``,
``[1]`` for one scale a tensor or ``[heads, 1, 1]`` for one a head, and ``q_scale`` for engines whose attention
kernels take quantized queries as well. Engines quantize with them as they fill the cache; a scale that is missing
counts as 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..numerics.scheme import FORMATS, PER_HEAD, PER_TENSOR, Granularity, Quant

STRATEGIES: dict[str, Granularity] = {"tensor": PER_TENSOR, "attn_head": PER_HEAD}


def refuses_cache(kv: Quant | None) -> str:
    """Return why engines could not keep such a cache, or an empty string."""
    if kv is None:
        return ""
    if (
        kv.format.name != "fp8_e4m3"
        or kv.dynamic
        or not kv.symmetric
        or kv.granularity not in STRATEGIES.values()
    ):
        return "key-value caches are static FP8 E4M3, per tensor or per head"
    return ""


def cache_arguments(kv: Quant) -> dict[str, Any]:
    """Return the fields of ``kv_cache_scheme``; engines insist on `symmetric` being there."""
    strategy = next(name for name, granularity in STRATEGIES.items() if granularity == kv.granularity)
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": strategy,
        "dynamic": False,
    }


def cache_quant(settings: Mapping[str, Any]) -> Quant | None:
    """Read ``kv_cache_scheme`` back; None when the cache keeps the model's type or its scales are not stored."""
    given = settings.get("kv_cache_scheme")
    if not given or given.get("dynamic") or given.get("type") != "float" or given.get("num_bits") != 8:
        return None
    granularity = STRATEGIES.get(str(given.get("strategy")))
    return None if granularity is None else Quant(FORMATS["fp8_e4m3"], granularity)
