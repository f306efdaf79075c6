"""SGLang's W4A8-FP8 for DeepSeek-type mixtures (``quant_method: w4afp8``): INT4 experts, the rest FP8 in blocks.

=============  ====================  ========================  ================================================
layer          tensor                dtype, shape              what it holds
=============  ====================  ========================  ================================================
routed expert  ``weight``            I8 ``[out, in/2]``        two signed nibbles a byte, the even input lowest
..             ``weight_scale_inv``  F32 ``[out, in/128]``     group scales, each a bfloat16 number
..             ``input_scale``       BF16, scalar              static scale of its FP8 inputs
any other      ``weight``            F8_E4M3 ``[out, in]``     codes
..             ``weight_scale_inv``  F32 ``[out/128, in/128]`` tile scales, as in `fp8_block`
=============  ====================  ========================  ================================================

The engine tells the two apart by the kind of the layer: routed experts are INT4, every other linear of the decoder is
FP8 whatever the config lists, so none should be left in full precision but routers and the head. It computes with
group scales in bfloat16, so they must be such numbers; it keeps one input scale for all experts of a layer, the
largest, in bfloat16, so input scales are rounded up to that. Needs a GPU of the Hopper generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..numerics.quantize import Quantized
from ..numerics.scheme import FORMATS, PER_TENSOR, Quant, Scheme, per_block, per_group
from . import fp8_block
from ._words import exactly
from .base import Restored

NAME = __name__.rpartition(".")[2]
FP8, GROUP = FORMATS["fp8_e4m3"], per_group(128)
DENSE = Scheme(Quant(FP8, per_block(128, 128)), Quant(FP8, GROUP, dynamic=True))


def is_expert(name: str) -> bool:
    """Say whether a layer is one of the routed experts, by the name that its matrix has in the checkpoint."""
    return ".experts." in name


class W4AFp8:
    """Reads and writes the mixture of INT4 experts and FP8 blocks."""

    method = NAME
    scale_name = "weight_scale_inv"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Recognise the engine's name for it."""
        return settings.get("quant_method") == NAME

    def refuses(self, scheme: Scheme) -> str:
        """Two schemes and no other."""
        experts = _four_bit(scheme.weight) and scheme.input == Quant(FP8, PER_TENSOR) and scheme.kv is None
        if scheme == DENSE or experts:
            return ""
        return f"layers must be INT4 {GROUP} with static FP8 inputs, or {DENSE}"

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """Routed experts are INT4 and nothing else is."""
        wrong = [name for name, scheme in schemes.items() if is_expert(name) == (scheme == DENSE)]
        if wrong:
            return f"{wrong[0]!r} as {schemes[wrong[0]]}: routed experts must be INT4, every other layer FP8 blocks"
        return "" if any(map(is_expert, schemes)) else "a model without routed experts"

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Groups of 128 are even, so every size that they divide fits."""
        return ""

    def stored(self, scheme: Scheme) -> Scheme:
        """Experts' scales are numbers of bfloat16."""
        if scheme == DENSE:
            return scheme
        return replace(scheme, weight=replace(scheme.weight, scale="bfloat16"))

    def describe(self, scheme: Scheme) -> str:
        """Name the layout."""
        return "w4afp8 (INT4 experts, FP8 blocks elsewhere)"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return an expert's packed codes, group scales and input scale, or the tensors of a tiled layer."""
        if not _four_bit(scheme.weight):
            return fp8_block.FORMAT.tensors(name, weight, scheme, input_scale)
        assert input_scale is not None
        nibbles = weight.codes & 0xF
        return {
            f"{name}.weight": (nibbles[:, 1::2] << 4 | nibbles[:, ::2]).contiguous(),
            f"{name}.weight_scale_inv": exactly(weight.scale, torch.bfloat16, name).float(),
            f"{name}.input_scale": _rounded_up(input_scale.reshape(())),
        }

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Return the block; the engine reads its first entry alone, the others are for people and for us."""
        return {
            "quant_method": NAME,
            "group_size": GROUP.columns,
            "weight_block_size": [DENSE.weight.granularity.rows, DENSE.weight.granularity.columns],
            "modules_to_not_convert": list(ignore),
        }

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Tell experts from other layers by their names."""
        expert = Scheme(Quant(FORMATS["int4"], GROUP, scale="bfloat16"), Quant(FP8, PER_TENSOR))
        return {name: expert if is_expert(name) else DENSE for name in names}

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """Two codes of an expert share a byte."""
        rows, columns = parts["weight"]
        return rows, columns * 2 if _four_bit(scheme.weight) else columns

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`."""
        if not _four_bit(scheme.weight):
            return fp8_block.FORMAT.restore(name, tensors, scheme)
        scale = tensors.get(f"{name}.weight_scale_inv")
        if scale is None:
            return None
        packed = tensors[f"{name}.weight"]
        codes = torch.stack((packed << 4 >> 4, packed >> 4), dim=-1).flatten(
            1
        )  # shifts of int8 keep the sign
        given = tensors.get(f"{name}.input_scale")
        weight = Quantized(codes, scale.float(), None, scheme.weight)
        return Restored(weight, scheme, None if given is None else given.float())


def _four_bit(quant: Quant) -> bool:
    return quant.format.name == "int4" and quant.granularity == GROUP and quant.symmetric


def _rounded_up(scale: Tensor) -> Tensor:
    """Return the smallest bfloat16 number that is no less: nothing may saturate that did not."""
    near = scale.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < scale.float(), above, near)


FORMAT = W4AFp8()
