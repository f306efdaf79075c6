"""Options of a recipe as checked values: a wrong one is a `ConfigError` that names it and says what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...base.errors import ConfigError, did_you_mean
from ...numerics.scheme import PER_CHANNEL, PER_TENSOR, Granularity, per_group

Options = Mapping[str, Any]
STORAGE = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
TERNARY_WORDS = ("ternary", "1.58", "1.58bit")


def choice(options: Options, name: str, default: str, allowed: Sequence[str]) -> str:
    """Return one of the `allowed` words."""
    value = options.get(name, default)
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} is {value!r}.", fix=did_you_mean(str(value), allowed))
    return value


def number(options: Options, name: str, default: float, low: float, high: float) -> float:
    """Return a number in [low, high]."""
    value = options.get(name, default)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if isinstance(value, bool) or not low <= found <= high:
        raise ConfigError(f"{name} is {value!r}.", fix=f"Use a number from {low:g} to {high:g}.")
    return found


def width(options: Options, default: int | str, allowed: Sequence[int | str]) -> int | str:
    """Return the option `bits`: a whole number, or the word ``ternary`` (1.58 means the same)."""
    value = options.get("bits", default)
    found: int | str | None = None
    if str(value).lower() in TERNARY_WORDS:
        found = "ternary"
    elif isinstance(value, (int, str)) and not isinstance(value, bool) and str(value).isdigit():
        found = int(value)
    if found not in allowed or found is None:
        raise ConfigError(f"bits is {value!r}.", fix=f"Use {', '.join(map(str, allowed))}.")
    return found


def grain(options: Options, default: Granularity) -> Granularity:
    """Return what shares a scale: `granularity` (tensor, channel, group; also as per-group) and `group_size` (128).

    A group size alone means groups; -1 means one scale a channel.
    """
    size = options.get("group_size")
    word = options.get("granularity")
    if word is None and size is None:
        return default
    kind = "group" if word is None else str(word).lower().replace("_", "-").removeprefix("per-")
    if kind not in ("tensor", "channel", "group"):
        raise ConfigError(
            f"granularity is {word!r}.", fix=did_you_mean(str(word), ("tensor", "channel", "group"))
        )
    if kind == "tensor":
        return PER_TENSOR
    if kind == "channel" or size == -1:
        return PER_CHANNEL
    size = 128 if size is None else size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"group_size is {size!r}.", fix="Use 32, 64 or 128, or -1 for one scale a channel.")
    return per_group(size)


def storage(options: Options, default: str = "float16") -> torch.dtype | None:
    """Return the option `scale_dtype`, the type in which scales will be stored; None where that is float32."""
    return STORAGE[choice(options, "scale_dtype", default, tuple(STORAGE))]
