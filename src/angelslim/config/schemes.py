"""Schemes from words: a named base, adjusted by granularities, or spelled out in full.

What no engine computes is refused here, before a model is opened: per-token weights, static scales per input
token, groups of size zero, zero points on floating-point grids.
"""

from __future__ import annotations

from dataclasses import replace

from ..base.errors import ConfigError, SchemeError, did_you_mean
from ..numerics.scheme import (
    FORMATS,
    PER_CHANNEL,
    PER_HEAD,
    PER_TENSOR,
    PER_TOKEN,
    PRESETS,
    Granularity,
    Quant,
    Scheme,
    per_block,
    per_group,
)
from .fields import Grain
from .quantization import ExplicitScheme, Quantization, QuantMethod, TensorScheme
from .training import TensorQuant, TrainedQuant

_GROUP, _TILE = 128, (128, 128)
_INT4, _INT8, _FP8 = FORMATS["int4"], FORMATS["int8"], FORMATS["fp8_e4m3"]
_INT4_GROUPS = Quant(_INT4, per_group(_GROUP))

# Bases of public method names, and other schemes with a name, that are not presets of their own.
EXTRA: dict[str, Scheme] = {
    "fp8_static_channel": Scheme(Quant(_FP8, PER_CHANNEL), Quant(_FP8, PER_TENSOR)),
    "fp8_dynamic_tensor": Scheme(Quant(_FP8, PER_TENSOR), Quant(_FP8, PER_TENSOR, dynamic=True)),
    "fp8_weight_only": Scheme(Quant(_FP8, PER_CHANNEL)),
    "int8_weight_only": Scheme(Quant(_INT8, PER_CHANNEL)),
    "int8_static": Scheme(Quant(_INT8, PER_CHANNEL), Quant(_INT8, PER_TENSOR)),
    "int4_g64": Scheme(Quant(_INT4, per_group(64))),
    "int4_g32": Scheme(Quant(_INT4, per_group(32))),
    "int4_asym": Scheme(replace(_INT4_GROUPS, symmetric=False)),
    "int4_asym_g64": Scheme(Quant(_INT4, per_group(64), symmetric=False)),
    "int4_asym_g32": Scheme(Quant(_INT4, per_group(32), symmetric=False)),
    "w4a8_fp8_static": Scheme(_INT4_GROUPS, Quant(_FP8, PER_TENSOR)),
    "w4a8_int8": Scheme(_INT4_GROUPS, Quant(_INT8, PER_TOKEN, dynamic=True)),
}
_QTYPES = {"int4": _INT4, "int8": _INT8, "fp8": _FP8, "fp8_e4m3": _FP8}


def base(name: str) -> Scheme | None:
    """The scheme a method starts from, or None when the numerics have no such format."""
    return PRESETS.get(name) or EXTRA.get(name)


def adjusted(scheme: Scheme, method: QuantMethod, where: str) -> Scheme:
    """Apply the granularities and the zero point of ``quant_method`` to a base scheme."""
    where = f"{where}.quant_method"
    weight, inputs, kv = scheme.weight, scheme.input, scheme.kv
    if weight.scale in ("e8m0", "e4m3"):
        _check_words(weight.granularity.columns, method, where)
    else:
        weight, inputs = _coarser_or_finer(weight, inputs, method, where)
    if method.kv_cache is not None:
        kv = _kv(method.kv_cache, f"{where}.kv_cache")
    return Scheme(weight, inputs, kv)


def _coarser_or_finer(
    weight: Quant, inputs: Quant | None, method: QuantMethod, where: str
) -> tuple[Quant, Quant | None]:
    grain = method.weight
    if grain is None and method.block_size and weight.format.kind == "float":
        grain = "per-block"
    if grain is None and method.group_size is not None and weight.granularity.kind == "group":
        grain = "per-group"
    if grain is not None:
        weight = replace(weight, granularity=_weight_grain(grain, method, f"{where}.weight"))
    if method.zero_point is not None:
        if method.zero_point and weight.format.kind == "float":
            fix = "Remove it, or choose an integer format."
            raise ConfigError(f"A zero point on {weight.format.name} makes no sense.", where=where, fix=fix)
        weight = replace(weight, symmetric=not method.zero_point)
    return weight, None if inputs is None else _input(inputs, weight, grain, method, f"{where}.activation")


def _check_words(size: int, method: QuantMethod, where: str) -> None:
    """Refuse what contradicts a number format that brings its own groups of `size`, for weights and inputs.

    Public files say of NVFP4 inputs that they are per-tensor, which is true of the static part of their scales.
    """
    sizes = {size} | {method.group_size or size} | {(method.block_size or [size])[-1]}
    weights = method.weight in (None, "per-group", "per-block")
    inputs = method.activation in (None, "per-group", "per-block", "per-tensor")
    if sizes == {size} and weights and inputs and not method.zero_point:
        return
    fix = "Leave these words out, or name another scheme."
    raise ConfigError(
        f"This number format has symmetric groups of {size}, and no others.", where=where, fix=fix
    )


def _input(inputs: Quant, weight: Quant, grain: Grain | None, method: QuantMethod, where: str) -> Quant:
    blocks = grain == "per-block"
    if blocks and method.activation in (None, "per-block"):
        return replace(inputs, granularity=per_group(weight.granularity.columns), dynamic=True)
    if weight.granularity.kind == "block" and grain is None:
        return replace(inputs, granularity=per_group(weight.granularity.columns))
    if method.activation is None:
        return inputs
    if not inputs.dynamic and method.activation != "per-tensor":
        fix = "Use activation: per-tensor, or a dynamic method."
        raise ConfigError(f"Static activation scales cannot be {method.activation}.", where=where, fix=fix)
    return replace(inputs, granularity=_input_grain(method.activation, method, where))


def _weight_grain(grain: Grain, method: QuantMethod, where: str) -> Granularity:
    if grain == "per-tensor":
        return PER_TENSOR
    if grain == "per-channel":
        return PER_CHANNEL
    if grain == "per-group":
        return _group(_GROUP if method.group_size is None else method.group_size, where)
    if grain == "per-block":
        return _block(method.block_size, where)
    fix = "Use per-tensor, per-channel, per-group or per-block."
    raise ConfigError(f"Weights cannot be {grain}.", where=where, fix=fix)


def _input_grain(grain: Grain, method: QuantMethod, where: str) -> Granularity:
    if grain == "per-tensor":
        return PER_TENSOR
    if grain == "per-token":
        return PER_TOKEN
    if grain == "per-block":
        return per_group(_block(method.block_size, where).columns)
    if grain == "per-group":
        return _group(_GROUP if method.group_size is None else method.group_size, where)
    fix = "Use per-tensor, per-token or per-group."
    raise ConfigError(f"Activations cannot be {grain}.", where=where, fix=fix)


def _group(size: int, where: str) -> Granularity:
    if size == -1:
        return PER_CHANNEL
    if size < 1:
        fix = "Use 32, 64 or 128, or -1 for one scale per output channel."
        raise ConfigError(f"group_size {size} is impossible.", where=where, fix=fix)
    return per_group(size)


def _block(size: list[int] | None, where: str) -> Granularity:
    sizes = list(_TILE) if size is None else size * 2 if len(size) == 1 else size
    if len(sizes) != 2 or min(sizes) < 1:
        fix = "Give rows and columns, as in [128, 128]."
        raise ConfigError(f"block_size {size} is impossible.", where=where, fix=fix)
    return per_block(*sizes)


def _kv(grain: Grain, where: str) -> Quant:
    """Caches are FP8 whatever the weights are: engines keep no others."""
    if grain not in ("per-tensor", "per-head"):
        fix = "Use per-tensor or per-head."
        raise ConfigError(f"The KV cache cannot be {grain}.", where=where, fix=fix)
    return Quant(_FP8, PER_TENSOR if grain == "per-tensor" else PER_HEAD)


def explicit(scheme: str | ExplicitScheme, method: QuantMethod, where: str) -> Scheme:
    """The scheme that ``quantization.scheme`` names or spells out."""
    where = f"{where}.scheme"
    if isinstance(scheme, str):
        name = scheme.replace("-", "_")
        known = base(name)
        if known is None:
            fix = did_you_mean(name, {*PRESETS, *EXTRA})
            raise ConfigError(f"Unknown scheme {scheme!r}.", where=where, fix=fix)
        return adjusted(known, method, where.removesuffix(".scheme"))
    if method.weight is not None or method.activation is not None:
        fix = "Keep one of the two."
        raise ConfigError("scheme and quant_method both say the granularity.", where=where, fix=fix)
    weight = _quant(scheme.weight, f"{where}.weight")
    inputs = _quant(scheme.input, f"{where}.input") if scheme.input else None
    if weight.dynamic:
        raise ConfigError("Weights cannot be dynamic.", where=f"{where}.weight", fix="Remove dynamic.")
    if inputs and not inputs.dynamic and inputs.granularity != PER_TENSOR:
        fix = "Set dynamic: true, or granularity: per-tensor."
        raise ConfigError(
            f"Static activation scales cannot be {inputs.granularity}.", where=f"{where}.input", fix=fix
        )
    return Scheme(weight, inputs, _quant(scheme.kv, f"{where}.kv") if scheme.kv else None)


def _quant(spec: TensorScheme, where: str) -> Quant:
    number = FORMATS.get(spec.format)
    if number is None:
        fix = did_you_mean(spec.format, FORMATS)
        raise ConfigError(f"Unknown number format {spec.format!r}.", where=where, fix=fix)
    if not spec.symmetric and number.kind == "float":
        fix = "Remove symmetric: false."
        raise ConfigError(f"{number.name} is symmetric by nature.", where=where, fix=fix)
    if where.endswith(".kv"):
        grain_of_cache = _kv(spec.granularity, where).granularity
        return Quant(number, grain_of_cache, spec.symmetric, spec.dynamic, spec.scale)
    words = QuantMethod(group_size=spec.group_size, block_size=spec.block_size)
    grain = _weight_grain if where.endswith(".weight") else _input_grain
    try:
        return Quant(number, grain(spec.granularity, words, where), spec.symmetric, spec.dynamic, spec.scale)
    except SchemeError as error:
        raise ConfigError(error.what, where=where, fix=error.fix) from None


def overrides(
    section: Quantization, scheme: Scheme | None, where: str
) -> tuple[tuple[str, Scheme | None], ...]:
    """The other schemes that ``quantization.overrides`` gives to some layers; None is full precision.

    An override without a scheme adjusts that of the section.
    """
    found: list[tuple[str, Scheme | None]] = []
    for index, override in enumerate(section.overrides):
        at = f"{where}.overrides.{index}"
        other: Scheme | None
        if override.scheme == "none":
            other = None
        elif override.scheme is not None:
            other = explicit(override.scheme, override.quant_method, at)
        elif override.quant_method.given() and scheme is not None:
            other = adjusted(scheme, override.quant_method, at)
        else:
            raise ConfigError(
                "The override changes nothing.", where=at, fix="Give it a scheme, or scheme: none."
            )
        if other is not None and scheme is not None:
            other = replace(other, kv=scheme.kv)  # the cache belongs to no layer of its own
        found += [(entry, other) for entry in override.match]
    return tuple(found)


def trained(quant: TrainedQuant) -> Scheme | None:
    """The scheme that a training plugin simulates, or None when the numerics cannot express it."""
    weight = _simulated(quant.weight, weight=True)
    if weight is None or not quant.use_activation_quant or quant.activation is None:
        return None if weight is None or quant.use_activation_quant else Scheme(weight)
    inputs = _simulated(quant.activation, weight=False)
    return Scheme(weight, inputs) if inputs else None


def _simulated(tensor: TensorQuant | None, weight: bool) -> Quant | None:
    if tensor is None or tensor.qtype not in _QTYPES:
        return None
    method = QuantMethod(
        weight=tensor.granularity, activation=tensor.granularity, group_size=tensor.group_size
    )
    role = "plugin_config.quant_config." + ("weight" if weight else "activation")
    words = method.weight or "per-tensor"
    grain = _weight_grain(words, method, role) if weight else _input_grain(words, method, role)
    return Quant(
        _QTYPES[tensor.qtype], grain, tensor.is_sym is not False, bool(tensor.dynamic) and not weight
    )
