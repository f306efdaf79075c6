"""The inputs of a layer in eight bits while it trains: one scale a token, as BitNet b1.58 has them (arXiv 2402.17764).

``x`` becomes ``s round(x / s)`` with ``s = max|x| / 127`` over a token's channels, in float32; the gradient goes straight
through. It is part of the training and of what an engine does (llama.cpp's ternary kernels multiply with int8
activations by themselves), and no part of the weights that are merged.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import _fused
from ._straight import straight_through

TOP = 127


def rounded_inputs(x: Tensor) -> Tensor:
    """Return `x` ``[..., channels]`` rounded to 255 levels a token, in its own type.

    >>> rounded_inputs(torch.tensor([[127.0, 0.6, -3.4]]))
    tensor([[127.,   1.,  -3.]])
    """
    wide = x.float()
    step = wide.abs().amax(-1, keepdim=True).clamp(min=1e-5) / TOP
    return ((wide / step).round() * step).to(x.dtype)


def round_inputs(linear: nn.Linear, compiled: str = "auto") -> RemovableHandle:
    """Round what the layer reads from now on, until the handle is removed."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x = args[0]
        with torch.no_grad():
            values = _fused.run(rounded_inputs, module.training and _fused.wanted(compiled, x), x)
        return straight_through(x, cast(Tensor, values)), *args[1:]

    return linear.register_forward_pre_hook(hook)
