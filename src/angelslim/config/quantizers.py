"""Which quantizer a training section names, with which options, and what its weights look like in a file.

A training section names a quantizer in one of two ways: ``plugin_config.quant_config.special`` says its name, or an
ordinary scheme (of the plugin or of ``quantization``) is trained with learned scales. Where training goes block by
block, the run is one of post-training quantization and needs the scheme of the result beforehand: `scheme_of` knows it
from the name and the options. `grain` and `width` are the options that decide it; the quantizers read them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.errors import ConfigError, SchemeError, did_you_mean
from ..numerics.scheme import (
    FORMATS,
    PER_CHANNEL,
    PER_TENSOR,
    PRESETS,
    Granularity,
    Quant,
    ScaleKind,
    Scheme,
    format_named,
    per_group,
)
from .training import SpecialQuantizer

Options = Mapping[str, Any]
ALIASES = {"bitnet": "absmean"}
TERNARY_WORDS = ("ternary", "1.58", "1.58bit")
BITS: dict[str, int | str] = {"seq": 2, "lsq": "ternary", "minmax": "ternary", "int": 4}  # who has the option
TERNARY = ("absmean", "twn", "tequila", "sherry")
IN_GROUPS = ("tequila", "sherry")  # of 128, where nothing is said
WIDTHS = ("ternary", *range(2, 9))
KINDS: dict[str, ScaleKind] = {"float16": "float16", "bfloat16": "bfloat16", "float32": "free"}


def special(section: SpecialQuantizer) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a quantizer that the plugin names."""
    given = section.given()
    name = str(given.pop("quant_method", "") or "")
    name = ALIASES.get(name, name)
    if name == "sherry" and (given.pop("M", 4), given.pop("N", 3)) != (4, 3):
        raise ConfigError("Sherry keeps 3 of 4 weights.", fix="Set M: 4 and N: 3, or leave them out.")
    bits = section.w_bits
    given.pop("w_bits", None)
    start = given.pop("seq_init", None)
    inner: Any = given.pop("options", None) or {}
    options = {**given, **inner}
    if bits is not None and name in BITS:
        options.setdefault("bits", "ternary" if bits < 2 else int(bits))
    if start is not None and name == "seq":
        options.setdefault("init", start)
    return name, options


def plain(scheme: Scheme) -> tuple[str, dict[str, Any]]:
    """Return the quantizer with learned scales for an ordinary scheme."""
    weight = scheme.weight
    if scheme.input is not None and not scheme.input.dynamic:
        raise SchemeError(
            "Static input scales are not trained.", fix="Use a scheme with dynamic activations."
        )
    if weight.scale in ("e4m3", "e8m0"):
        if weight.format.name != "fp4_e2m1":
            raise SchemeError(
                "MXFP8 weights are not trained.", fix="Use fp8_dynamic, mxfp4 or mxfp4_weight_only."
            )
        name = {"e4m3": "nvfp4", "e8m0": "mxfp4"}[weight.scale]
        return "fp", {"format": name}
    grain = weight.granularity
    options: dict[str, Any] = {"granularity": grain.kind}
    if grain.kind == "group":
        options["group_size"] = grain.columns
    if weight.format.kind == "float":
        return "fp", {"format": "fp8", **options}
    if not weight.symmetric:
        raise SchemeError("Integer weights are trained symmetric.", fix="Set zero_point: false.")
    if weight.scale == "float16":
        options["scale_dtype"] = "float16"
    return "int", {"bits": weight.format.bits, **options}


def scheme_of(name: str, options: Options, *, shifted: bool = False) -> Scheme:
    """Return the scheme of the weights that a quantizer leaves.

    One that shifts its weights is refused unless they may be `shifted`: no quantized file holds them.
    """
    if name == "dlt":
        if not shifted:
            raise SchemeError(
                "A shift of every weight is not what quantized checkpoints hold.",
                fix="Train dlt end to end with save_format: fake, or choose another quantizer.",
            )
        return Scheme(Quant(format_named("ternary"), grain(options, PER_CHANNEL)))
    if name == "fp":
        kind = str(options.get("format", "fp8"))
        if kind != "fp8":
            return Scheme(PRESETS["nvfp4_weight_only" if kind == "nvfp4" else "mxfp4_weight_only"].weight)
        return Scheme(Quant(FORMATS["fp8_e4m3"], grain(options, PER_CHANNEL)))
    if name == "int":
        four = width(options, 4, (4, 8)) == 4
        shared = grain(options, per_group(128) if four else PER_CHANNEL)
        halves = options.get("scale_dtype") == "float16"
        return Scheme(
            Quant(FORMATS["int4" if four else "int8"], shared, scale="float16" if halves else "free")
        )
    known = ("seq", "lsq", "minmax", "int", "fp", *TERNARY)
    if name not in known:
        raise ConfigError(f"Unknown quantizer {name!r}.", fix=did_you_mean(name, known))
    shared = grain(options, per_group(128) if name in IN_GROUPS else PER_CHANNEL)
    if shared == PER_TENSOR:
        shared = PER_CHANNEL  # files have the one scale once a row
    kept = KINDS.get(str(options.get("scale_dtype", "float16")), "free")
    return Scheme(Quant(format_named(_format(name, options)), shared, scale=kept))


def _format(name: str, options: Options) -> str:
    if name in TERNARY:
        return "ternary34" if name == "sherry" else "ternary"
    bits = width(options, BITS[name], (2, "ternary") if name == "seq" else WIDTHS)
    if bits == "ternary":
        return "ternary"
    return "seq2" if name == "seq" else f"int{bits}"


def width(options: Options, default: int | str, allowed: Sequence[int | str]) -> int | str:
    """Return the option `bits`: a whole number, or the word ``ternary`` (1.58 means the same)."""
    value = options.get("bits", default)
    found: int | str | None = None
    if str(value).lower() in TERNARY_WORDS:
        found = "ternary"
    elif isinstance(value, (int, str)) and not isinstance(value, bool) and str(value).isdigit():
        found = int(value)
    if found not in allowed or found is None:
        raise ConfigError(f"bits is {value!r}.", fix=f"Use {', '.join(map(str, allowed))}.")
    return found


def grain(options: Options, default: Granularity) -> Granularity:
    """Return what shares a scale: `granularity` (tensor, channel, group; also as per-group) and `group_size` (128).

    A group size alone means groups; -1 means one scale a channel.
    """
    size = options.get("group_size")
    word = options.get("granularity")
    if word is None and size is None:
        return default
    kind = "group" if word is None else str(word).lower().replace("_", "-").removeprefix("per-")
    if kind not in ("tensor", "channel", "group"):
        raise ConfigError(
            f"granularity is {word!r}.", fix=did_you_mean(str(word), ("tensor", "channel", "group"))
        )
    if kind == "tensor":
        return PER_TENSOR
    if kind == "channel" or size == -1:
        return PER_CHANNEL
    size = 128 if size is None else size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"group_size is {size!r}.", fix="Use 32, 64 or 128, or -1 for one scale a channel.")
    return per_group(size)
