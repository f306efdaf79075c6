"""The figures of an analysis as columns: name, meaning, how each is written. The terminal and the page share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import words
from .findings import Analysis, Flag, LayerFinding, LayerSensitivity
from .heat import Quantity, compact, share

NONE = "–"


@dataclass(frozen=True)
class Column:
    """One figure of a layer."""

    field: str
    heading: str
    write: Callable[[Any], str]
    meaning: str

    def text(self, layer: object) -> str:
        """Write the figure of one layer; a dash where it is not known."""
        value = getattr(layer, self.field)
        return NONE if value is None else self.write(value)

    def key(self, layer: object) -> str:
        """Return what a table sorts by."""
        value = getattr(layer, self.field)
        return repr(min(float(value), 1e12)) if value is not None else "-1"


LAYER = (
    Column(
        "sqnr_db", "SQNR (dB) ↑", words.decibels, "signal to quantization noise; six dB are about one bit"
    ),
    Column(
        "output_error",
        "output error ↓",
        share,
        "relative error of the layer's outputs when it was calibrated",
    ),
    Column("kl", "KL ↓", compact, "divergence of the two distributions over 128 bins, nats"),
    Column("wasserstein", "W1 ↓", compact, "how far mass moves on average, in units of the weight"),
    Column("max_error", "max |error| ↓", compact, "largest difference of a weight"),
    Column("mean_error", "mean |error| ↓", compact, "mean difference of a weight"),
    Column("flushed", "to zero ↓", share, "nonzero weights that became zero"),
    Column("clipped", "clipped ↓", share, "weights beyond what the last codes stand for"),
    Column("at_limit", "at limit", share, "codes at either end of the number format"),
    Column("zeros", "zeros", share, "stored weights that are exactly zero"),
    Column("scale", "max scale", compact, "largest weight scale"),
    Column("input_scale", "input scale", compact, "static activation scale"),
    Column("amax", "max |w|", compact, "largest weight"),
    Column("p999", "p99.9", compact, "99.9 % of the weights are at most this, in magnitude"),
    Column("p9999", "p99.99", compact, "99.99 % of the weights are at most this, in magnitude"),
    Column("kurtosis", "kurtosis", compact, "3 for a normal distribution; outliers raise it"),
)
PAIR = ("sqnr_db", "kl", "wasserstein", "max_error", "flushed", "clipped")  # in the terminal
SINGLE = ("sqnr_db", "output_error", "amax", "kurtosis", "scale", "input_scale", "at_limit")
ALONE = ("amax", "p999", "p9999", "kurtosis", "zeros")  # of a model in full precision

SENSITIVITY = (
    Column("block_error", "block error ↓", share, "relative error of the block's output"),
    Column("kl", "KL ↓", compact, "of the next token's distribution, nats per token"),
    Column("kl_stderr", "±", compact, "standard error of the KL over the samples"),
    Column("sqnr_db", "SQNR (dB) ↑", words.decibels, "of the layer's weights"),
    Column("weights", "weights", lambda count: f"{count:,}", "how many weights the layer has"),
)

GRIDS = (
    Quantity("SQNR", "low", lambda v: words.decibels(v)[:5], lambda v: f"{v:.0f} dB", whole=True),
    Quantity("Output error", "high", share, share, log=True),
    Quantity("Weights flushed to zero", "high", share, share),
    Quantity("Weights clipped", "high", share, share),
    Quantity("Kurtosis", "high", compact, compact, log=True),
)
GRID_FIELDS = ("sqnr_db", "output_error", "flushed", "clipped", "kurtosis")


def known(columns: Sequence[Column], layers: Sequence[object]) -> list[Column]:
    """Return the columns in which at least one layer has a figure."""
    return [column for column in columns if any(getattr(x, column.field) is not None for x in layers)]


def chosen(analysis: Analysis) -> list[Column]:
    """Return the columns that the terminal shows."""
    names: Sequence[str] = PAIR if analysis.measured else SINGLE
    if all(layer.scale is None for layer in analysis.layers):
        names = ALONE
    by_field = {column.field: column for column in LAYER}
    return known([by_field[name] for name in names], analysis.layers)


def flags(layer: LayerFinding, limits: dict[str, float]) -> str:
    """Write why a layer stands out."""
    return "; ".join(_flag(flag, limits) for flag in layer.flags)


def _flag(flag: Flag, limits: dict[str, float]) -> str:
    column = next(column for column in LAYER if column.field == flag.column)
    name = column.heading.removesuffix(" ↓").removesuffix(" (dB) ↑")
    if flag.score is None:
        return f"{name} {column.write(flag.value)} > {limits['scale']:g}"
    return f"{name} {column.write(flag.value)} ({flag.score:.0f}σ)"


def sensitivity_columns(layers: Sequence[LayerSensitivity]) -> list[Column]:
    """Return the columns of a sensitivity table."""
    return known(SENSITIVITY, layers)
