"""What an analysis found, as plain records: layers of a checkpoint, and what each costs when it alone is rounded.

`angelslim analyze` fills an `Analysis`, `angelslim sensitivity` a `Sensitivity`. The terminal table, the page, the CSV
and the JSON file are all drawn from them. JSON is strict: what is not known, or is infinite (the SQNR of a layer that
lost nothing), is null.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..numerics.error import Histogram


@dataclass(frozen=True)
class Flag:
    """Why a layer stands out: a value beyond a fixed limit, or far from the layers of its role."""

    column: str  # the name of the figure: "input_scale"
    value: float
    score: float | None  # robust standard deviations from the median of its role; None for a fixed limit


@dataclass(frozen=True)
class LayerFinding:
    """The figures of one layer. What does not apply, or cannot be known from what was given, is None."""

    name: str
    block: int | None
    role: str
    scheme: str
    shape: tuple[int, ...]
    amax: float  # of the original weights where they were given, else of the restored ones; so are the next three
    p999: float
    p9999: float
    kurtosis: float
    zeros: float  # share of stored weights that are exactly 0
    scale: float | None = None  # largest weight scale
    input_scale: float | None = None  # static activation scale
    at_limit: float | None = None  # share of codes at either end of the format
    clipped: float | None = None  # share of originals beyond what the ends stand for
    flushed: float | None = None  # share of nonzero originals that became 0
    sqnr_db: float | None = None
    relative_error: float | None = None
    max_error: float | None = None
    mean_error: float | None = None
    kl: float | None = None  # of the distributions, nats
    wasserstein: float | None = None
    output_error: float | None = None  # as the run recorded it
    note: str = ""
    flags: tuple[Flag, ...] = ()
    histogram: Histogram | None = None


@dataclass
class Analysis:
    """All layers of a checkpoint, the worst first."""

    compressed: str
    original: str | None
    format: str
    measured: bool  # errors were measured against the original, not read from the run's record
    layers: list[LayerFinding] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)  # what flags were raised with
    notes: list[str] = field(default_factory=list)

    @property
    def flagged(self) -> list[LayerFinding]:
        """The layers that stand out."""
        return [layer for layer in self.layers if layer.flags]

    def to_json(self) -> str:
        """Everything, histograms included."""
        return strict_json(asdict(self))

    def to_csv(self) -> str:
        """One line a layer; flags joined by a semicolon, no histograms."""
        return _csv(
            {**asdict(layer), "histogram": None, "flags": ";".join(flag.column for flag in layer.flags)}
            for layer in self.layers
        )


@dataclass(frozen=True)
class LayerSensitivity:
    """What rounding one layer (or all experts of one role in a block) does while all others stay exact."""

    name: str
    block: int | None
    role: str
    scheme: str
    weights: int  # how many
    members: tuple[str, ...]  # the layers that were rounded together; one, save for experts
    sqnr_db: float  # of its weights
    block_error: float  # ||block's output - original's|| / ||original's||, over all samples
    kl: float | None = None  # mean KL(original || changed) of the next-token distribution, nats per token
    kl_stderr: float | None = None
    note: str = ""


@dataclass
class Sensitivity:
    """All layers that a recipe would round, the most sensitive first."""

    model: str
    recipe: str
    scheme: str
    samples: int
    tokens: int
    layers: list[LayerSensitivity] = field(default_factory=list)
    together: float | None = None  # KL with every layer rounded at once
    kl_samples: int = 0
    suggestion: list[str] = field(default_factory=list)  # entries for ignore_layers, the recipe's own first
    kept: list[str] = field(default_factory=list)  # the layers that the suggestion keeps in full precision
    bits: tuple[float, float] = (
        0.0,
        0.0,
    )  # per weight of the decoder's quantized layers: as it is, as suggested

    def to_json(self) -> str:
        """Everything."""
        return strict_json(asdict(self))

    def to_csv(self) -> str:
        """One line a layer."""
        return _csv({**asdict(layer), "members": ";".join(layer.members)} for layer in self.layers)


def strict_json(value: Any) -> str:
    """Serialise with sorted keys and null for what JSON has no number for."""
    return json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        plain = {key: _cell(value) for key, value in row.items() if key != "histogram"}
        if writer is None:
            writer = csv.DictWriter(text, list(plain), lineterminator="\n")
            writer.writeheader()
        writer.writerow(plain)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return "x".join(map(str, value))
    return repr(value) if isinstance(value, float) else value


def places(names: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Return, for each layer, its block and its role: the path inside the block, without expert indices.

    The block is the first number in the path. Layers of the largest stack have short roles; those of another (a
    tower beside the decoder) keep its name in front.

    >>> places(["model.layers.3.mlp.up_proj", "model.layers.0.mlp.experts.7.up_proj", "lm_head"])["lm_head"]
    (None, 'lm_head')
    >>> places(["model.layers.3.mlp.experts.7.up_proj"])
    {'model.layers.3.mlp.experts.7.up_proj': (3, 'mlp.experts.up_proj')}
    """
    split = {name: re.match(r"(?P<stack>.*?)\.(?P<block>\d+)\.(?P<rest>.+)", name) for name in names}
    stacks = Counter(found["stack"] for found in split.values() if found)
    main = stacks.most_common(1)[0][0] if stacks else ""
    result: dict[str, tuple[int | None, str]] = {}
    for name, found in split.items():
        if found is None:
            result[name] = (None, name)
            continue
        role = ".".join(part for part in found["rest"].split(".") if not part.isdigit())
        result[name] = (int(found["block"]), role if found["stack"] == main else f"{found['stack']}.{role}")
    return result
