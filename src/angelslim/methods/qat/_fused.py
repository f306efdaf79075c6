"""Elementwise chains as one kernel: what a quantizer computes of a weight, by Inductor, the compiler of `torch.compile`.

Rounding a weight is a dozen small operations. One after another they read and write the weight a dozen times and start
a dozen kernels, which is what makes quantization-aware training slow on a GPU; compiled they are a kernel for the
statistics and one for the values. The functions given here are pure: tensors in, tensors out, everything else a keyword.

Every combination of function, shapes, types and keywords is traced and compiled once in a process, all layers of one shape
share it. `torch.compile` itself would check at each call what is known here already, whether the program still fits the
tensors; with weights that a GPU rounds in ten microseconds these checks take longer than the work, a hundred times a step.

Sums come out in another order than one operation after another yields, so a threshold may differ in its last bit. On a
processor results are to be the same bits after a restart and between machines of one kind; `auto` leaves it alone there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...base import console

CHOICES = ("auto", "true", "false")
AUTOMATIC = ("cuda",)  # device types on which `auto` compiles
Program = Callable[..., Any]
_ready: dict[Hashable, Program] = {}
_broken: set[str] = set()  # device types on which compiling failed


@cache
def _has_triton() -> bool:
    if find_spec("triton") is None:
        console.chose("quantizers one operation after another", "Triton, which compiling needs, is missing")
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
    shapes = tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])
    # The keywords of one function stand in the same order in all of its calls.
    key = (function, shapes, tuple(settings.values()))
    program = _ready.get(key)
    if program is not None:
        return program(*tensors)
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if device in _broken:
        return function(*tensors, **settings)
    try:
        program = _program(function, tensors, settings)
        result = program(*tensors)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError, OSError, AttributeError, TypeError, ValueError) as error:
        _broken.add(device)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        console.log.warning("Nothing compiles on this %s (%s); quantizers run uncompiled.", device, reason)
        return function(*tensors, **settings)
    _ready[key] = program
    return result


def _program(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], settings: dict[str, Any]
) -> Program:
    """Return the compiled function of tensors shaped like these; where one is None it is None in every call."""
    from torch.fx.experimental.proxy_tensor import make_fx

    given = [place for place, tensor in enumerate(tensors) if tensor is not None]
    form: list[Any] = []  # the result, with numbers in the place of tensors

    def flat(*present: Tensor) -> list[Tensor]:
        every: list[Tensor | None] = [None] * len(tensors)
        for place, tensor in zip(given, present, strict=True):
            every[place] = tensor
        found: list[Tensor] = []
        form[:] = [_numbered(function(*every, **settings), found)]
        return found

    examples = [tensor.detach() for tensor in tensors if tensor is not None]
    with torch.no_grad(), torch.autocast(examples[0].device.type, enabled=False):
        compiled = compile_graph(make_fx(flat, tracing_mode="fake")(*examples), examples)
    shape = form[0]
    whole = len(given) == len(tensors)

    def program(*every: Tensor | None) -> Any:
        present = every if whole else [every[place] for place in given]
        return _filled(shape, compiled(*present))

    return program


def compile_graph(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Program:
    """Return what computes the graph of tensors like `examples`: a list of tensors for tensors."""
    found: Program = torch._inductor.compile(graph, list(examples))
    return found


def _numbered(result: Any, found: list[Tensor]) -> Any:
    """Return the result with numbers in the place of tensors, which are appended to `found`."""
    if isinstance(result, Tensor):
        found.append(result)
        return len(found) - 1
    if isinstance(result, tuple):
        return tuple([_numbered(each, found) for each in result])
    assert result is None
    return None


def _filled(form: Any, found: Sequence[Tensor]) -> Any:
    """Undo `_numbered`."""
    if isinstance(form, int):
        return found[form]
    return None if form is None else tuple([_filled(each, found) for each in form])
