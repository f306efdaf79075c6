"""Elementwise chains as one kernel: what a quantizer computes of a weight, by `torch.compile`.

Rounding a weight is a dozen small operations. One after another they read and write the weight a dozen times and start
a dozen kernels, which is what makes quantization-aware training slow on a GPU; compiled they are a kernel for the
statistics and one for the values. The functions given here are pure: tensors in, tensors out, everything else a keyword.

Every combination of function, shapes, types and keywords is compiled once in a process, all layers of one shape share
it. Each has a code object of its own, since torch compiles one code object eight times and then gives up without error.

Sums come out in another order than one operation after another yields, so a threshold may differ in its last bit. On a
processor results are to be the same bits after a restart and between machines of one kind; `auto` leaves it alone there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ...base import console

CHOICES = ("auto", "true", "false")
AUTOMATIC = ("cuda",)  # device types on which `auto` compiles
BACKEND = "inductor"
_ready: dict[Hashable, Callable[..., Any]] = {}
_broken: set[str] = set()  # device types on which compiling failed


@cache
def _has_triton() -> bool:
    if find_spec("triton") is None:
        console.chose(
            "quantizers one operation after another", "Triton, which torch.compile needs, is missing"
        )
        return False
    return True


def wanted(choice: str, weight: Tensor) -> bool:
    """Say whether the functions of a weight are to be compiled; `auto` means on CUDA devices that have Triton.

    Not where the model is being compiled itself: the functions become part of that.
    """
    if torch.compiler.is_compiling():  # first: what follows is nothing to trace
        return False
    if choice != "auto":
        return choice == "true"
    return weight.device.type in AUTOMATIC and _has_triton()


def run(function: Callable[..., Any], compiled: bool, *tensors: Tensor | None, **settings: Any) -> Any:
    """Return ``function(*tensors, **settings)``, computed without gradients; `settings` are hashable.

    Where nothing can be compiled, a warning says so once and all is computed one operation after another.
    """
    if not compiled or torch.compiler.is_compiling():
        return function(*tensors, **settings)
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if device in _broken:
        return function(*tensors, **settings)
    shapes = tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors)
    key = (function, shapes, tuple(sorted(settings.items(), key=lambda item: item[0])))
    if key in _ready:
        return _ready[key](*tensors)
    made = torch.compile(_bound(function, settings), dynamic=False, fullgraph=True, backend=BACKEND)
    try:
        result = made(*tensors)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError, OSError) as error:
        _broken.add(device)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        console.log.warning(
            "torch.compile does not work on this %s (%s); quantizers run uncompiled.", device, reason
        )
        return function(*tensors, **settings)
    _ready[key] = made
    return result


def _bound(function: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """Return the function of tensors alone, with a code object that nothing else has."""

    def call(*tensors: Tensor | None) -> Any:
        return function(*tensors, **settings)

    return FunctionType(call.__code__.replace(), call.__globals__, "call", closure=call.__closure__)
