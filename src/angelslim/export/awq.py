"""The AWQ layout (``quant_method: awq``, version ``gemm``), which AutoAWQ began and vLLM and SGLang load.

===========  =====  ==================  ==================================================
tensor       dtype  shape               what it holds
===========  =====  ==================  ==================================================
``qweight``  I32    ``[in, out/8]``     codes 0..15, packed along the output
``qzeros``   I32    ``[in/g, out/8]``   zero points 0..15, packed in the same way
``scales``   F16    ``[in/g, out]``     one for each group of g inputs
===========  =====  ==================  ==================================================

A weight is ``(code - zero) * scale``. Each word takes eight neighbours in the order 0, 2, 4, 6, 1, 3, 5, 7, which
suits the kernel that the layout was made for. The layout says how numbers are kept, not how they were chosen: any
method's INT4 weights with zero points fit.
"""

from __future__ import annotations

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
BITS, MIDDLE = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqLayout:
    """Reads and writes the ``gemm`` version with zero points."""

    method = NAME
    scale_name = "scales"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Recognise the method's name."""
        return settings.get("quant_method") == self.method

    def refuses(self, scheme: Scheme) -> str:
        """INT4 weights with zero points, per group or per channel, nothing else quantized."""
        weight = scheme.weight
        if weight.format.name != "int4" or weight.granularity.kind not in ("group", "channel"):
            return "weights must be INT4, per group or per channel"
        if weight.symmetric:
            return "weights must have zero points (zero_point: true)"
        if weight.scale not in PLAIN_SCALES:
            return f"scales must be float16 numbers, not {weight.scale}"
        return weights_only(scheme)

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """The config names one group size."""
        return one_scheme(schemes)

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Words are whole."""
        return whole_words(shape, BITS)

    def stored(self, scheme: Scheme) -> Scheme:
        """Scales are kept in float16."""
        return replace(scheme, weight=replace(scheme.weight, scale="float16"))

    def describe(self, scheme: Scheme) -> str:
        """Name the layout."""
        return "AWQ layout (gemm)"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the three tensors of a layer."""
        assert weight.zero is not None
        return {
            f"{name}.qweight": pack_words(weight.codes.int().T + MIDDLE, BITS, ORDER),
            f"{name}.qzeros": pack_words(weight.zero.int().T + MIDDLE, BITS, ORDER),
            f"{name}.scales": exactly(weight.scale, torch.float16, name).T.contiguous(),
        }

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Return the block that engines read; they match the linears left alone by substring."""
        return {
            "quant_method": self.method,
            "version": "gemm",
            "bits": BITS,
            "group_size": next(iter(schemes.values())).weight.granularity.columns or -1,
            "zero_point": True,
            "modules_to_not_convert": list(ignore) or None,
        }

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read the group size; other versions of the layout are refused."""
        bits = int(config.get("bits", config.get("w_bit", BITS)))
        size = int(config.get("group_size", config.get("q_group_size", 128)))
        version = str(config.get("version", "gemm")).lower()
        if bits != BITS or version != "gemm" or not config.get("zero_point", True):
            raise ModelError(
                f"The {NAME} checkpoint has {bits} bits, version {version!r}, zero_point {config.get('zero_point')}.",
                fix="Only 4 bits, version 'gemm', with zero points can be read here.",
            )
        granularity = PER_CHANNEL if size == -1 else per_group(size)
        return dict.fromkeys(
            names, Scheme(Quant(FORMATS["int4"], granularity, symmetric=False, scale="float16"))
        )

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """Words run along the output."""
        columns, words = parts["qweight"]
        return words * 32 // BITS, columns

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`."""
        if f"{name}.scales" not in tensors:
            return None
        codes, zero = (
            (unpack_words(tensors[f"{name}.{part}"], BITS, ORDER) - MIDDLE).T.contiguous().to(torch.int8)
            for part in ("qweight", "qzeros")
        )
        scale = tensors[f"{name}.scales"].T.contiguous()
        return Restored(Quantized(codes, scale, zero, scheme.weight), scheme, None)


FORMAT = AwqLayout()
