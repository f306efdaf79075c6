"""MInference's files of head patterns: read, checked, written.

A file is JSON. MInference's own form is a list with one mapping a layer, head number -> ``[kind, first, second, score]``::

    [{"0": ["vertical_and_slash", 1000, 6096, 0.98], "1": ["stream_llm", 100, 800, 0.99]}, ...]

The two numbers are columns and diagonals of ``vertical_and_slash``, sink and window of ``stream_llm``, and the key blocks a
row of ``block_sparse`` (the second is unused). AngelSlim's public form wraps this list as ``best_pattern`` beside
``schema_version`` and ``model_fingerprint``, so that a file is not used with another model. Both are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...base.errors import ConfigError
from ...models.checkpoint import write_atomically

KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")
SCHEMA_VERSION = 1


class HeadPattern(NamedTuple):
    """How one head is made sparse; `first` and `second` as in the module's docstring."""

    kind: str
    first: int
    second: int
    score: float = 0.0


Patterns = tuple[tuple[HeadPattern, ...], ...]  # layer, head


def read_patterns(path: str | Path, fingerprint: Mapping[str, Any] | None = None) -> Patterns:
    """Read a file of either form; what `fingerprint` says must agree with what the file says of the same things."""
    where = str(path)
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no pattern file {where}.", fix="Check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"This is no JSON: {error}.", where=where) from None
    if isinstance(content, dict):
        _compare(content.get("model_fingerprint") or {}, fingerprint or {}, where)
        content = content.get("best_pattern")
    if not isinstance(content, list) or not content:
        raise ConfigError(
            "A pattern file is a list of layers, or has one as best_pattern.",
            where=where,
            fix="Write it with write_patterns, or take one of MInference's.",
        )
    return tuple(_layer(layer, number, where) for number, layer in enumerate(content))


def write_patterns(
    path: str | Path, patterns: Sequence[Sequence[HeadPattern]], fingerprint: Mapping[str, Any] | None = None
) -> None:
    """Write a file: MInference's form, or the wrapped one when a fingerprint is given."""
    layers = [{str(head): list(pattern) for head, pattern in enumerate(layer)} for layer in patterns]
    content: object = layers
    if fingerprint is not None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "model_fingerprint": dict(fingerprint),
            "best_pattern": layers,
        }
    write_atomically(Path(path), (json.dumps(content, indent=1) + "\n").encode())


def _compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    for key, value in wanted.items():
        if key in stored and stored[key] != value:
            raise ConfigError(
                f"The patterns are for a model with {key} {stored[key]!r}, this one has {value!r}.",
                where=where,
                fix="Search the patterns of this model.",
            )


def _layer(layer: Any, number: int, where: str) -> tuple[HeadPattern, ...]:
    if not isinstance(layer, dict) or sorted(layer, key=str) != sorted(map(str, range(len(layer)))):
        raise ConfigError(
            f"Layer {number} is no mapping of the head numbers 0, 1, ...",
            where=where,
            fix="List every head of the layer once.",
        )
    return tuple(
        _head(layer[str(head)], f"{where}, layer {number}, head {head}") for head in range(len(layer))
    )


def _head(entry: Any, where: str) -> HeadPattern:
    good = isinstance(entry, list) and len(entry) in (3, 4) and entry[0] in KINDS
    if not good or not all(type(value) in (int, float) for value in entry[1:]) or min(entry[1:3]) < 0:
        raise ConfigError(
            f"{entry!r} is no head pattern.",
            where=where,
            fix="Write [kind, number, number, score] with a kind of " + ", ".join(KINDS) + ".",
        )
    return HeadPattern(entry[0], int(entry[1]), int(entry[2]), float(entry[3]) if len(entry) == 4 else 0.0)
