"""A selector's settings: one value, one a layer, or one a head of each layer.

An option of a recipe may be

* a value, which holds everywhere: ``stride: 16``;
* a list with one entry a layer: ``keep_ratio: [1.0, 1.0, 0.2, ...]``;
* such a list whose entries are lists with one entry a query head, for options that may differ between heads:
  ``gamma: [[0.9, 0.95], [0.9, 0.8]]``. A list of one entry serves every layer: ``gamma: [[0.9, 0.95]]``.

Wrong names, kinds, ranges and lengths are a `ConfigError`. How many layers and heads there are is known only when a
model calls, so lengths are checked then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import ConfigError, did_you_mean
from .plan import Context

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Option:
    """One option: its default, the kind and range of its values, and whether heads may differ."""

    default: Value
    kind: type
    low: float = 0.0
    high: float = float("inf")
    heads: bool = False
    choices: tuple[str, ...] = ()


DENSITY = Option(None, float, 0.0, 1.0, heads=True)


class Settings:
    """The checked options of one selector; every selector also has `density`, which turns on the iso-density mode."""

    def __init__(self, selector: str, options: Mapping[str, Any], known: Mapping[str, Option]) -> None:
        self.selector, self.known = selector, {"density": DENSITY, **known}
        for name in options:
            if name not in self.known:
                raise ConfigError(
                    f"The selector {selector} has no option {name!r}.", fix=did_you_mean(name, self.known)
                )
        self.given = {name: value for name, value in options.items() if value is not None}
        for name, value in self.given.items():
            self._check(name, value, depth=0)

    def one(self, name: str, ctx: Context) -> Any:
        """The value of an option that all heads of a layer share."""
        assert not self.known[name].heads, name
        return self._layer(name, ctx)

    def each(self, name: str, ctx: Context, heads: int) -> tuple[Any, ...]:
        """The values of an option for one layer: one entry if heads agree, else one a head."""
        value = self._layer(name, ctx)
        if not isinstance(value, list):
            return (value,)
        if len(value) == 1:
            return tuple(value)
        if len(value) != ctx.of_layer(heads):
            raise ConfigError(
                f"The option {name} of the selector {self.selector} lists {len(value)} heads in layer {ctx.layer}, "
                f"the model has {ctx.of_layer(heads)}.",
                fix="Give one value a query head, or one for all.",
            )
        return ctx.own(value)

    def column(self, name: str, ctx: Context, q: Tensor) -> Tensor:
        """The values of an option as float32 [H or 1, 1, 1], which broadcast over maps [B, H, nQ, nK]."""
        values = self.each(name, ctx, q.shape[1])
        return torch.tensor(values, dtype=torch.float32, device=q.device)[:, None, None]

    def density(self, ctx: Context, heads: int) -> tuple[float, ...] | None:
        """The target of the iso-density mode, one entry or one a head; None where the method's own budget rules."""
        values = self.each("density", ctx, heads)
        if None in values:
            if any(value is not None for value in values):
                raise ConfigError(
                    f"Layer {ctx.layer} has a density for some heads only.",
                    fix="Give every head of the layer one.",
                )
            return None
        return tuple(float(value) for value in values)

    def _layer(self, name: str, ctx: Context) -> Any:
        value = self.given.get(name, self.known[name].default)
        if not isinstance(value, list):
            return value
        if len(value) not in (1, ctx.layers):
            raise ConfigError(
                f"The option {name} of the selector {self.selector} lists {len(value)} layers, "
                f"the model has {ctx.layers}.",
                fix="Give one value a layer, or one for all.",
            )
        return value[0 if len(value) == 1 else ctx.layer]

    def _check(self, name: str, value: Any, depth: int) -> None:
        option = self.known[name]
        if isinstance(value, list):
            if depth == 1 + option.heads or not value:
                raise ConfigError(
                    f"The option {name} of the selector {self.selector} has an empty or too deep list.",
                    fix="List one value a layer" + ("; a layer may list its heads." if option.heads else "."),
                )
            for entry in value:
                self._check(name, entry, depth + 1)
            return
        if value is None and option.default is None:
            return
        number = option.kind in (int, float) and isinstance(value, (int, float))
        if number and not isinstance(value, bool):
            whole = option.kind is float or float(value).is_integer()
            fits = whole and option.low <= value <= option.high
        else:
            fits = isinstance(value, option.kind) and option.kind in (bool, str)
            fits = fits and (not option.choices or value in option.choices)
        if not fits:
            raise ConfigError(
                f"The option {name} of the selector {self.selector} cannot be {value!r}.",
                fix=f"Give {_wanted(option)}.",
            )


def _wanted(option: Option) -> str:
    if option.choices:
        return "one of " + ", ".join(option.choices)
    if option.kind in (bool, str):
        return {bool: "true or false", str: "a text"}[option.kind]
    kind = "a whole number" if option.kind is int else "a number"
    if option.high == float("inf"):
        return f"{kind}, at least {option.low:g}"
    return f"{kind} from {option.low:g} to {option.high:g}"
