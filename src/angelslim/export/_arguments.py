"""The entries of compressed-tensors' ``config_groups``: what its config.json says of one tensor's numbers.

The fields and their order are those that the library writes; tests compare them with its own schema. They are
plain dictionaries here because importing the library imports transformers' modelling code, which takes longer than
rounding a small model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..numerics.scheme import (
    FORMATS,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    Granularity,
    Quant,
    ScaleKind,
    per_block,
    per_group,
)

SCALE_TYPES = {  # where the config has to say it
    "e8m0": "torch.uint8",
    "e4m3": "torch.float8_e4m3fn",
    "float16": "torch.float16",
    "bfloat16": "torch.bfloat16",
}
GRAINS: dict[str, Granularity] = {"tensor": PER_TENSOR, "channel": PER_CHANNEL, "token": PER_TOKEN}


def arguments(quant: Quant | None) -> dict[str, Any] | None:
    """Return the entry of one tensor's numbers; of full precision there is none."""
    if quant is None:
        return None
    grain = quant.granularity
    dynamic: bool | str = quant.dynamic
    if quant.scale == "e4m3" and quant.dynamic:
        dynamic = "local"
    found: dict[str, Any] = {
        "num_bits": quant.format.bits,
        "type": quant.format.kind,
        "symmetric": quant.symmetric,
        "group_size": grain.columns if grain.kind == "group" else None,
        "strategy": "tensor_group" if quant.scale == "e4m3" else grain.kind,
    }
    if grain.kind == "block":
        found["block_structure"] = [grain.rows, grain.columns]
    found["dynamic"] = dynamic
    if quant.scale in SCALE_TYPES:
        found["scale_dtype"] = SCALE_TYPES[quant.scale]
    return found


def quant_of(given: Mapping[str, Any] | None) -> Quant | None:
    """Read an entry back; missing fields have the library's defaults."""
    if not given:
        return None
    bits, floats = int(given.get("num_bits", 8)), given.get("type", "int") == "float"
    name = {8: "fp8_e4m3", 4: "fp4_e2m1"}[bits] if floats else f"int{bits}"
    size, strategy = given.get("group_size"), given.get("strategy")
    strategy = strategy or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy in ("group", "tensor_group"):
        assert size is not None
        grain = per_group(int(size))
    elif strategy == "block":
        grain = per_block(*given["block_structure"])
    else:
        grain = GRAINS[strategy]
    symmetric, dynamic = bool(given.get("symmetric", True)), bool(given.get("dynamic", False))
    return Quant(
        FORMATS[name], grain, symmetric, dynamic, _scale_kind(name, strategy, given.get("scale_dtype"))
    )


def _scale_kind(name: str, strategy: str, dtype: str | None) -> ScaleKind:
    if strategy == "tensor_group":
        return "e4m3"
    if strategy == "group" and (name == "fp4_e2m1" or dtype == SCALE_TYPES["e8m0"]):
        return "e8m0"
    if dtype == SCALE_TYPES["float16"]:
        return "float16"
    return "bfloat16" if dtype == SCALE_TYPES["bfloat16"] else "free"
