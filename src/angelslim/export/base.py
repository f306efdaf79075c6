"""What a checkpoint format is: three pure functions and a summary.

A module in ``export/`` defines ``FORMAT``, an object with the `Exporter` protocol; its file name is the format's
name. Exporters never see a model: a layer's result in, tensors out, and back. A format that is one file instead of
a model folder is a module in ``export/files/`` with the `FileFormat` protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..base.errors import SchemeError
from ..base.registry import Registry
from ..models.loading import Source
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

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Say whether a ``quantization_config`` declares this format."""

    def refuses(self, scheme: Scheme) -> str:
        """Return why the format cannot hold a scheme, or an empty string when it can."""

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """Return why the format cannot hold these layers (name -> scheme) in one folder, or an empty string."""

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Return why the format cannot hold a layer ``(out, in)`` of this size, or an empty string."""

    def stored(self, scheme: Scheme) -> Scheme:
        """Return the scheme with scales as the format keeps them, so that a run chooses codes for those."""

    def describe(self, scheme: Scheme) -> str:
        """Return the format's name with its variant for this scheme."""

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the checkpoint tensors of one layer; `name` has no trailing ``.weight``.

        Scales that the format's type does not hold exactly are a `SchemeError`.
        """

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Return config.json's ``quantization_config`` for layers (name -> scheme) and full-precision linears."""

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read each layer's scheme back from a ``quantization_config``."""

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """Return a layer's (out, in) from the shapes of its tensors (last part of the name -> shape)."""

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Read one layer back from its tensors; None when the layer is not quantized."""


def one_scheme(schemes: Mapping[str, Scheme]) -> str:
    """Refuse layers that differ, for formats whose config describes all of them at once."""
    found = list(dict.fromkeys(schemes.values()))
    return "" if len(found) < 2 else f"layers that differ ({found[0]}; {found[1]}): it has one scheme for all"


class FileFormat(Protocol):
    """A whole model in one file, written from a compressed folder."""

    def write(self, source: Source, out: Path, kind: str = "") -> None:
        """Write an opened compressed model; what the file cannot hold exactly is refused, and nothing is left.

        `kind` asks for one of the format's own types of numbers where several hold them.
        """

    def unpack(self, file: Path, folder: Path) -> None:
        """Write the model in a file as a new folder in the `PREFERRED` format, with the same numbers."""

    def check(self, file: Path) -> int:
        """Decode every quantized tensor of a file and return their number; damage is a `ModelError`."""


FILES: Registry[FileFormat] = Registry("file format", "angelslim.export.files", "FORMAT")
FORMATS: Registry[Exporter] = Registry("format", "angelslim.export", "FORMAT")
PREFERRED = "compressed_tensors"  # what the most engines load


def weights_only(scheme: Scheme) -> str:
    """Refuse quantized activations and caches, for formats that have no place for them."""
    if scheme.input is not None:
        return "inputs cannot be quantized in it"
    return "the KV cache cannot be quantized in it" if scheme.kv is not None else ""


def choose(
    schemes: Mapping[str, Scheme], wanted: str = "auto", shapes: Mapping[str, tuple[int, int]] | None = None
) -> tuple[str, Exporter]:
    """Return the name and the format to write for layers (name -> scheme, (out, in)).

    That is the wanted one, or the first that holds every layer.
    """
    names = [wanted.replace("-", "_")] if wanted != "auto" else list(dict.fromkeys([PREFERRED, *FORMATS]))
    reasons = {}
    for name in names:
        exporter = FORMATS.get(name)
        reasons[name] = refusal(exporter, schemes, shapes or {})
        if not reasons[name]:
            return name, exporter
    if wanted != "auto":
        raise SchemeError(f"Format {wanted!r} cannot hold {reasons[names[0]]}.", fix="Use format: auto.")
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise SchemeError(f"No checkpoint format holds the scheme ({listed}).", fix="Choose another scheme.")


def refusal(exporter: Exporter, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return why a format cannot hold these layers, or an empty string when it can."""
    for scheme in dict.fromkeys(schemes.values()):
        if reason := exporter.refuses(scheme):
            return f"{scheme}: {reason}"
    for name, shape in shapes.items():
        if reason := exporter.refuses_shape(schemes[name], shape):
            return f"{name!r}: {reason}"
    return exporter.refuses_together(schemes)
