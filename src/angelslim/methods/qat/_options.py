"""Options of a recipe as checked values: a wrong one is a `ConfigError` that names it and says what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...base.errors import ConfigError, did_you_mean
from ...config.quantizers import grain, width

Options = Mapping[str, Any]
STORAGE = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}

__all__ = ["choice", "grain", "number", "storage", "width"]


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


def storage(options: Options, default: str = "float16") -> torch.dtype | None:
    """Return the option `scale_dtype`, the type in which scales will be stored; None where that is float32."""
    return STORAGE[choice(options, "scale_dtype", default, tuple(STORAGE))]
