"""Native FP8 blocks, the layout in which DeepSeek-V3 was published: ``quant_method: fp8``.

A linear holds ``weight`` F8_E4M3 ``[out, in]`` and ``weight_scale_inv`` F32 ``[ceil(out/r), ceil(in/c)]``, which
despite its name is the factor to multiply with. Published checkpoints also keep it in bfloat16 or, as powers of
two, in one exponent byte (``scale_fmt: ue8m0``); both are read. Activations are quantized while running, per token and per
group of c inputs. vLLM, SGLang and transformers' fine-grained FP8 read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics.quantize import Quantized
from ..numerics.scheme import FORMATS, Quant, Scheme, per_block, per_group
from .base import Restored, one_scheme


class Fp8Block:
    """Reads and writes block-scaled FP8 in the DeepSeek layout."""

    method = "fp8"
    scale_name = "weight_scale_inv"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Recognise the engine's FP8 with a block size; without one it is `fp8_tensor`."""
        return settings.get("quant_method") == self.method and bool(settings.get("weight_block_size"))

    def refuses(self, scheme: Scheme) -> str:
        """Only symmetric E4M3 blocks with dynamic activations."""
        weight, given = scheme.weight, scheme.input
        if weight.format.name != "fp8_e4m3" or weight.granularity.kind != "block" or not weight.symmetric:
            return "weights must be FP8 E4M3 per block"
        if given is None or not given.dynamic or given.format.name != "fp8_e4m3":
            return "activations must be dynamic FP8"
        if given.granularity != per_group(weight.granularity.columns):
            return f"activations must be per group of {weight.granularity.columns}"
        return "the KV cache cannot be quantized in it" if scheme.kv is not None else ""

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """The config names one block size."""
        return one_scheme(schemes)

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Every size fits."""
        return ""

    def stored(self, scheme: Scheme) -> Scheme:
        """Scales are kept in float32."""
        return scheme

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
        size = config["weight_block_size"]
        fp8 = FORMATS["fp8_e4m3"]
        scheme = Scheme(Quant(fp8, per_block(*size)), Quant(fp8, per_group(size[1]), dynamic=True))
        return dict.fromkeys(names, scheme)

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """One code for each weight."""
        rows, columns = parts["weight"]
        return rows, columns

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`; scales in bfloat16 or as bare exponents (UE8M0) become the same numbers in float32."""
        scale = tensors.get(f"{name}.weight_scale_inv")
        if scale is None:
            return None
        scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
        return Restored(Quantized(tensors[f"{name}.weight"], scale, None, scheme.weight), scheme, None)


FORMAT = Fp8Block()
