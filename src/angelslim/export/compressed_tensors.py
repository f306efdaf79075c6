"""compressed-tensors checkpoints: what vLLM, SGLang and transformers load without being told anything.

================== ======================================================= =====================
variant            tensors of a linear                                     schemes
================== ======================================================= =====================
float-quantized    weight F8_E4M3, weight_scale, input_scale if static      FP8
int-quantized      weight I8, weight_scale, weight_zero_point if asymmetric INT8
pack-quantized     weight_packed I32, weight_scale, weight_shape,           INT4
                   weight_zero_point (packed along out) if asymmetric
================== ======================================================= =====================

The config is built and read through the library's own schema, so a field it does not know cannot be written.
Per-tensor scales have shape ``[1]``, the others one element per tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics.packing import pack_int4, unpack_int4
from ..numerics.quantize import Quantized, tile_of
from ..numerics.scheme import (
    FORMATS,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    Granularity,
    Quant,
    Scheme,
    per_block,
    per_group,
)
from .base import Restored

VARIANTS = {"fp8_e4m3": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}


class CompressedTensors:
    """Reads and writes the ``compressed-tensors`` layout."""

    method = "compressed-tensors"
    scale_name = "weight_scale"

    def refuses(self, scheme: Scheme) -> str:
        """FP8 must be symmetric, packed weights per group or channel, static activations per tensor."""
        if scheme.weight.format.name not in VARIANTS:
            return f"it has no variant for {scheme.weight.format.name}"
        if scheme.weight.format.kind == "float" and not scheme.weight.symmetric:
            return "float weights are symmetric"
        if scheme.weight.format.name == "int4" and scheme.weight.granularity.kind not in ("group", "channel"):
            return "packed weights are per group or per channel"
        if scheme.input and not scheme.input.dynamic and scheme.input.granularity != PER_TENSOR:
            return "static activation scales are per tensor"
        return ""

    def describe(self, scheme: Scheme) -> str:
        """Name the variant."""
        return f"compressed-tensors ({VARIANTS[scheme.weight.format.name]})"

    def tensors(
        self, name: str, weight: Quantized, scheme: Scheme, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the layer's tensors under the names that the library reads."""
        scale = weight.scale.reshape(1) if weight.quant.granularity == PER_TENSOR else weight.scale
        found = {f"{name}.weight_scale": scale}
        if scheme.weight.format.name == "int4":
            found[f"{name}.weight_packed"] = pack_int4(weight.codes)
            found[f"{name}.weight_shape"] = torch.tensor(weight.codes.shape, dtype=torch.int64)
            if weight.zero is not None:
                found[f"{name}.weight_zero_point"] = pack_int4(weight.zero, dim=0)
        else:
            found[f"{name}.weight"] = weight.codes
            if weight.zero is not None:
                zero = weight.zero.reshape(1) if weight.quant.granularity == PER_TENSOR else weight.zero
                found[f"{name}.weight_zero_point"] = zero
        if input_scale is not None:
            found[f"{name}.input_scale"] = input_scale.reshape(1).float()
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
                targets=["Linear"] if scheme == commonest else names,
                weights=_arguments(scheme.weight),
                input_activations=_arguments(scheme.input) if scheme.input else None,
                format=VARIANTS[scheme.weight.format.name],
            )
        variants = {VARIANTS[scheme.weight.format.name] for scheme in by_scheme}
        config = QuantizationConfig(
            config_groups=groups,
            format=variants.pop() if len(variants) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=list(ignore),
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

    def restore(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Restored | None:
        """Undo `tensors`."""
        scale = tensors.get(f"{name}.weight_scale")
        if scale is None:
            return None
        zero = tensors.get(f"{name}.weight_zero_point")
        if f"{name}.weight_packed" in tensors:
            rows, columns = (int(size) for size in tensors[f"{name}.weight_shape"])
            codes = unpack_int4(tensors[f"{name}.weight_packed"], columns)
            zero = unpack_int4(zero, rows, dim=0) if zero is not None else None
        else:
            codes = tensors[f"{name}.weight"]
        shape = (codes.shape[0], codes.shape[1])
        tile = tile_of(scheme.weight.granularity, shape)
        tiles = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
        zero = zero.reshape(tiles) if zero is not None else None
        weight = Quantized(codes, scale.reshape(tiles), zero, scheme.weight)
        return Restored(weight, scheme, tensors.get(f"{name}.input_scale"))


def _arguments(quant: Quant) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    granularity = quant.granularity
    details: dict[str, Any] = {"strategy": granularity.kind}
    if granularity.kind == "group":
        details["group_size"] = granularity.columns
    elif granularity.kind == "block":
        details["block_structure"] = [granularity.rows, granularity.columns]
    return QuantizationArgs(
        num_bits=quant.format.bits,
        type=quant.format.kind,
        symmetric=quant.symmetric,
        dynamic=quant.dynamic,
        **details,
    )


def _scheme(group: Any) -> Scheme:
    given = group.input_activations
    return Scheme(_quant(group.weights), _quant(given) if given else None)


def _quant(arguments: Any) -> Quant:
    kind = str(getattr(arguments.type, "value", arguments.type))
    name = "fp8_e4m3" if kind == "float" else f"int{arguments.num_bits}"
    granularity: dict[str, Granularity] = {"tensor": PER_TENSOR, "channel": PER_CHANNEL, "token": PER_TOKEN}
    strategy = str(getattr(arguments.strategy, "value", arguments.strategy))
    if strategy == "group":
        chosen = per_group(arguments.group_size)
    elif strategy == "block":
        chosen = per_block(*arguments.block_structure)
    else:
        chosen = granularity[strategy]
    return Quant(FORMATS[name], chosen, bool(arguments.symmetric), bool(arguments.dynamic))


FORMAT = CompressedTensors()
