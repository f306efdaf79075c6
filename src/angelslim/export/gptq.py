"""The GPTQ layout (``quant_method: gptq``), which AutoGPTQ began and vLLM, SGLang and GPTQModel load.

============  =====  ==================  ======================================================
tensor        dtype  shape               what it holds
============  =====  ==================  ======================================================
``qweight``   I32    ``[in*b/32, out]``  unsigned codes, packed along the input
``qzeros``    I32    ``[in/g, out*b/32]``  zero points less one, packed along the output
``scales``    F16    ``[in/g, out]``     one for each group of g inputs (per channel: one row)
``g_idx``     I32    ``[in]``            the group of each input, here always in order
============  =====  ==================  ======================================================

Codes have b = 4 or 8 bits. A symmetric weight ``code * scale`` with code -8..7 is stored as code + 8 with the zero
point 8, so as 7. Engines run symmetric weights only, so only those are written; zero points are read. Inputs in an
order of their own (``desc_act`` with groups), which vLLM no longer runs, and version 2 of the layout, which does not
subtract one, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ModelError
from ..numerics.quantize import Quantized
from ..numerics.scheme import FORMATS, PER_CHANNEL, PLAIN_SCALES, Quant, Scheme, per_group
from ._words import exactly, pack_words, unpack_words, whole_words
from .base import Restored, one_scheme, weights_only

NAME = __name__.rpartition(".")[2]
BITS = {"int4": 4, "int8": 8}


class GptqLayout:
    """Reads and writes version 1 of the layout."""

    method = NAME
    scale_name = "scales"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Recognise the method's name."""
        return settings.get("quant_method") == self.method

    def refuses(self, scheme: Scheme) -> str:
        """Symmetric integer weights per group or channel, nothing else quantized."""
        weight = scheme.weight
        if weight.format.name not in BITS or weight.granularity.kind not in ("group", "channel"):
            return "weights must be INT4 or INT8, per group or per channel"
        if not weight.symmetric:
            return "weights must be symmetric, since engines read no zero points in it"
        if weight.scale not in PLAIN_SCALES:
            return f"scales must be float16 numbers, not {weight.scale}"
        return weights_only(scheme)

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """The config names one number of bits and one group size."""
        return one_scheme(schemes)

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Words are whole."""
        return whole_words(shape, scheme.weight.format.bits)

    def stored(self, scheme: Scheme) -> Scheme:
        """Scales are kept in float16."""
        return replace(scheme, weight=replace(scheme.weight, scale="float16"))

    def describe(self, scheme: Scheme) -> str:
        """Name the layout."""
        return f"GPTQ layout ({scheme.weight.format.bits} bit)"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the four tensors of a symmetric layer."""
        bits = scheme.weight.format.bits
        middle = 2 ** (bits - 1)
        inputs, groups = weight.codes.shape[1], weight.scale.shape[1]
        zeros = torch.full((groups, weight.codes.shape[0]), middle - 1)
        return {
            f"{name}.qweight": pack_words(weight.codes.int() + middle, bits).T.contiguous(),
            f"{name}.qzeros": pack_words(zeros, bits),
            f"{name}.scales": exactly(weight.scale, torch.float16, name).T.contiguous(),
            f"{name}.g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
        }

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Return the block that engines read; linears left alone are excluded by name."""
        weight = next(iter(schemes.values())).weight
        return {
            "quant_method": self.method,
            "bits": weight.format.bits,
            "group_size": weight.granularity.columns or -1,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": NAME,
            "static_groups": True,
            "true_sequential": True,
            "lm_head": "lm_head" in schemes,
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignore if name != "lm_head"},
        }

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read bits, group size and symmetry; rules that change them for some layers are refused."""
        bits, size, version = int(config["bits"]), int(config["group_size"]), config.get("checkpoint_format")
        problem = ""
        if f"int{bits}" not in BITS:
            problem = f"codes of {bits} bits"
        elif version not in (None, NAME):
            problem = f"the checkpoint_format {version!r}"
        elif any(not rule.startswith("-:") for rule in config.get("dynamic") or ()):
            problem = "rules for single layers (dynamic)"
        if problem:
            raise ModelError(f"The {NAME} checkpoint has {problem}.", fix="Load it in its own engine.")
        granularity = PER_CHANNEL if size == -1 else per_group(size)
        quant = Quant(FORMATS[f"int{bits}"], granularity, bool(config.get("sym", True)), scale="float16")
        return dict.fromkeys(names, Scheme(quant))

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """Words run along the input."""
        words, rows = parts["qweight"]
        return rows, words * 32 // scheme.weight.format.bits

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`; inputs out of order, or zero points that a symmetric layer cannot have, are refused."""
        if f"{name}.scales" not in tensors:
            return None
        bits = scheme.weight.format.bits
        middle, mask = 2 ** (bits - 1), 2**bits - 1
        codes = unpack_words(tensors[f"{name}.qweight"].T, bits) - middle
        zeros = ((unpack_words(tensors[f"{name}.qzeros"], bits) + 1) & mask) - middle
        scale = tensors[f"{name}.scales"].T.contiguous()
        order = tensors.get(f"{name}.g_idx")
        inputs, groups = codes.shape[1], scale.shape[1]
        if order is not None and not torch.equal(
            order.long().cpu(), torch.arange(inputs) // (inputs // groups)
        ):
            raise ModelError(
                f"The inputs of layer {name!r} are not in order (desc_act).",
                fix="Use a checkpoint made with desc_act: false, or with static groups.",
            )
        if scheme.weight.symmetric and zeros.any():
            raise ModelError(
                f"Layer {name!r} has zero points, and its config.json says sym: true.", fix="Copy it again."
            )
        zero = None if scheme.weight.symmetric else zeros.T.contiguous().to(torch.int8)
        return Restored(Quantized(codes.to(torch.int8), scale, zero, scheme.weight), scheme, None)


FORMAT = GptqLayout()
