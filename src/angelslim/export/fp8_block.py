"""Native FP8 blocks, the layout in which DeepSeek-V3 was published: ``quant_method: fp8``.

A linear holds ``weight`` F8_E4M3 ``[out, in]`` and ``weight_scale_inv`` F32 ``[ceil(out/r), ceil(in/c)]``, which
despite its name is the factor to multiply with. Activations are quantized while running, per token and per
group of c inputs. vLLM, SGLang and transformers' fine-grained FP8 read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..base.errors import ModelError
from ..numerics.quantize import Quantized
from ..numerics.scheme import FORMATS, Quant, Scheme, per_block, per_group
from .base import Restored


class Fp8Block:
    """Reads and writes block-scaled FP8 in the DeepSeek layout."""

    method = "fp8"
    scale_name = "weight_scale_inv"

    def refuses(self, scheme: Scheme) -> str:
        """Only symmetric E4M3 blocks with dynamic activations."""
        weight, given = scheme.weight, scheme.input
        if weight.format.name != "fp8_e4m3" or weight.granularity.kind != "block" or not weight.symmetric:
            return "weights must be FP8 E4M3 per block"
        if given is None or not given.dynamic or given.format.name != "fp8_e4m3":
            return "activations must be dynamic FP8"
        if given.granularity != per_group(weight.granularity.columns):
            return f"activations must be per group of {weight.granularity.columns}"
        return ""

    def describe(self, scheme: Scheme) -> str:
        """Name the layout."""
        return f"fp8 blocks {scheme.weight.granularity.rows}x{scheme.weight.granularity.columns} (DeepSeek layout)"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the codes and the block scales."""
        return {f"{name}.weight": weight.codes, f"{name}.weight_scale_inv": weight.scale.float()}

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Return the config block that engines read; all layers share one scheme."""
        granularity = next(iter(schemes.values())).weight.granularity
        return {
            "quant_method": self.method,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [granularity.rows, granularity.columns],
            "modules_to_not_convert": list(ignore),
        }

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read the block size back; all layers share it."""
        size = config.get("weight_block_size")
        if not size:
            raise ModelError(
                "This fp8 checkpoint has no weight_block_size.", fix="Only block FP8 can be read here."
            )
        fp8 = FORMATS["fp8_e4m3"]
        scheme = Scheme(Quant(fp8, per_block(*size)), Quant(fp8, per_group(size[1]), dynamic=True))
        return dict.fromkeys(names, scheme)

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`."""
        scale = tensors.get(f"{name}.weight_scale_inv")
        if scale is None:
            return None
        return Restored(Quantized(tensors[f"{name}.weight"], scale, None, scheme.weight), scheme, None)


FORMAT = Fp8Block()
