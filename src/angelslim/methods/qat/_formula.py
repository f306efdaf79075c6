"""What a quantizer computes of a weight, forward and backward, as pure functions; and how autograd gets to see them.

A `Formula` names two functions of tensors, whose other arguments are settings: `values` gives what the layer computes with,
and `slopes` the gradients that come back. Both may be compiled (`_fused`). Where slopes are left out the gradient of the
values is that of the first tensor, as it stands: the straight-through estimator (arXiv 1308.3432).

`Single` is the node of one layer. `Several` is one node for several layers, whose values were computed together before the
step (`_ahead`): one node costs about the Python of one layer, and their slopes are one compiled call too. What it needs
stays, so that the backward pass may visit it more than once, with the gradients of some of its layers or of all: micro-batches
do that, and blocks that are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _fused

Tensors = tuple[Tensor | None, ...]


class Formula(NamedTuple):
    """Values and slopes; `keeps` numbers what slopes read, counted through the tensors and then the results."""

    values: Callable[..., Any]  # (*tensors, **settings): a tensor, or a tuple of them
    settings: dict[str, Any]
    slopes: Callable[..., Tensors] | None = None  # (*kept, *grads, asked, **back): a gradient for each tensor
    back: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    keeps: tuple[int, ...] = ()

    def kept(self, tensors: Sequence[Tensor | None], results: Sequence[Tensor]) -> Tensors:
        """Return what slopes read."""
        every = (*tensors, *results)
        return tuple([every[place] for place in self.keeps])


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """Return results as a tuple, also where there is one."""
    return result if isinstance(result, tuple) else (result,)


def repeated(*tensors: Tensor | None, of: Callable[..., Any], count: int, **settings: Any) -> tuple[Any, ...]:
    """Return the results of `count` calls of one function, whose tensors stand one after another."""
    each = len(tensors) // count
    return tuple([of(*tensors[n * each : (n + 1) * each], **settings) for n in range(count)])


class Single(torch.autograd.Function):
    """The values of one layer, compiled or one operation after another."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, compiled: bool, *tensors: Tensor | None) -> Any:
        """Return what `formula.values` does."""
        results = _fused.run(formula.values, compiled, *tensors, **formula.settings)
        ctx.save_for_backward(*formula.kept(tensors, as_tuple(results)))
        ctx.set_materialize_grads(False)
        ctx.formula, ctx.compiled, ctx.dtype = formula, compiled, tensors[0].dtype  # type: ignore[union-attr]
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return a gradient for each tensor."""
        formula, asked = ctx.formula, ctx.needs_input_grad[2:]
        if formula.slopes is None:
            return None, None, *_straight(grads, asked, ctx.dtype)
        found = _fused.run(
            formula.slopes, ctx.compiled, *ctx.saved_tensors, *grads, asked=asked, **formula.back
        )
        return None, None, *found


class Several(torch.autograd.Function):
    """The given values of several layers, whose tensors and results stand one after another."""

    @staticmethod
    def forward(
        ctx: Any, formula: Formula, results: list[tuple[Tensor, ...]], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return all results."""
        each = len(tensors) // len(results)
        ctx.kept = [
            formula.kept(tensors[n * each : (n + 1) * each], result) for n, result in enumerate(results)
        ]
        ctx.versions = _versions(ctx.kept)
        ctx.set_materialize_grads(False)
        ctx.formula, ctx.dtype = formula, tensors[0].dtype  # type: ignore[union-attr]
        return tuple([tensor.detach() for result in results for tensor in result])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return a gradient for each tensor of each layer; none where a layer has none itself."""
        formula, kept, count = ctx.formula, ctx.kept, len(ctx.kept)
        if ctx.versions != _versions(kept):
            raise RuntimeError("a weight or scale was changed between the forward and the backward pass")
        parts, asked = _parts(grads, count), _parts(ctx.needs_input_grad[2:], count)
        forms = {(flags, *[grad is None for grad in part]) for flags, part in zip(asked, parts, strict=True)}
        if formula.slopes is None:
            found = [_straight(*layer, ctx.dtype) for layer in zip(parts, asked, strict=True)]
        elif len(forms) == 1:
            every = [tensor for layer, part in zip(kept, parts, strict=True) for tensor in (*layer, *part)]
            found = _fused.run(
                repeated, True, *every, of=formula.slopes, count=count, asked=asked[0], **formula.back
            )
        else:
            found = [
                _fused.run(formula.slopes, True, *layer, *part, asked=flags, **formula.back)
                if any(grad is not None for grad in part)
                else (None,) * len(flags)
                for layer, part, flags in zip(kept, parts, asked, strict=True)
            ]
        return None, None, *[tensor for layer in found for tensor in layer]


def _straight(grads: Sequence[Tensor | None], asked: Sequence[bool], dtype: torch.dtype) -> Tensors:
    """Hand the gradient of the values to the first tensor."""
    grad = grads[0]
    return grad if grad is None else grad.to(dtype), *[None] * (len(asked) - 1)


def _parts(every: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """Cut a sequence into `count` of one length."""
    each = len(every) // count
    return [tuple(every[n * each : (n + 1) * each]) for n in range(count)]


def _versions(kept: list[Tensors]) -> list[int]:
    """Return how often each tensor was changed in place."""
    return [tensor._version for layer in kept for tensor in layer if tensor is not None]
