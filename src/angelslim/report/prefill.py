"""A run of sparse attention as plain records, a table for the terminal and one HTML page.

`run.json` holds one `PrefillRecord`; the page shows time to the first token by length, the density, attention mass and
output error of every head of every layer, and each dense call with its reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.table import Table

from ..base.errors import ModelError
from ..evaluate.base import Score
from . import words
from .drawing import AFTER, BEFORE, LINE, MUTED, canvas, place, to_svg
from .heat import OUTPUT_ERROR, Quantity, heat, share
from .html import render
from .record import RECORD_FILE
from .strips import log_ticks
from .summary import plain_table

KIND = "sparse attention"
NONE = "–"
DENSITY = Quantity("Density: share of the causal area read", "high", share, share)
MASS = Quantity("Attention mass kept", "low", share, share)


class Spread(NamedTuple):
    """Milliseconds: the median, the tenth and the ninetieth percentile."""

    median: float
    low: float
    high: float


@dataclass
class LengthRow:
    """Time to the first token at one length, with what belongs to it; bytes of peak memory are 0 without a GPU."""

    tokens: int
    baseline: str
    dense_ms: Spread
    sparse_ms: Spread
    times: float  # faster: the median of dense over sparse, pair by pair
    repeats: int
    first_ms: float  # the first sparse run, compilation included
    density: float | None
    selector_ms: float
    kernel_ms: float
    calls: int
    fallbacks: dict[str, int] = field(default_factory=dict)
    dense_peak: int = 0
    sparse_peak: int = 0
    kernels: dict[str, int] = field(default_factory=dict)


@dataclass
class HeadRow:
    """One layer: a value a query head, empty where the layer stayed dense."""

    layer: int
    density: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass
class PrefillRecord:
    """One run: what was asked, what was chosen, what it costs and what it loses."""

    method: str
    model: str
    model_type: str
    parameters: int
    rules: list[str]
    block: int
    crossover: int | str
    crossover_from: str
    kernel: str
    device: str
    dtype: str
    lengths: list[LengthRow] = field(default_factory=list)
    heads: list[HeadRow] = field(default_factory=list)
    heads_tokens: int = 0
    before: list[Score] = field(default_factory=list)
    after: list[Score] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    command: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    warnings: list[str] = field(default_factory=list)
    kind: str = KIND

    @property
    def mass(self) -> float | None:
        """The attention mass kept, averaged over heads and sparse layers."""
        return _mean([value for row in self.heads for value in row.mass])

    @property
    def error(self) -> float | None:
        """The relative error of the outputs, averaged over heads and sparse layers."""
        return _mean([value for row in self.heads for value in row.error])

    @property
    def density(self) -> float | None:
        """The density, averaged over heads and sparse layers."""
        return _mean([value for row in self.heads for value in row.density])

    @property
    def fallbacks(self) -> dict[str, int]:
        """Dense calls of a layer by reason, over all measured lengths."""
        counts: Counter[str] = Counter()
        for reasons in [row.fallbacks for row in self.lengths] + [row.fallbacks for row in self.heads]:
            counts.update(reasons)
        return dict(counts)

    def to_json(self) -> str:
        """Serialise with sorted keys, so that equal records give equal text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PrefillRecord:
        """Read a record that `to_json` wrote."""
        raw = json.loads(text)
        if raw.get("kind") != KIND:
            raise ValueError("it is of another kind of run")
        raw["lengths"] = [
            LengthRow(**{**row, "dense_ms": Spread(*row["dense_ms"]), "sparse_ms": Spread(*row["sparse_ms"])})
            for row in raw["lengths"]
        ]
        raw["heads"] = [HeadRow(**row) for row in raw["heads"]]
        for side in ("before", "after"):
            raw[side] = [Score(**score) for score in raw[side]]
        return cls(**raw)

    @classmethod
    def load(cls, folder: Path) -> PrefillRecord:
        """Read the record of a run in `folder`; a missing or damaged one is a `ModelError`."""
        path = folder / RECORD_FILE if folder.is_dir() else folder
        try:
            return cls.from_json(path.read_text("utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"There is no readable record of a run of sparse attention ({error}).", where=str(path)
            ) from error


HEADINGS = [
    "tokens",
    "dense ms",
    "sparse ms",
    "times faster",
    "density",
    "selector ms",
    "kernel ms",
    "dense calls",
]


def length_lines(record: PrefillRecord) -> list[list[str]]:
    """The measured lengths as cells, one line a length."""
    return [
        [
            f"{row.tokens:,}",
            _milliseconds(row.dense_ms.median),
            _milliseconds(row.sparse_ms.median),
            f"{row.times:.2f}",
            NONE if row.density is None else f"{row.density:.3f}",
            _milliseconds(row.selector_ms),
            _milliseconds(row.kernel_ms),
            str(sum(row.fallbacks.values())),
        ]
        for row in record.lengths
    ]


def facts(record: PrefillRecord) -> list[tuple[str, str]]:
    """What the run chose and found, name and value."""
    crossover = f"{record.crossover:,} tokens" if isinstance(record.crossover, int) else str(record.crossover)
    found = [
        ("rules", "; ".join(record.rules)),
        ("sparse from", f"{crossover}: {record.crossover_from}"),
        ("kernel", f"{_kernel(record)}, blocks of {record.block} tokens"),
    ]
    if record.heads:
        on = f"on {record.heads_tokens:,} tokens of text"
        found += [
            (name, f"{100 * value:.2f} % {on}")
            for name, value in (
                ("density", record.density),
                ("attention mass kept", record.mass),
                ("output error", record.error),
            )
            if value is not None
        ]
    for old, new in zip(record.before, record.after, strict=True):
        found.append((old.metric, f"{words.number(old.value)} dense, {words.number(new.value)} sparse"))
    found += [(f"dense calls: {reason}", str(count)) for reason, count in sorted(record.fallbacks.items())]
    return found


def lengths_table(record: PrefillRecord) -> Table:
    """Build the terminal table of the measured lengths."""
    return plain_table(
        f"{record.method} on {record.model}: time to the first token", HEADINGS, length_lines(record)
    )


def prefill_html(record: PrefillRecord) -> str:
    """Return the page."""
    fastest = max(record.lengths, key=lambda row: row.times, default=None)
    tiles = [
        (
            "Sparse from",
            f"{record.crossover:,}" if isinstance(record.crossover, int) else record.crossover,
            "tokens on; shorter prompts stay dense",
        ),
        (
            "First token, at best",
            NONE if fastest is None else f"{fastest.times:.2f}x",
            "" if fastest is None else f"at {fastest.tokens:,} tokens, against {fastest.baseline}",
        ),
        ("Attention mass kept", _percent(record.mass), f"at density {_percent(record.density)}"),
        ("Output error", _percent(record.error), "mean over heads, each layer by itself"),
    ]
    grids = [
        ("Density", DENSITY, lambda row: row.density),
        ("Attention mass kept", MASS, lambda row: row.mass),
        ("Output error", OUTPUT_ERROR, lambda row: row.error),
    ]
    note = f"A row a query head, a column a layer; {record.heads_tokens:,} tokens of text, sparse from the first on."
    figures = [
        (
            "Time to the first token",
            "Median with the tenth and ninetieth percentile, both axes logarithmic.",
            _times(record),
        ),
        *((title, note, _grid(record, quantity, of)) for title, quantity, of in grids),
    ]
    shown = {
        "title": f"Sparse attention: {record.method} on {record.model}",
        "tiles": [{"name": name, "value": value, "note": text} for name, value, text in tiles],
        "facts": facts(record),
        "figures": [{"title": title, "note": text, "svg": svg} for title, text, svg in figures if svg],
        "headings": [*HEADINGS, "first sparse run ms", "repeats", "baseline", "peak dense, sparse"],
        "rows": [
            [*line, _milliseconds(row.first_ms), str(row.repeats), row.baseline, _peaks(row)]
            for line, row in zip(length_lines(record), record.lengths, strict=True)
        ],
        "warnings": record.warnings,
        "run": [
            ("command", record.command),
            ("device", f"{record.device}, {record.dtype}"),
            ("time", words.duration(record.seconds)),
            ("peak memory", words.megabytes(record.peak_memory_bytes)),
            *record.versions.items(),
        ],
    }
    return render("prefill", shown)


def _grid(record: PrefillRecord, quantity: Quantity, of: Callable[[HeadRow], list[float]]) -> Markup | str:
    heads = max((len(of(row)) for row in record.heads), default=0)
    cells = {
        f"head {head}": {row.layer: of(row)[head] for row in record.heads if len(of(row)) > head}
        for head in range(heads)
    }
    return heat(cells, quantity, "by head and layer") if cells else ""


def _times(record: PrefillRecord) -> Markup | str:
    if not record.lengths:
        return ""
    with canvas(720, 320) as (figure, axes):
        place(axes, 70, 16, 12, 46)
        axes.grid(color=LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        tokens = [row.tokens for row in record.lengths]
        for name, color, spreads in (
            ("dense", BEFORE, [row.dense_ms for row in record.lengths]),
            ("sparse", AFTER, [row.sparse_ms for row in record.lengths]),
        ):
            axes.plot(tokens, [each.median for each in spreads], "o-", color=color, linewidth=2, label=name)
            axes.vlines(tokens, [each.low for each in spreads], [each.high for each in spreads], color=color)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.minorticks_off()
        ticks = log_ticks(*axes.get_ylim())
        axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.set_xlabel("tokens of the prompt", loc="left")
        axes.set_ylabel("milliseconds", loc="bottom", fontsize=11)
        axes.tick_params(labelcolor=MUTED)
        axes.legend(frameon=False)
        return to_svg(figure, "Time to the first token by the length of the prompt")


def _peaks(row: LengthRow) -> str:
    if not row.sparse_peak:
        return NONE  # on a CPU the peak of the process says nothing of one prompt
    return f"{words.megabytes(row.dense_peak)}, {words.megabytes(row.sparse_peak)}"


def _kernel(record: PrefillRecord) -> str:
    """What computed, or what was asked for where nothing was measured."""
    ran = dict.fromkeys(name for row in record.lengths for name in row.kernels)
    return ", ".join(ran) or record.kernel


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
