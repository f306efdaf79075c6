"""What a checkpoint format is: three pure functions and a summary.

A module in ``export/`` defines ``FORMAT``, an object with the `Exporter` protocol; its file name is the format's
name. Exporters never see a model: a layer's result in, tensors out, and back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..base.errors import SchemeError
from ..base.registry import Registry
from ..numerics.quantize import Quantized
from ..numerics.scheme import Scheme


@dataclass(frozen=True)
class Restored:
    """A layer read back from a checkpoint: its weight, its scheme, and its static input scale if any."""

    weight: Quantized
    scheme: Scheme
    input_scale: Tensor | None


class Exporter(Protocol):
    """One checkpoint format."""

    method: str  # the `quant_method` that config.json declares
    scale_name: str  # the tensor whose presence says that a layer is quantized

    def refuses(self, scheme: Scheme) -> str:
        """Return why the format cannot hold a scheme, or an empty string when it can."""

    def describe(self, scheme: Scheme) -> str:
        """Return the format's name with its variant for this scheme."""

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the checkpoint tensors of one layer; `name` has no trailing ``.weight``."""

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Return config.json's ``quantization_config`` for layers (name -> scheme) and full-precision linears."""

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read each layer's scheme back from a ``quantization_config``."""

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Read one layer back from its tensors; None when the layer is not quantized."""


FORMATS: Registry[Exporter] = Registry("format", "angelslim.export", "FORMAT")


def choose(schemes: Collection[Scheme], wanted: str = "auto") -> tuple[str, Exporter]:
    """Return the name and the format to write: the wanted one, or the first that holds every scheme."""
    names = [wanted.replace("-", "_")] if wanted != "auto" else ["compressed_tensors", *FORMATS]
    reasons = {}
    for name in names:
        exporter = FORMATS.get(name)
        refused = [f"{scheme}: {reason}" for scheme in schemes if (reason := exporter.refuses(scheme))]
        if not refused:
            return name, exporter
        reasons[name] = refused[0]
    if wanted != "auto":
        raise SchemeError(f"Format {wanted!r} cannot hold {reasons[names[0]]}.", fix="Use format: auto.")
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise SchemeError(f"No checkpoint format holds the scheme ({listed}).", fix="Choose another scheme.")
