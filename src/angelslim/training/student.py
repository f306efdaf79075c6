"""The model that is trained: float32 weights, quantizers on its linear layers, and what remains when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import ConfigError
from ..export._checkpoint import open_any
from ..methods.base import make_quantizer
from ..methods.qat.base import NO_BIAS, attach, merge, scale_parameters, set_trainable
from ..models.checkpoint import Checkpoint, TensorInfo
from ..models.loading import Source
from ..numerics.lowbit.record import LowBit
from ..numerics.quantize import Quantized, fake_quantize
from ..numerics.scheme import Quant
from .job import TrainingJob


def open_student(job: TrainingJob) -> nn.Module:
    """Load the model in float32 and put a quantizer on each chosen layer."""
    source = open_any(job.source.folder, trust_remote_code=job.config.model.trust_remote_code)
    model = source.materialize("", torch.device("cpu"))
    model.tie_weights()  # type: ignore[operator]
    model = model.float().requires_grad_(True)
    if job.quantizer:
        quantizer = make_quantizer(job.quantizer, job.options)
        for layer in job.layers:
            linear = model.get_submodule(str(layer.module))
            assert isinstance(linear, nn.Linear), layer.name
            attach(linear, quantizer, layer.name)
            if job.inputs is not None:
                linear.register_forward_pre_hook(_rounding(job.inputs))
    _choose_trainable(model, job.trainable)
    return model


def _rounding(quant: Quant) -> Any:
    """Round a layer's inputs as an engine will; the gradient goes straight through."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            change = fake_quantize(args[0].float(), quant).to(args[0].dtype) - args[0]
        return (args[0] + change, *args[1:])

    return hook


def _choose_trainable(model: nn.Module, what: str) -> None:
    if what == "norm":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name.rpartition(".")[0])
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("The model has no norms to train.", fix="Set trainable_parameters: all.")
    else:
        set_trainable(model, what)


def undecayed(model: nn.Module) -> frozenset[str]:
    """Return the names of learned scales, which weight decay would only pull towards zero."""
    return frozenset(scale_parameters(model))


@dataclass(frozen=True)
class Outcome:
    """What training leaves: quantized layers by module path, and the checkpoint's other tensors.

    The weights of quantized layers are not among those: what is said of their codes compares them with the original's.
    Weights with a shift are, as ordinary numbers, for no `Quantized` holds them.
    """

    layers: dict[str, Quantized]
    tensors: dict[str, Tensor]  # checkpoint tensor -> float32 value
    notes: dict[str, str]  # module path -> what has to be said of a layer


def finish(model: nn.Module, job: TrainingJob) -> Outcome:
    """Merge the quantizers and collect what the checkpoint needs; the model is an ordinary one afterwards."""
    biased = {str(layer.module) for layer in job.layers if _has_bias(job.source, str(layer.module))}
    merged = merge(model)
    lost = {
        name: record.bias.abs().max().item()
        for name, record in merged.items()
        if isinstance(record, LowBit) and record.bias is not None and name not in biased
    }
    # One text for all, so that it is said once and not for every layer.
    notes = dict.fromkeys(lost, NO_BIAS.format(max(lost.values()))) if lost else {}
    layers = {name: _plain(record) for name, record in merged.items() if not _shifted(record)}
    replaced = {f"{name}.weight" for name in layers}
    state = {name: value.detach() for name, value in model.state_dict().items() if name not in replaced}
    tensors = {
        tensor: state[target.parameter].float()
        for tensor, target in job.source.targets.items()
        if target.pattern is None
        and target.parameter in state
        and state[target.parameter].is_floating_point()
    }
    return Outcome(layers, tensors, notes)


def _shifted(record: LowBit | Quantized) -> bool:
    return isinstance(record, LowBit) and record.shift is not None


def _plain(record: LowBit | Quantized) -> Quantized:
    return record.quantized() if isinstance(record, LowBit) else record


def _has_bias(source: Source, module: str) -> bool:
    return f"{module}.bias" in source.tensors_of


class TrainedCheckpoint(Checkpoint):
    """The tensors of the original with the trained values in place of some; types and names stay."""

    def __init__(
        self, inner: Checkpoint, trained: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> None:
        self.inner, self.trained, self.folder = inner, trained, inner.folder
        self.tensors: dict[str, TensorInfo] = dict(inner.tensors)
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the original."""
        return self.inner.nbytes

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return the trained value in the stored type, or the original's."""
        if name not in self.trained:
            return self.inner.read(name, device)
        return self.trained[name].to(device, self.dtype or self.tensors[name].dtype)

    def sources(self, name: str) -> list[TensorInfo]:
        """Return what the original has."""
        return self.inner.sources(name)
