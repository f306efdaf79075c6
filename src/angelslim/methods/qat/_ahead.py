"""Layers of one shape quantized several at a time, before the step, instead of one by one within it.

On a GPU the kernels that quantize a weight are done before the next ones are started: what a step waits for is the
start of each, and its Python. All layers of one shape, type and recipe compute the same function, so what one step
asked for can be computed for the next in a few calls of `TOGETHER` layers each, and the layers then find it ready.

A result counts only for the very tensors that it was made of, at the version that they had (torch counts each change in
place), and for the same settings; anything else is computed as always. So micro-batches and recomputed blocks share it,
and a weight that was changed after `prepare` is quantized again. Only compiled functions take part.

Results stay for the whole step: two bytes a weight under autocast, which plain training spends on its copies in bfloat16
from the forward to the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _fused

TOGETHER = 8  # layers of one call: each length is compiled for itself

Tensors = tuple[Tensor | None, ...]


@dataclass
class Call:
    """What a layer asked for last, and the result if it was computed ahead."""

    function: Callable[..., Any]
    tensors: Tensors
    settings: dict[str, Any]
    versions: list[int] = field(default_factory=list)
    result: Any = None  # a tensor, or a tuple of them
    used: bool = True
    alike: Hashable = None  # what calls have in common that can be computed together

    def __post_init__(self) -> None:
        """See what it has in common with others."""
        shapes = tuple(
            [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in self.tensors]
        )
        self.alike = self.function, shapes, tuple(self.settings.values())

    def same(self, tensors: Tensors, settings: dict[str, Any]) -> bool:
        """Say whether a result is that of these tensors as they are now."""
        return (
            self.versions == _versions(tensors)
            and _places(self.tensors) == _places(tensors)
            and self.settings == settings
        )

    def reads(self, weight: Tensor) -> bool:
        """Say whether the call is for a layer's own, whole weight."""
        first = self.tensors[0]
        return first is not None and type(weight) is nn.Parameter and first.data_ptr() == weight.data_ptr()


def take(
    calls: dict[Hashable, Call], function: Callable[..., Any], *tensors: Tensor | None, **settings: Any
) -> Any:
    """Return ``function(*tensors, **settings)``, compiled; from `calls` if it is ready, else note it there.

    The first tensor is the layer's weight.
    """
    call = calls.get(function)
    if call is not None and call.result is not None and call.same(tensors, settings):
        call.used = True
        return call.result
    held = tuple([t if t is None else t.detach() for t in tensors])
    calls[function] = Call(function, held, settings)
    return _fused.run(function, True, *tensors, **settings)


@torch.no_grad()
def prepare(layers: Iterable[tuple[Tensor, dict[Hashable, Call]]]) -> None:
    """Compute again what layers asked for in the step before, each given by its master weight and its calls.

    What was not used last time is forgotten, and so is a call for another tensor than the master weight: where
    that is spread over processes (FSDP), the layer computes with one that exists only while it does.
    """
    together: dict[Hashable, list[Call]] = {}
    for weight, calls in layers:
        for function in [name for name, call in calls.items() if not (call.used and call.reads(weight))]:
            del calls[function]
        for call in calls.values():
            call.result = None
            together.setdefault(call.alike, []).append(call)
    for group in together.values():
        for start in range(0, len(group), TOGETHER):
            _compute(group[start : start + TOGETHER])


def several(*tensors: Tensor | None, of: Callable[..., Any], count: int, **settings: Any) -> tuple[Any, ...]:
    """Return the results of `count` calls of one function, whose tensors stand one after another."""
    each = len(tensors) // count
    return tuple([of(*tensors[place * each : (place + 1) * each], **settings) for place in range(count)])


def _compute(group: list[Call]) -> None:
    if len(group) == 1:
        return
    tensors = [tensor for call in group for tensor in call.tensors]
    results = _fused.run(several, True, *tensors, of=group[0].function, count=len(group), **group[0].settings)
    for call, result in zip(group, results, strict=True):
        call.result, call.versions, call.used = result, _versions(call.tensors), False


def _places(tensors: Tensors) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _versions(tensors: Tensors) -> list[int]:
    return [0 if tensor is None else tensor._version for tensor in tensors]
