"""Put quantizers on a model, take them off again, and what a training loop has to tell them.

`attach` makes a linear layer compute with the quantizer's weight through `torch.nn.utils.parametrize`: the layer's class,
its place in the model and the code that calls it stay. The master weight becomes ``parametrizations.weight.original``,
learned scales ``parametrizations.weight.0.scale``. All of it is ordinary parameters and buffers, so state dicts, copies,
compiled models, sharding and recomputed blocks need no special care.

    quantizer = QAT.get("seq")({"bits": 2})
    for name, linear in layers:
        attach(linear, quantizer, name)
    ...                                  # train; before each step set_progress(model, step, steps)
    records = merge(model)               # an ordinary model again, with exactly quantized weights
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...base.errors import ConfigError, SchemeError, did_you_mean
from ...numerics.lowbit.record import LowBit
from ...numerics.quantize import Quantized
from ._activations import round_inputs
from ._ahead import prepare
from ._quantizer import Quantizer

__all__ = [
    "attach",
    "detach",
    "enabled",
    "master_weight",
    "merge",
    "quantizers",
    "round_inputs",
    "scale_parameters",
    "set_progress",
    "set_trainable",
]

TRAINABLE = ("all", "quant")
NO_BIAS = "the bias that the quantizer adds (at most {:.1e}) is left out: this architecture has none there"


def attach(linear: nn.Linear, quantizer: Quantizer, name: str = "") -> None:
    """Let `linear` compute with a weight quantized by a copy of `quantizer`; `name` is for messages.

    A layer whose size the quantizer cannot tile is a `SchemeError` and stays as it was.
    """
    assert not parametrize.is_parametrized(linear, "weight"), name
    own = copy.deepcopy(quantizer)
    try:
        own.start(linear.weight)
    except SchemeError as error:
        raise SchemeError(error.what, fix=error.fix, where=name) from None
    own.to(linear.weight.device).train(linear.training)
    # Unsafe only means that the result is not computed once to compare its type.
    parametrize.register_parametrization(linear, "weight", own, unsafe=True)
    own.join(linear)


def quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Linear, Quantizer]]:
    """Yield (path, layer, quantizer) of every layer that has one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            first = cast(nn.ModuleList, _parametrizations(module)["weight"])[0]
            if isinstance(first, Quantizer):
                yield name, module, first


def master_weight(linear: nn.Linear) -> Tensor:
    """Return the weight that is trained, ``[out, in]``."""
    return cast(Tensor, _parametrizations(linear)["weight"].original)


def detach(model: nn.Module) -> None:
    """Take all quantizers off; the layers keep their master weights."""
    for _, linear, quantizer in list(quantizers(model)):
        quantizer.leave(linear)
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def merge(model: nn.Module) -> dict[str, LowBit | Quantized]:
    """Replace every master weight by its quantized one, take the quantizers off, and return the records by path.

    The outputs are those of the attached model in evaluation mode. A bias that a quantizer adds becomes the layer's
    own, or part of it.
    """
    records = {}
    for name, linear, quantizer in list(quantizers(model)):
        records[name] = record = quantizer.merged(master_weight(linear))
        quantizer.leave(linear)
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        with torch.no_grad():
            linear.weight.copy_(record.dequantize())
            if isinstance(record, LowBit) and record.bias is not None:
                _add_bias(linear, record.bias.to(linear.weight.dtype))
    return records


def set_progress(model: nn.Module, step: int, steps: int) -> None:
    """Tell every quantizer that `step` of `steps` optimizer steps are done; call it before each step.

    What fades over a run depends on nothing else: not on the number of forward calls, and not on restarts.
    """
    found = _weights(model)
    for _, quantizer in found:
        quantizer.progress(step, steps)
    prepare((weight, quantizer.calls) for weight, quantizer in found if quantizer.calls)


def _weights(model: nn.Module) -> list[tuple[Tensor, Quantizer]]:
    """Return master weights and their quantizers: `quantizers` without the names, which take most of its time."""
    found: dict[int, tuple[Tensor, Quantizer]] = {}
    waiting = [model]
    for module in waiting:
        own = module._modules
        if "0" in own and isinstance(own["0"], Quantizer):
            assert isinstance(module, parametrize.ParametrizationList)
            found[id(own["0"])] = module.original, own["0"]
        elif own:
            waiting.extend([child for child in own.values() if child is not None])
    return list(found.values())


@contextmanager
def enabled(model: nn.Module, flag: bool) -> Iterator[None]:
    """Turn quantization on or off within the context, as a run does that has its own original as teacher.

    With `flag` False the layers compute with their master weights: the original model as long as those are frozen.
    """
    before = [(quantizer, quantizer.enabled) for _, _, quantizer in quantizers(model)]
    for quantizer, _ in before:
        quantizer.enabled = flag
    try:
        yield
    finally:
        for quantizer, was in before:
            quantizer.enabled = was


def scale_parameters(model: nn.Module) -> list[str]:
    """Return the names, as in ``named_parameters``, of all learned scales and shifts.

    They are for the training loop, which may give them a learning rate of their own, and no weight decay.
    """
    return [
        f"{name}.parametrizations.weight.0.{own}"
        for name, _, quantizer in quantizers(model)
        for own in quantizer.learned
    ]


def set_trainable(model: nn.Module, what: str) -> None:
    """Choose what is trained: ``all`` is every master weight and scale, ``quant`` the scales and nothing else."""
    if what not in TRAINABLE:
        raise ConfigError(f"trainable is {what!r}.", fix=did_you_mean(what, TRAINABLE))
    scales = set(scale_parameters(model))
    if what == "quant":
        if not scales:
            raise ConfigError(
                "trainable is 'quant', but this quantizer learns no scales.", fix="Use trainable: all."
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in scales)
        return
    for _, linear, quantizer in quantizers(model):
        master_weight(linear).requires_grad_(True)
        for own in quantizer.learned:
            cast(nn.Parameter, getattr(quantizer, own)).requires_grad_(True)


def _parametrizations(linear: nn.Linear) -> nn.ModuleDict:
    return cast(nn.ModuleDict, linear.parametrizations)


def _add_bias(linear: nn.Linear, bias: Tensor) -> None:
    if linear.bias is None:
        linear.bias = nn.Parameter(bias, requires_grad=linear.weight.requires_grad)
    else:
        linear.bias.add_(bias)
