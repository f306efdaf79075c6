"""The section ``compression.quantization``: which numbers, which algorithm, which layers.

The public keys keep the public dialect's names. Ours are `scheme`, `overrides`, `observer`, `percentile`, `format`,
`quantize_lm_head`, `quantize_embeddings`, and what `QuantMethod` has from `alpha` to `lepto_accept`.
`upstream.stages` turns this section into a method and a `numerics.scheme.Scheme`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..base.errors import ConfigError
from ..numerics.scheme import ScaleKind
from .fields import Count, GrainName, Int, Ints, Number, Section, Share, Word, Words


class QuantMethod(Section):
    """Granularities and the algorithm's own switches."""

    weight: GrainName | None = None
    activation: GrainName | None = None
    kv_cache: GrainName | None = None
    group_size: Int | None = None  # -1: one scale per channel
    block_size: Ints | None = None  # rows, columns
    zero_point: bool | None = None  # true: asymmetric
    mse_range: bool | None = None
    actorder: bool | None = None
    alpha: Share | None = None  # GPTAQ: share of the drift that is corrected
    duo: bool | None = None  # AWQ: whether scales that also look at the weights are tried
    damp: Share | None = None  # GPTQ: share of the mean diagonal that is added to the Hessian
    signed_scales: bool | None = None  # GPTQ, RTN: symmetric scales may be negative
    descent: Count | None = None  # GPTQ: passes of coordinate descent over codes and scales after rounding
    aim: Share | None = None  # GPTQ: share of the drift that weights are corrected by before they are rounded
    true_sequential: bool | None = None  # GPTQ: later linears of a block see earlier ones rounded
    iterations: Count | None = None  # learned rounding: steps
    lr: Number | None = None  # learned rounding: the first step
    learn_batch: Count | None = None  # learned rounding: samples a step
    learn_from: Literal["nearest", "gptq"] | None = None  # learned rounding: the codes to start from
    lepto_extended: bool | None = None  # LeptoQuant: candidates beyond the paper's
    lepto_margin: Share | None = None  # LeptoQuant: what a block's scales must gain to be kept
    lepto_accept: Literal["calibration", "none"] | None = (
        None  # LeptoQuant: what all scales must prove themselves on
    )
    dequant_to_bf16: bool | None = None
    num_workers: Int | None = None
    share_gate_up_weight_scale_2: bool | None = None


class ScaleSearch(Section):
    """Two-stage search of a weight scale around its absolute maximum."""

    min_range: Number | None = None
    max_range: Number | None = None
    coarse_intervals: Int | None = None
    fine_intervals: Int | None = None
    delta_threshold: Number | None = None


class TensorScheme(Section):
    """An explicit scheme for one role (weight, input or kv) of a linear layer."""

    format: str
    granularity: GrainName = "per-tensor"
    group_size: Count = 128
    block_size: Ints = Field(default_factory=lambda: [128, 128])
    symmetric: bool = True
    dynamic: bool = False
    scale: ScaleKind = "free"


class ExplicitScheme(Section):
    """The mapping form of `scheme`; `input` absent means weight-only."""

    weight: TensorScheme
    input: TensorScheme | None = None
    kv: TensorScheme | None = None


class Override(Section):
    """Another scheme for the layers that an entry matches; the first that matches a layer decides."""

    match: Words  # entries like those of `ignore_layers`
    scheme: str | ExplicitScheme | None = None  # "none" keeps the layers in full precision
    quant_method: QuantMethod = Field(default_factory=QuantMethod)

    @field_validator("match")
    @classmethod
    def _patterns_compile(cls, entries: list[str]) -> list[str]:
        return compiled(entries)


class Quantization(Section):
    """How a model is quantized."""

    name: str | None = None
    bits: Int | None = None
    quant_method: QuantMethod = Field(default_factory=QuantMethod)
    quant_helpers: Words = Field(default_factory=list)
    smooth_alpha: Share | Literal["search"] | None = None
    ignore_layers: Words = Field(default_factory=list)
    modules_to_quantize: Words = Field(default_factory=list)
    low_memory: bool | None = None  # accepted; streaming blocks is the only way runs work here
    quant_analyse: bool = False
    quant_vit: bool = False
    quant_talker: bool = False
    cpu_convert: bool | None = None
    save_name: str | None = None
    # Fine-tune-aware FP8: how far a tuned model moved from its base decides the scale.
    base_model_path: str | None = None
    base_model_repo: str | None = None
    base_is_fp8: bool | None = None
    metric: Literal["cosine", "sign", "mse"] | None = None
    quantization_method: Literal["blockwise", "per_channel", "per_tensor"] | None = None
    scale_search: ScaleSearch | None = None
    num_workers: Int | None = None
    gpus: Word | list[Int] | None = None
    # Ours.
    scheme: str | ExplicitScheme | None = None
    overrides: list[Override] = Field(default_factory=list)
    observer: Literal["absmax", "percentile", "mse"] = "absmax"
    percentile: Annotated[float, Field(gt=0, le=100)] = 99.99
    format: Literal["auto", "compressed-tensors", "gptq", "awq", "fp8_block", "fp8_tensor", "w4afp8"] = "auto"
    quantize_lm_head: bool = False
    quantize_embeddings: bool = False

    @field_validator("format", mode="before")
    @classmethod
    def _either_spelling(cls, value: object) -> object:
        return "compressed-tensors" if value == "compressed_tensors" else value

    @field_validator("ignore_layers")
    @classmethod
    def _patterns_compile(cls, entries: list[str]) -> list[str]:
        return compiled(entries)


def compiled(entries: list[str]) -> list[str]:
    """Refuse entries that start with ``re:`` and are no regular expressions."""
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise ValueError(f"{entry!r} is not a regular expression: {error}") from None
    return entries


def refuse_judges(section: Quantization, where: str) -> None:
    """Refuse transforms that choose their scales by what rounding loses where nothing is rounded."""
    searches = "smooth" in section.quant_helpers and section.smooth_alpha == "search"
    if searches or "awq" in section.quant_helpers:
        what = "smooth_alpha: search" if searches else "awq"
        raise ConfigError(
            f"{what} chooses scales by what rounding loses, and {where} names no quantization.",
            fix=f"Set {where}.name, or use the helper smooth with a number for smooth_alpha.",
        )
