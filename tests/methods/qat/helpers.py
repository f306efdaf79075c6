"""A small linear, quantizers by name, and what all quantizers' tests do with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from angelslim.methods.base import QAT
from angelslim.methods.qat._quantizer import Quantizer
from angelslim.methods.qat.base import attach, quantizers

OUT, IN = 12, 64
# Every quantizer at least once, with every kind of tile; scales in float32, so that float64 twins agree.
EXACT: dict[str, Any] = {"scale_dtype": "float32"}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("absmean", {}),
    ("absmean", {"granularity": "group", "group_size": 16}),
    ("twn", {}),
    ("minmax", {}),
    ("minmax", {"bits": 4}),
    ("lsq", {}),
    ("lsq", {"bits": 2, "granularity": "tensor"}),
    ("lsq", {"bits": 4, "group_size": 32, "init": "max"}),
    ("dlt", {}),
    ("dlt", {"group_size": 16}),
    ("seq", {}),
    ("seq", {"granularity": "tensor"}),
    ("seq", {"bits": "ternary", "group_size": 16}),
    ("tequila", {"group_size": 16}),
    ("tequila", {"group_size": 16, "variant": "reactivation", "lambda": 0.01}),
    ("sherry", {"group_size": 16}),
    ("sherry", {"granularity": "channel", "anneal": "none"}),
    ("int", {"group_size": 32}),
    ("int", {"bits": 8}),
    ("fp", {}),
    ("fp", {"format": "mxfp4"}),
    ("fp", {"format": "nvfp4"}),
]
NAMES = [" ".join([name, *map(str, options.values())]) for name, options in VARIANTS]


def linear(bias: bool = False, seed: int = 0, out: int = OUT, columns: int = IN) -> nn.Linear:
    """A layer with weights of the size that trained models have."""
    made = nn.Linear(columns, out, bias=bias)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.copy_(torch.randn(out, columns, generator=source) * 0.02)
        if bias:
            made.bias.copy_(torch.randn(out, generator=source) * 0.02)
    return made


def quantized(name: str, options: Mapping[str, Any], bias: bool = False, seed: int = 0) -> nn.Linear:
    """The layer with a quantizer."""
    made = linear(bias, seed)
    attach(made, QAT.get(name)(options), f"model.{name}")
    return made


def quantizer_of(layer: nn.Module) -> Quantizer:
    """The quantizer of a layer that has one."""
    return next(quantizers(layer))[2]


def inputs(rows: int = 40, seed: int = 1) -> Tensor:
    """What the layer reads."""
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed))


def traced(graph: torch.fx.GraphModule, _examples: list[Tensor]) -> Callable[..., Any]:
    """Stand in for the compiler: the operations of the graph, one after another."""
    return graph


def slope(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> Tensor:
    """Central differences of a float64 function of `at`, element by element."""
    found = torch.zeros_like(at)
    for index in range(at.numel()):
        moved = torch.zeros_like(at).view(-1)
        moved[index] = step * max(at.abs().max().item(), 1e-3)
        moved = moved.view(at.shape)
        rise = function(at + moved) - function(at - moved)
        found.view(-1)[index] = rise / (2 * moved.abs().max())
    return found
