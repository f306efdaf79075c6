"""Full-precision tensors with quantized values: what any engine loads, at the size of the original.

Made by ``save_format: fake``. The layers are float32, which holds their values exactly. It is no entry of the formats, since a folder of it is an ordinary model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..numerics.quantize import Quantized
from ..numerics.scheme import Scheme
from .base import Restored


class Dense:
    """Writes dequantized weights in float32; reads nothing."""

    method = ""
    scale_name = ""

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Never: the folder has no quantization_config."""
        return False

    def refuses(self, scheme: Scheme) -> str:
        """Weights alone: nothing in the folder says how inputs are rounded."""
        return "" if scheme.input is None and scheme.kv is None else "it says nothing of activations"

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """Layers may differ."""
        return ""

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Every size fits."""
        return ""

    def stored(self, scheme: Scheme) -> Scheme:
        """Nothing is changed."""
        return scheme

    def describe(self, scheme: Scheme) -> str:
        """Name it by what engines see."""
        return "full precision (quantized values)"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the weight in float32, which holds every product of a code and a scale of 16 bits."""
        return {f"{name}.weight": weight.dequantize()}

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Return nothing: engines see an ordinary model."""
        return {}

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Not asked."""
        return {}

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """Not asked."""
        raise KeyError("weight")

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Not asked."""
        return None


FORMAT = Dense()
