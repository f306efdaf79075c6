"""Layers of one shape quantized several at a time, before the step, instead of one by one within it.

On a GPU the kernels that quantize a weight are done before the next ones are started: what a step waits for is the
start of each, and its Python. All layers of one shape, type and recipe compute the same formula, so what one step asked
for can be computed for the next in a few calls of `TOGETHER` layers each, and the layers then find it ready. Their
backward passes are one call as well (`_formula`).

A result counts only for the very tensors that it was made of, as they were then (torch counts each change in place), and
for the same formula; anything else is computed as always. So micro-batches and recomputed blocks share it, and a weight
that was changed after `prepare` is quantized again. Only what is compiled takes part.

Results stay for the whole step: two bytes a weight under autocast, which plain training spends on its copies in bfloat16
from the forward to the backward pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _fused
from ._formula import Formula, Several, Single, Tensors, as_tuple, repeated

TOGETHER = 8  # layers of one call: each length is compiled for itself


class Together:
    """The results of several layers, one tuple for each, and the node that autograd goes back through."""

    def __init__(self, formula: Formula, layers: list[Tensors]) -> None:
        self.formula, self.layers = formula, layers
        self.tensors = [tensor for layer in layers for tensor in layer]
        found = _fused.run(
            repeated, True, *self.tensors, of=formula.values, count=len(layers), **formula.settings
        )
        self.alone = not isinstance(found[0], tuple)  # whether each layer's result is one tensor
        self.results: list[tuple[Tensor, ...]] = [as_tuple(result) for result in found]
        self.linked: tuple[Tensor, ...] = ()

    def of(self, place: int) -> Any:
        """Return the results of one layer, differentiable where that is asked for.

        The node is made when the first layer asks. Of the nodes that are ready the backward pass takes the one that was
        made last: so it hands on the gradients of these layers before it goes on to the layers in front of them.
        """
        if not torch.is_grad_enabled():
            found = self.results[place]
        else:
            if not self.linked:
                self.linked = Several.apply(self.formula, self.results, *self.tensors)  # type: ignore[no-untyped-call]
            each = len(self.linked) // len(self.layers)
            found = self.linked[place * each : (place + 1) * each]
        return found[0] if self.alone else found


@dataclass
class Call:
    """What a layer asked for last, and where its result is if it was computed ahead."""

    formula: Formula
    tensors: Tensors
    state: list[Any]
    ready: Together | None = None
    place: int = 0
    used: bool = True
    alike: Hashable = None  # what calls have in common that can be computed together

    def __post_init__(self) -> None:
        """See what it has in common with others."""
        shapes = [
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
            for t in self.tensors
        ]
        formula = self.formula
        settings = (*formula.settings.values(), *formula.back.values())
        self.alike = formula.values, tuple(shapes), settings


class Calls(dict[Hashable, Call]):
    """The calls of one layer by their function; no copy of a layer has them, since results belong to the weight."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()


def take(calls: Calls, formula: Formula, *tensors: Tensor | None) -> Any:
    """Return the values of `formula`, compiled and differentiable; from `calls` if they are ready, else note it there.

    The first tensor is the layer's weight.
    """
    call, state = calls.get(formula.values), _state(tensors)
    if call is not None and call.ready is not None and call.state == state and call.formula == formula:
        call.used = True
        return call.ready.of(call.place)
    held = tuple([t if t is None or t.is_leaf else t.detach() for t in tensors])  # no graph behind it
    calls[formula.values] = Call(formula, held, state)
    return Single.apply(formula, True, *tensors)  # type: ignore[no-untyped-call]


@torch.no_grad()
def prepare(layers: Iterable[tuple[Tensor, Calls]]) -> None:
    """Compute again what layers asked for in the step before, each given by its master weight and its calls.

    What was not used last time is forgotten, and so is a call for another tensor than the master weight: where
    that is spread over processes (FSDP), the layer computes with one that exists only while it does.
    """
    together: dict[Hashable, list[Call]] = {}
    for weight, calls in layers:
        for function, call in list(calls.items()):
            if not (call.used and call.tensors[0] is weight):
                del calls[function]
                continue
            call.ready, call.state, call.used = None, _state(call.tensors), False
            together.setdefault(call.alike, []).append(call)
    for group in together.values():
        for start in range(0, len(group), TOGETHER):
            part = group[start : start + TOGETHER]
            if len(part) > 1:
                ready = Together(part[0].formula, [call.tensors for call in part])
                for place, call in enumerate(part):
                    call.ready, call.place = ready, place


def _state(tensors: Tensors) -> list[Any]:
    """Return what tells whether tensors are the same ones, and as they were."""
    return [
        None if tensor is None else (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad)
        for tensor in tensors
    ]
