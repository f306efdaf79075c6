"""Our own packed layout for weights of one to three bits, which no other format holds at its true size.

====================  ==========================================================  ====================
tensor of a linear    what                                                        bits a weight
====================  ==========================================================  ====================
weight_packed U8      SEQ, ternary, int2: ``[out, in / 4]``                       2
weight_packed U8      int3: ``[out, ceil(in * 3 / 8)]``                           3
weight_packed U8      3:4 sparse ternary (Sherry): ``[out, ceil(in / 4 * 5 / 8)]``  1.25
weight_scale          ``[out, in / group]``, or ``[out, 1]``; F16, BF16 or F32    16 or 32 a group
weight_shape I64      ``[out, in]``
====================  ==========================================================  ====================

The fields of a row form one stream of bits in the order of the inputs, the first field in the lowest bits of the first
byte; the last byte is filled with zeros. A field is the code minus the smallest one, so that a weight is ``scale *
(field - 1.5)`` for SEQ, ``scale * (field - 1)`` for ternary, ``scale * (field - 2)`` and ``scale * (field - 4)`` for int2 and
int3. Sherry's fields are the five-bit codes of four weights (`numerics.lowbit.sparse34`).

config.json says ``quant_method: angelslim`` with the layout's version, and for each group of layers the number format,
the group size and the scales' type. `angelslim.load` opens such a folder; `angelslim export` turns it into GGUF where a
GGUF type holds the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ModelError
from ..numerics.lowbit.sparse34 import decode34, encode34
from ..numerics.packing import pack_bits, unpack_bits
from ..numerics.quantize import Quantized
from ..numerics.scheme import PER_CHANNEL, Quant, Scheme, format_named, per_group
from .base import Restored

VERSION = 1
PLAIN = ("seq2", "ternary", "int2", "int3")  # one field a weight
FIVE_BITS = "ternary34"
SCALES = {"free": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LowBitLayout:
    """Reads and writes the packed layout."""

    method = "angelslim"
    scale_name = "weight_scale"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Recognise our own name."""
        return settings.get("quant_method") == self.method

    def refuses(self, scheme: Scheme) -> str:
        """Weights alone, of the three formats, a scale a row or group."""
        weight = scheme.weight
        if weight.format.name not in (*PLAIN, FIVE_BITS):
            return f"it holds weights of one to three bits, not {weight.format.name}"
        if scheme.input is not None or scheme.kv is not None:
            return "it says nothing of activations"
        if weight.granularity.kind not in ("group", "channel") or weight.scale not in SCALES:
            return "scales are one number a row or group"
        return ""

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """Every layer may have a scheme of its own."""
        return ""

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Rows are packed by fours."""
        return "" if shape[1] % 4 == 0 else f"the {shape[1]} inputs of a layer are not a multiple of 4"

    def stored(self, scheme: Scheme) -> Scheme:
        """Scales keep the type that they come in."""
        return scheme

    def describe(self, scheme: Scheme) -> str:
        """Name the layout with the bits of a code."""
        return f"angelslim packed ({scheme.weight.format.stored_bits:g} bit)"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return packed codes, scales and the shape."""
        grid = weight.quant.format
        if grid.name == FIVE_BITS:
            packed = pack_bits(encode34(weight.codes), 5)
        else:
            packed = pack_bits((weight.codes - int(grid.low)).to(torch.uint8), grid.bits)
        return {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": weight.scale.to(SCALES[weight.quant.scale]),
            f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """List the layers of each distinct scheme."""
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(name)
        groups = [
            {
                "format": scheme.weight.format.name,
                "group_size": scheme.weight.granularity.columns or -1,
                "scales": scheme.weight.scale,
                "layers": names,
            }
            for scheme, names in by_scheme.items()
        ]
        return {"quant_method": self.method, "version": VERSION, "groups": groups, "ignore": list(ignore)}

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read each layer's scheme back; a layer of no group, or a newer version, is a `ModelError`."""
        if config.get("version") != VERSION:
            raise ModelError(
                f"The packed layout has version {config.get('version')!r}; {VERSION} is known here.",
                fix="Update angelslim.",
            )
        found: dict[str, Scheme] = {}
        for group in config["groups"]:
            size = int(group["group_size"])
            grain = PER_CHANNEL if size == -1 else per_group(size)
            scheme = Scheme(Quant(format_named(group["format"]), grain, scale=group["scales"]))
            found |= dict.fromkeys(group["layers"], scheme)
        absent = [name for name in names if name not in found]
        if absent:
            raise ModelError(
                f"config.json does not say how {absent[0]!r} is packed.",
                fix="Use the config.json that belongs to these weights.",
            )
        return {name: found[name] for name in names}

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """Not asked: the file holds the shape itself."""
        raise KeyError("weight_shape")

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`."""
        packed = tensors.get(f"{name}.weight_packed")
        if packed is None:
            return None
        columns = int(tensors[f"{name}.weight_shape"][1])
        grid = scheme.weight.format
        if grid.name == FIVE_BITS:
            codes = decode34(unpack_bits(packed, 5, columns // 4))
        else:
            codes = unpack_bits(packed, grid.bits, columns).to(torch.int8) + int(grid.low)
        weight = Quantized(codes, tensors[f"{name}.weight_scale"], None, scheme.weight)
        return Restored(weight, scheme, None)


FORMAT = LowBitLayout()
