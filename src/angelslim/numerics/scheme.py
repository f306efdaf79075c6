"""A quantization scheme is a value, not a name.

`Format` says which numbers exist, `Granularity` how many of them share a scale, `Quant` joins the two for one
tensor role, and `Scheme` joins the roles of a linear layer: weight, input, KV cache. Every algorithm works
with any scheme; every export format answers whether it can hold one. This module imports no torch, so that
configuration can be checked in milliseconds.

Shapes: a weight is ``[out, in]``, an input ``[tokens, in]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..base.errors import SchemeError, did_you_mean


@dataclass(frozen=True)
class Format:
    """The grid of representable values before scaling: codes from `low` to `high`, plus `centre`.

    The centre is 0, or a half where no level is zero: SEQ's two bits stand for -1.5, -0.5, 0.5, 1.5. `packed` is the
    bits that a code takes in a file where that is not `bits`: of four 3:4 sparse ternary codes exactly one is zero.
    """

    name: str
    kind: Literal["int", "float"]
    bits: int
    low: float  # smallest code value
    high: float  # largest code value
    centre: float = 0.0
    packed: float = 0.0

    @property
    def stored_bits(self) -> float:
        """Bits of a code in a file."""
        return self.packed or self.bits


FORMATS = {
    item.name: item
    for item in (
        Format("int4", "int", 4, -8, 7),
        Format("int8", "int", 8, -128, 127),
        Format("int2", "int", 2, -2, 1),
        Format("int3", "int", 3, -4, 3),
        Format("seq2", "int", 2, -2, 1, centre=0.5),
        Format("ternary", "int", 2, -1, 1),
        Format("ternary34", "int", 2, -1, 1, packed=1.25),
        Format("fp4_e2m1", "float", 4, -6.0, 6.0),
        Format("fp8_e4m3", "float", 8, -448.0, 448.0),
    )
}


def format_named(name: str) -> Format:
    """Look up a number format by name."""
    if name not in FORMATS:
        raise SchemeError(f"Unknown number format {name!r}.", fix=did_you_mean(name, FORMATS))
    return FORMATS[name]


@dataclass(frozen=True)
class Granularity:
    """Which elements share one scale.

    ====================  ==========================================================
    ``tensor``            one scale
    ``channel``           one per output row: ``[out, 1]``
    ``token``             one per input row: ``[tokens, 1]``
    ``group`` of g        one per g neighbours of a row: ``[rows, in / g]``
    ``block`` of r x c    one per tile: ``[ceil(out / r), ceil(in / c)]``
    ``head``              one per attention head (keys and values only): ``[heads, 1, 1]``
    ====================  ==========================================================
    """

    kind: Literal["tensor", "channel", "token", "group", "block", "head"]
    rows: int = 0  # block only
    columns: int = 0  # group size, or the block's width

    def __str__(self) -> str:
        if self.kind == "group":
            return f"per-group {self.columns}"
        if self.kind == "block":
            return f"per-block {self.rows}x{self.columns}"
        return f"per-{self.kind}"


PER_TENSOR = Granularity("tensor")
PER_CHANNEL = Granularity("channel")
PER_TOKEN = Granularity("token")
PER_HEAD = Granularity("head")


def per_group(size: int) -> Granularity:
    """One scale for each run of `size` neighbours along the input dimension."""
    if size <= 0:
        raise SchemeError(f"Group size {size} is not positive.", fix="Use 32, 64 or 128, or per-channel.")
    return Granularity("group", 1, size)


def per_block(rows: int, columns: int) -> Granularity:
    """One scale for each tile of `rows` x `columns`."""
    if rows <= 0 or columns <= 0:
        raise SchemeError(f"Block size {rows}x{columns} is not positive.", fix="Use 128x128.")
    return Granularity("block", rows, columns)


ScaleKind = Literal["free", "float16", "bfloat16", "e8m0", "e4m3", "fp8_channel"]
PLAIN_SCALES: tuple[ScaleKind, ...] = ("free", "float16", "bfloat16")  # one number a tile, of some type
_SCALED_BY: dict[
    str, tuple[tuple[str, ...], int]
] = {  # formats that have such group scales; the group's size
    "e8m0": (("fp4_e2m1", "fp8_e4m3"), 32),
    "e4m3": (("fp4_e2m1",), 16),
    "fp8_channel": (("int4",), 0),
}


@dataclass(frozen=True)
class Quant:
    """How one tensor is quantized. `dynamic` scales are computed while the model runs.

    `scale` says which numbers may be scales (`numerics.scales` has the arithmetic):

    ===============  ===========================================================================
    ``free``         any number of the type in which scales are stored
    ``float16``      those among them that float16 holds: some files keep no others (GGUF, GPTQ, AWQ)
    ``bfloat16``     those among them that bfloat16 holds
    ``e8m0``         powers of two, one byte (MXFP4, MXFP8)
    ``e4m3``         FP8 numbers over one float32 number for the whole tensor (NVFP4)
    ``fp8_channel``  FP8 numbers times one factor for each output row (INT4 weights, FP8 inputs)
    ===============  ===========================================================================
    """

    format: Format
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    scale: ScaleKind = "free"

    def __str__(self) -> str:
        words = [self.format.name, str(self.granularity)]
        words += [] if self.symmetric else ["asymmetric"]
        words += ["dynamic"] if self.dynamic else []
        words += [] if self.scale == "free" else [f"({self.scale} scales)"]
        return " ".join(words)

    def __post_init__(self) -> None:
        if self.scale in PLAIN_SCALES:
            return
        formats, size = _SCALED_BY[self.scale]
        fits = self.granularity.kind == "group" and size in (0, self.granularity.columns)
        if not fits or not self.symmetric or self.format.name not in formats:
            groups = f"groups of {size}" if size else "groups"
            raise SchemeError(
                f"{self.scale} scales are for symmetric {groups} of {' or '.join(formats)} values, not for {self}.",
                fix="Leave the granularity out, or choose another format.",
            )

    @property
    def calibrated(self) -> bool:
        """Whether an input's scales need calibration data: all of a static one's, the global one of NVFP4's."""
        return not self.dynamic or self.scale == "e4m3"


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantized."""

    weight: Quant
    input: Quant | None = None
    kv: Quant | None = None

    def __str__(self) -> str:
        text = f"W {self.weight}"
        if self.input:
            text += f", A {self.input}" + ("" if self.input.dynamic else " static")
        if self.kv:
            text += f", KV {self.kv}"
        return text

    @property
    def needs_data(self) -> bool:
        """Static activation scales come from calibration data; everything else is known from the weights."""
        return self.input is not None and self.input.calibrated


_FP8, _INT8, _INT4, _FP4 = FORMATS["fp8_e4m3"], FORMATS["int8"], FORMATS["int4"], FORMATS["fp4_e2m1"]
_NV, _MX4 = Quant(_FP4, per_group(16), scale="e4m3"), Quant(_FP4, per_group(32), scale="e8m0")
_MX8 = Quant(_FP8, per_group(32), scale="e8m0")
PRESETS: dict[str, Scheme] = {
    "fp8_static": Scheme(Quant(_FP8, PER_TENSOR), Quant(_FP8, PER_TENSOR)),
    "fp8_dynamic": Scheme(Quant(_FP8, PER_CHANNEL), Quant(_FP8, PER_TOKEN, dynamic=True)),
    "fp8_block": Scheme(Quant(_FP8, per_block(128, 128)), Quant(_FP8, per_group(128), dynamic=True)),
    "int8_dynamic": Scheme(Quant(_INT8, PER_CHANNEL), Quant(_INT8, PER_TOKEN, dynamic=True)),
    "int4": Scheme(Quant(_INT4, per_group(128))),
    "w4a8_fp8": Scheme(
        Quant(_INT4, per_group(128), scale="fp8_channel"), Quant(_FP8, PER_TOKEN, dynamic=True)
    ),
    "nvfp4": Scheme(_NV, replace(_NV, dynamic=True)),
    "nvfp4_weight_only": Scheme(_NV),
    "mxfp4": Scheme(_MX4, replace(_MX4, dynamic=True)),
    "mxfp4_weight_only": Scheme(_MX4),
    "mxfp8": Scheme(_MX8, replace(_MX8, dynamic=True)),
    "q4_0": Scheme(Quant(_INT4, per_group(32), scale="float16")),
    "q8_0": Scheme(Quant(_INT8, per_group(32), scale="float16")),
}


def with_group(scheme: Scheme, size: int) -> Scheme:
    """Return the scheme with its weight's group size replaced; -1 means one scale a channel."""
    granularity = PER_CHANNEL if size == -1 else per_group(size)
    return replace(scheme, weight=replace(scheme.weight, granularity=granularity))
