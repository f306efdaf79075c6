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

The config is built and read through the library's own schema, so a field it does not know cannot be written.
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
from ..numerics.scheme import (
    FORMATS,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    Granularity,
    Quant,
    ScaleKind,
    Scheme,
    per_block,
    per_group,
)
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
SCALE_TYPES = {  # where the config has to say it
    "e8m0": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
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
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(name)
        groups = {}
        commonest = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
        for index, (scheme, names) in enumerate(by_scheme.items()):
            groups[f"group_{index}"] = QuantizationScheme(
                targets=["Linear"] if scheme == commonest else _targets(names, [*schemes, *ignore]),
                weights=_arguments(scheme.weight),
                input_activations=_arguments(scheme.input) if scheme.input else None,
                format=variant(scheme),
            )
        variants = {variant(scheme) for scheme in by_scheme}
        config = QuantizationConfig(
            config_groups=groups,
            format=variants.pop() if len(variants) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=list(ignore),
            kv_cache_scheme=cache_arguments(kv) if (kv := _cache(schemes)) is not None else None,
        )
        written: dict[str, Any] = config.model_dump(mode="json", exclude={"moe_sparsity_config"})
        return written

    def schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scheme]:
        """Read the groups through the library's schema; a group that names a layer outranks one for Linear."""
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils.match import match_name

        groups = QuantizationConfig.model_validate(dict(config)).config_groups.values()
        read = [(group.targets, _scheme(group)) for group in groups]
        general = next((scheme for targets, scheme in read if "Linear" in targets), read[0][1])
        return {
            name: next(
                (scheme for targets, scheme in read if any(match_name(name, target) for target in targets)),
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


def _arguments(quant: Quant) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    granularity = quant.granularity
    details: dict[str, Any] = {"strategy": granularity.kind}
    dynamic: bool | str = quant.dynamic
    if quant.scale in SCALE_TYPES:
        details["scale_dtype"] = SCALE_TYPES[quant.scale]
    if quant.scale == "e4m3":
        details["strategy"] = "tensor_group"
        dynamic = "local" if quant.dynamic else False
    if granularity.kind == "group":
        details["group_size"] = granularity.columns
    elif granularity.kind == "block":
        details["block_structure"] = [granularity.rows, granularity.columns]
    return QuantizationArgs(
        num_bits=quant.format.bits,
        type=quant.format.kind,
        symmetric=quant.symmetric,
        dynamic=dynamic,
        **details,
    )


def _cache(schemes: Mapping[str, Scheme]) -> Quant | None:
    return next((scheme.kv for scheme in schemes.values() if scheme.kv is not None), None)


def _scheme(group: Any) -> Scheme:
    given = group.input_activations
    weight, inputs = _quant(group.weights), _quant(given) if given else None
    return Scheme(weight, inputs)


def _quant(arguments: Any) -> Quant:
    kind = str(getattr(arguments.type, "value", arguments.type))
    name = (
        {8: "fp8_e4m3", 4: "fp4_e2m1"}[arguments.num_bits] if kind == "float" else f"int{arguments.num_bits}"
    )
    granularity: dict[str, Granularity] = {"tensor": PER_TENSOR, "channel": PER_CHANNEL, "token": PER_TOKEN}
    strategy = str(getattr(arguments.strategy, "value", arguments.strategy))
    if strategy in ("group", "tensor_group"):
        chosen = per_group(arguments.group_size)
    elif strategy == "block":
        chosen = per_block(*arguments.block_structure)
    else:
        chosen = granularity[strategy]
    scale: ScaleKind = "free"
    if strategy == "tensor_group":
        scale = "e4m3"
    elif strategy == "group" and (name == "fp4_e2m1" or arguments.scale_dtype == torch.uint8):
        scale = "e8m0"
    elif arguments.scale_dtype in (torch.float16, torch.bfloat16):
        scale = "float16" if arguments.scale_dtype == torch.float16 else "bfloat16"
    return Quant(FORMATS[name], chosen, bool(arguments.symmetric), bool(arguments.dynamic), scale)


FORMAT = CompressedTensors()
