"""The section ``compression.sparsity``: sparse attention for the prefill of long prompts.

The public keys keep the public dialect's names; `public_options` says which option of which selector each one is. Ours are
`density`, `options`, `rules`, `crossover`, `block`, `kernel`, `search_heads` and `measure`. `rules_of` turns the section into
rules as plain values, one for each set of layers and heads, the first that fits decides; the last is the section's own
and serves what no other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..base.errors import ConfigError
from .fields import Count, Int, Number, Section, Word

DENSE = "dense"
KNOWN_PATTERNS = (
    "a_shape",
    "cosa",
    "dilated",
    "flashprefill",
    "flexprefill",
    "minference",
    "oracle",
    "stem",
    "strided",
    "tri_shape",
    "uniform",
    "union",
    "vecattention",
    "xattention",
)
# Public key -> option of the selector. What is missing has no effect on it, and a run says so.
_WIDTHS = {"n_init": "n_init", "n_local": "n_local"}
_OPTIONS: dict[str, dict[str, str]] = {
    "a_shape": _WIDTHS,
    "tri_shape": {**_WIDTHS, "n_last": "n_last"},
    "dilated": {"n_init": "n_init", "window": "window"},
    "strided": {"n_init": "n_init", "window": "window", "stride": "stride"},
    "minference": {"pattern_path": "patterns"},
    "xattention": {"threshold": "threshold", "stride": "stride", "norm": "norm"},
    "flexprefill": {"gamma": "gamma", "tau": "tau"},
    "flashprefill": {
        "alpha": "alpha",
        "sink": "sink",
        "window": "window",
        "last_n_block_full": "last_blocks",
    },
    "vecattention": {"threshold": "threshold", "block_size_q": "rows"},
    "cosa": {"topp": "threshold", "stride": "stride", "norm": "norm"},
    "stem": {
        "stem_alpha": "alpha",
        "alpha": "alpha",
        "layer_keep_ratios": "keep_ratio",
        "stride": "stride",
        "norm": "norm",
        "initial_blocks": "initial_blocks",
        "window_size": "window_blocks",
    },
}
# A public name that stands for a selector of another name here, and what a run says of it.
SAME_AS = {
    "cosa": (
        "xattention",
        "cosa runs as xattention with the share topp: its estimate is of that kind. What its own kernel skips while it "
        "computes is not skipped.",
    )
}
# How others cut their work; the same blocks come out whatever they say.
_SILENT = frozenset(
    ["backend", "block_size", "chunk_size", "block_size_k", "group_k_block", "skipsoftmax_threshold"]
)
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d*))?")


class AttentionArguments(Section):
    """The knobs of all sparse attention methods; each method reads its own."""

    alpha: Number | None = None
    backend: Word | None = None
    block_size: Count | None = None
    block_size_k: Int | None = None
    block_size_q: Int | None = None
    chunk_size: Int | None = None
    gamma: Number | None = None
    group_k_block: Int | None = None
    initial_blocks: Int | None = None
    last_n_block_full: Int | None = None
    layer_keep_ratios: list[Number] | None = None
    n_init: Int | None = None
    n_last: Int | None = None
    n_local: Int | None = None
    norm: Number | None = None
    pattern_path: str | None = None
    sink: Int | None = None
    skipsoftmax_threshold: Number | None = None
    stem_alpha: Number | None = None
    stride: Int | None = None
    tau: Number | None = None
    threshold: Number | None = None
    topp: Number | None = None
    window: Int | None = None
    window_size: Int | None = None


def _densities(value: object) -> object:
    """A share, or one a layer, or one a head of each layer; every one of them above 0, at most 1."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, list):
            _densities(entry)
        elif isinstance(entry, bool) or not isinstance(entry, (int, float)) or not 0 < entry <= 1:
            raise ValueError("a density is a share of the causal area: a number above 0, at most 1")
    return value


Density = Annotated[float | list[Any], BeforeValidator(_densities)]
Places = Annotated[
    str, BeforeValidator(lambda value: ",".join(map(str, value)) if isinstance(value, list) else str(value))
]


class LayerRule(Section):
    """Ours: another choice for some layers or heads, given as numbers and ranges: ``"0-3, 8, 20-"``."""

    name: str
    layers: Places | None = None
    heads: Places | None = None
    density: Density | None = None
    attn_kwargs: AttentionArguments = Field(default_factory=AttentionArguments)
    options: dict[str, Any] = Field(default_factory=dict)


class Measure(Section):
    """Ours: what a run measures, on its own data or built-in text. No key changes the result but `lengths`."""

    enabled: bool = True
    lengths: list[Count] | None = None  # tokens; None: doubling from 1024 as far as model and device allow
    repeats: Count = 10
    warmups: Int = 3
    seconds: Number = 30.0  # for the repeats of one length; three are always made
    heads_length: Count = 4096  # tokens of the prompt whose mass and error are measured head by head


class Sparsity(Section):
    """Which tokens each query block attends to."""

    name: str
    allow_pseudo_sparse: bool = False  # where no sparse kernel runs: choose blocks all the same, and mask
    attn_kwargs: AttentionArguments = Field(default_factory=AttentionArguments)
    # Ours.
    density: Density | None = None  # the iso-density budget instead of the method's own
    options: dict[str, Any] = Field(default_factory=dict)  # of the selector, by its own names
    rules: list[LayerRule] = Field(default_factory=list)
    block: Count | None = None  # tokens; attn_kwargs.block_size, or 128, unless given
    crossover: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    kernel: str = "auto"
    search_heads: bool = False  # MInference: find each head's pattern first
    measure: Measure = Field(default_factory=Measure)


@dataclass(frozen=True)
class SparseRule:
    """One rule: a selector's name or "dense", its options, and where it holds, as the file wrote it."""

    selector: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: str | None = None
    heads: str | None = None


def rules_of(section: Sparsity) -> tuple[SparseRule, ...]:
    """The rules of a section, the most special first."""
    special = [
        SparseRule(SAME_AS.get(rule.name, (rule.name,))[0], _options(rule), rule.layers, rule.heads)
        for rule in section.rules
    ]
    return (*special, SparseRule(SAME_AS.get(section.name, (section.name,))[0], _options(section)))


def parts(section: Sparsity) -> list[Sparsity | LayerRule]:
    """The section itself and its rules: all that names a selector."""
    return [section, *section.rules]


def block_of(section: Sparsity) -> int:
    """The side of a block in tokens."""
    return section.block or section.attn_kwargs.block_size or 128


def remarks(section: Sparsity) -> Iterator[str]:
    """What a run should say aloud: keys without effect, names that stand for others."""
    for part in parts(section):
        if part.name in SAME_AS:
            yield SAME_AS[part.name][1]
        known = _OPTIONS.get(part.name)
        if known is not None:
            for key in part.attn_kwargs.given():
                if key not in known and key not in _SILENT:
                    yield f"sparsity.attn_kwargs.{key} has no effect on {part.name}."
    if section.search_heads and section.name != "minference":
        yield "sparsity.search_heads has no effect: only minference has patterns of heads."


def numbers(places: str | None, count: int, what: str) -> tuple[int, ...] | None:
    """``"0-3, 8, 20-"`` as numbers below `count`; None means all of them. A number that is none is a `ConfigError`."""
    if places is None:
        return None
    found: list[int] = []
    for part in places.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"A rule of sparse attention has the {what} {part.strip()!r}.",
                fix='Write numbers and ranges, such as "0-3, 8, 20-".',
            )
        first, last = int(match[1]), int(match[1])
        if match[2] is not None:
            last = int(match[2]) if match[2] else count - 1
        if max(first, last) >= count or last < first:
            raise ConfigError(
                f"A rule of sparse attention has the {what} {part.strip()!r}; the model has {count}, from 0 to {count - 1}.",
                fix="Name what the model has.",
            )
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def _options(part: Sparsity | LayerRule) -> dict[str, Any]:
    """Options by the selector's own names: public keys first, then `options`, then the density."""
    names = _OPTIONS.get(part.name, {})
    given = part.attn_kwargs.given()
    found = {names[key]: value for key, value in given.items() if key in names}
    found |= part.options
    if part.density is None:
        return found
    if found.setdefault("density", part.density) != part.density:
        raise ConfigError(
            f"The density of {part.name} is given twice: density {part.density}, options.density {found['density']}.",
            fix="Keep the key density.",
        )
    return found
