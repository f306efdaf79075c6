"""Native FP8 with one scale a tensor: ``quant_method: fp8`` without a block size, as vLLM and SGLang load it.

A linear holds ``weight`` F8_E4M3 ``[out, in]`` and ``weight_scale`` F32 ``[1]``, the factor to multiply with. With
``activation_scheme: static`` it also holds ``input_scale`` F32 ``[1]``; with ``dynamic`` the engine scales each
token as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..numerics.quantize import Quantized
from ..numerics.scheme import FORMATS, PER_TENSOR, PER_TOKEN, Quant, Scheme
from .base import Restored, one_scheme

FP8 = FORMATS["fp8_e4m3"]
STATIC = Scheme(Quant(FP8, PER_TENSOR), Quant(FP8, PER_TENSOR))
DYNAMIC = Scheme(Quant(FP8, PER_TENSOR), Quant(FP8, PER_TOKEN, dynamic=True))


class Fp8Tensor:
    """Reads and writes FP8 with per-tensor scales."""

    method = "fp8"
    scale_name = "weight_scale"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Recognise the engine's FP8 without blocks."""
        return settings.get("quant_method") == self.method and not settings.get("weight_block_size")

    def refuses(self, scheme: Scheme) -> str:
        """Exactly the two schemes that the config can say."""
        if scheme in (STATIC, DYNAMIC):
            return ""
        return f"it holds only {STATIC}, or {DYNAMIC}"

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """The config names one activation scheme."""
        return one_scheme(schemes)

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Every size fits."""
        return ""

    def stored(self, scheme: Scheme) -> Scheme:
        """Scales are kept in float32."""
        return scheme

    def describe(self, scheme: Scheme) -> str:
        """Name the layout."""
        return "fp8 per tensor (native layout)"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the codes and one or two scales."""
        found = {f"{name}.weight": weight.codes, f"{name}.weight_scale": weight.scale.reshape(1).float()}
        if input_scale is not None:
            found[f"{name}.input_scale"] = input_scale.reshape(1).float()
        return found

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Return the block that engines read; the block size is named so that none is assumed."""
        static = next(iter(schemes.values())) == STATIC
        return {
            "quant_method": self.method,
            "activation_scheme": "static" if static else "dynamic",
            "weight_block_size": None,
            "ignored_layers": list(ignore),
        }

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read the activation scheme back; all layers share it."""
        return dict.fromkeys(names, STATIC if config.get("activation_scheme") == "static" else DYNAMIC)

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """One code for each weight."""
        rows, columns = parts["weight"]
        return rows, columns

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`."""
        scale = tensors.get(f"{name}.weight_scale")
        if scale is None:
            return None
        weight = Quantized(tensors[f"{name}.weight"], scale.float().reshape(1, 1), None, scheme.weight)
        return Restored(weight, scheme, tensors.get(f"{name}.input_scale"))


FORMAT = Fp8Tensor()
