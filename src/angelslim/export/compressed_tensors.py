"""compressed-tensors checkpoints: what vLLM, SGLang and transformers load without being told anything.

==================== =========================================================== ===================
variant              tensors of a linear                                         schemes
==================== =========================================================== ===================
float-quantized      weight F8_E4M3, weight_scale, input_scale if static          FP8
int-quantized        weight I8, weight_scale, weight_zero_point if asymmetric     INT8 with inputs
pack-quantized       weight_packed I32, weight_scale, weight_shape,               INT4; INT8 weights
                     weight_zero_point (packed along out) if asymmetric           alone
nvfp4-pack-quantized weight_packed U8, weight_scale F8_E4M3, weight_global_scale, NVFP4
                     input_global_scale if inputs are quantized (both F32 [1])
mxfp4-pack-quantized weight_packed U8, weight_scale U8 (exponents)                MXFP4
mxfp8-quantized      weight F8_E4M3, weight_scale U8 (exponents)                  MXFP8
==================== =========================================================== ===================

`_arguments` writes and reads the entries of its config.
Per-tensor scales have shape ``[1]``, the others one element per tile. Layers may differ; each distinct scheme is a
group with its own variant, and the file as a whole is then ``mixed-precision``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics.packing import pack_fp4, pack_ints, unpack_fp4, unpack_ints
from ..numerics.quantize import Quantized, tile_of
from ..numerics.scales import e4m3_numbers, e8m0_bytes, from_e4m3, from_e8m0
from ..numerics.scheme import PER_TENSOR, Quant, Scheme
from ._arguments import arguments, quant_of
from ._cache import cache_arguments, refuses_cache
from .base import Restored

VARIANTS = {  # (number format, kind of scales) -> variant
    ("fp8_e4m3", "free"): "float-quantized",
    ("int8", "free"): "int-quantized",
    ("int8", "float16"): "int-quantized",
    ("int4", "free"): "pack-quantized",
    ("int4", "float16"): "pack-quantized",
    ("int4", "bfloat16"): "pack-quantized",
    ("int4", "fp8_channel"): "pack-quantized",
    ("fp4_e2m1", "e4m3"): "nvfp4-pack-quantized",
    ("fp4_e2m1", "e8m0"): "mxfp4-pack-quantized",
    ("fp8_e4m3", "e8m0"): "mxfp8-quantized",
}


def variant(scheme: Scheme) -> str:
    """Return the variant that holds such layers, or an empty string.

    Engines expect inputs to be quantized wherever INT8 weights are not packed.
    """
    weight = scheme.weight
    if (
        weight.format.name == "int8"
        and scheme.input is None
        and weight.granularity.kind in ("group", "channel")
    ):
        return "pack-quantized"
    return VARIANTS.get((weight.format.name, weight.scale), "")


class CompressedTensors:
    """Reads and writes the ``compressed-tensors`` layout."""

    method = "compressed-tensors"
    scale_name = "weight_scale"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Recognise the library's own name."""
        return settings.get("quant_method") == self.method

    def refuses(self, scheme: Scheme) -> str:
        """FP8 must be symmetric, packed weights per group or channel, static activations per tensor."""
        if not variant(scheme):
            return f"it has no variant for {scheme.weight.format.name} with {scheme.weight.scale} scales"
        if scheme.input and scheme.input.format.bits == 4 and scheme.input.scale == "free":
            return f"it has no {scheme.input.format.name} inputs with free scales"
        if scheme.weight.format.kind == "float" and not scheme.weight.symmetric:
            return "float weights are symmetric"
        if scheme.weight.format.name == "int4" and scheme.weight.granularity.kind not in ("group", "channel"):
            return "packed weights are per group or per channel"
        if scheme.input and not scheme.input.dynamic and scheme.input.granularity != PER_TENSOR:
            return "static activation scales are per tensor"
        if scheme.input and not scheme.input.dynamic and scheme.weight.format.bits == 4:
            return "no engine reads 4-bit weights with static activations from it; dynamic ones are read"
        return refuses_cache(scheme.kv)

    def refuses_together(self, schemes: Mapping[str, Scheme]) -> str:
        """Every layer may have a scheme of its own."""
        return ""

    def refuses_shape(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Every size fits; packed rows are padded."""
        return ""

    def stored(self, scheme: Scheme) -> Scheme:
        """Scales keep the type that they come in."""
        return scheme

    def describe(self, scheme: Scheme) -> str:
        """Name the variant."""
        return f"compressed-tensors ({variant(scheme)})"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the layer's tensors under the names that the library reads."""
        found = {f"{name}.weight_scale": _stored(weight)}
        if weight.global_scale is not None:
            found[f"{name}.weight_global_scale"] = weight.global_scale.reshape(1).float()
        if scheme.weight.format.name == "fp4_e2m1":
            found[f"{name}.weight_packed"] = pack_fp4(weight.codes)
        elif variant(scheme) == "pack-quantized":
            bits = weight.quant.format.bits
            found[f"{name}.weight_packed"] = pack_ints(weight.codes, bits)
            found[f"{name}.weight_shape"] = torch.tensor(weight.codes.shape, dtype=torch.int64)
            if weight.zero is not None:
                found[f"{name}.weight_zero_point"] = pack_ints(weight.zero, bits, dim=0)
        else:
            found[f"{name}.weight"] = weight.codes
            if weight.zero is not None:
                zero = weight.zero.reshape(1) if weight.quant.granularity == PER_TENSOR else weight.zero
                found[f"{name}.weight_zero_point"] = zero
        if input_scale is not None and scheme.input is not None:
            found[f"{name}.{_input_scale(scheme.input)}"] = input_scale.reshape(1).float()
        return found

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """One group for each distinct scheme: the commonest targets every Linear, the others name their layers."""
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(name)
        groups = {}
        commonest = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
        for index, (scheme, names) in enumerate(by_scheme.items()):
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if scheme == commonest else _targets(names, [*schemes, *ignore]),
                "weights": arguments(scheme.weight),
                "input_activations": arguments(scheme.input),
                "output_activations": None,
                "format": variant(scheme),
            }
        variants = {variant(scheme) for scheme in by_scheme}
        kv = next((scheme.kv for scheme in schemes.values() if scheme.kv is not None), None)
        return {
            "config_groups": groups,
            "quant_method": self.method,
            "kv_cache_scheme": None if kv is None else cache_arguments(kv),
            "format": variants.pop() if len(variants) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(ignore),
        }

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read the groups; one that names a layer outranks one for Linear."""
        read: list[tuple[Sequence[str], Scheme]] = []
        for group in _groups(config):
            weight = quant_of(group["weights"])
            assert weight is not None
            read.append((group["targets"], Scheme(weight, quant_of(group.get("input_activations")))))
        general = next((scheme for targets, scheme in read if "Linear" in targets), read[0][1])
        return {
            name: next(
                (scheme for targets, scheme in read if any(_matches(name, target) for target in targets)),
                general,
            )
            for name in names
        }

    def shape(self, parts: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """Codes have the layer's shape; two of FP4 share a byte, packed INT4 comes with a ``weight_shape``."""
        if scheme.weight.format.name == "fp4_e2m1":
            rows, columns = parts["weight_packed"]
            return rows, columns * 2
        rows, columns = parts["weight"]
        return rows, columns

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`."""
        scale = tensors.get(f"{name}.weight_scale")
        if scale is None:
            return None
        zero = tensors.get(f"{name}.weight_zero_point")
        outer = tensors.get(f"{name}.weight_global_scale")
        if scheme.weight.format.name == "fp4_e2m1":
            codes = unpack_fp4(tensors[f"{name}.weight_packed"])
        elif f"{name}.weight_packed" in tensors:
            rows, columns = (int(size) for size in tensors[f"{name}.weight_shape"])
            bits = scheme.weight.format.bits
            codes = unpack_ints(tensors[f"{name}.weight_packed"], bits, columns)
            zero = unpack_ints(zero, bits, rows, dim=0) if zero is not None else None
        else:
            codes = tensors[f"{name}.weight"]
        shape = (codes.shape[0], codes.shape[1])
        tile = tile_of(scheme.weight.granularity, shape)
        tiles = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
        zero = zero.reshape(tiles) if zero is not None else None
        if scheme.weight.scale == "e8m0":
            scale = from_e8m0(scale)
        elif scheme.weight.scale == "e4m3":
            outer = tensors[f"{name}.weight_global_scale"].reshape(1, 1)
            scale = from_e4m3(scale, outer)
        weight = Quantized(codes, scale.reshape(tiles), zero, scheme.weight, outer)
        given = tensors.get(f"{name}.{_input_scale(scheme.input)}") if scheme.input else None
        return Restored(weight, scheme, given)


def _stored(weight: Quantized) -> Tensor:
    """Return the scales in the form and shape that they have in the file."""
    if weight.quant.scale == "e8m0":
        return e8m0_bytes(weight.scale)
    if weight.quant.scale == "e4m3":
        assert weight.global_scale is not None
        return e4m3_numbers(weight.scale, weight.global_scale)
    return weight.scale.reshape(1) if weight.quant.granularity == PER_TENSOR else weight.scale


def _input_scale(quant: Quant) -> str:
    return "input_global_scale" if quant.scale == "e4m3" else "input_scale"


def _targets(names: Sequence[str], others: Iterable[str]) -> list[str]:
    """Describe layers by regular expressions over their numbers, where those match no other layer.

    A mixture of experts has tens of thousands of matrices in a group. What comes before the first number is left
    open up to the last component, since engines name a model's outer modules their own way.
    """
    inside = set(names)
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(_numbered(name), []).append(name)
    outside = [name for name in others if name not in inside]
    targets: list[str] = []
    for pattern, matched in patterns.items():
        alone = not any(re.fullmatch(pattern, name) for name in outside)
        targets += [f"re:{pattern}$"] if alone and len(matched) > 1 else matched
    return targets


def _numbered(name: str) -> str:
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), 1)
    kept = parts[max(first - 1, 0) :]
    return r"(.*\.)?" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in kept)


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups of a config; those that name a preset are spelled out by the library."""
    groups = list(dict(config["config_groups"]).values())
    if all(isinstance(group, Mapping) and group.get("weights") for group in groups):
        return groups
    from compressed_tensors.quantization import QuantizationConfig

    return list(
        QuantizationConfig.model_validate(dict(config)).model_dump(mode="json")["config_groups"].values()
    )


def _matches(name: str, target: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


FORMAT = CompressedTensors()
