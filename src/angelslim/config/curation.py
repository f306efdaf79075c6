"""The curation dialect: ``sources``, ``stages``, ``output``, ``seed``. What ``angelslim curate`` reads.

A file names where the documents come from and, in order, what happens to them:

.. code-block:: yaml

    sources:
      - {name: web, path: web/*.jsonl}
    stages:
      - exact
      - fuzzy: {threshold: 0.8}

Which stages there are, and their options, is known to the stages alone (each declares a `Section` of its own), so this
module checks the frame and `checked` is what checks a stage's options in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from ..base.errors import ConfigError, did_you_mean
from .fields import Int, Section, Size, Word, Words
from .files import read_yaml
from .keys import unknown_keys, value_problems
from .schema import names_of

S = TypeVar("S", bound=Section)


def _one_stage(entry: object) -> dict[str, Any]:
    if isinstance(entry, str):
        return {entry: {}}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, options),) = entry.items()
        if options is None or isinstance(options, Mapping):
            return {str(name): dict(options or {})}
    raise ValueError("each stage is a name, or one name with its options: '- fuzzy: {threshold: 0.8}'")


def _stage_list(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError("a list of stages is needed, each line beginning with '- '")
    return [_one_stage(entry) for entry in value]


class Source(Section):
    """Where documents come from: files, patterns such as ``web/*.jsonl``, or data sets of the hub's cache."""

    name: Word
    path: Words


class Output(Section):
    """How the curated set is written."""

    shard_size: Size = 256 * 10**6  # bytes of one part file
    shuffle: bool = True  # one seeded order over all sources; false keeps the order of reading


class Curation(Section):
    """A whole curation recipe; each entry of `stages` has one key, the stage's name, and its options."""

    seed: Int = 0
    sources: Annotated[list[Source], Field(min_length=1)]
    stages: Annotated[list[dict[str, Any]], BeforeValidator(_stage_list)] = Field(default_factory=list)
    output: Output = Field(default_factory=Output)

    def steps(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the stages in order: name and options."""
        return [next(iter(entry.items())) for entry in self.stages]


def is_curation(path: Path) -> bool:
    """Say whether a file speaks this dialect; one that cannot be read does not."""
    try:
        return bool({"sources", "stages"} & set(read_yaml(path)))
    except ConfigError:
        return False


def load_curation(path: Path) -> Curation:
    """Read a recipe; every problem of its frame at once is one `ConfigError`."""
    config = checked(Curation, read_yaml(path), str(path))
    names = [source.name for source in config.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        fix = "Give each its own name, or list the files under one 'path'."
        raise ConfigError(f"Two sources are called {twice[0]!r}.", where=str(path), fix=fix)
    return config


def checked(section: type[S], raw: Mapping[str, Any], where: str) -> S:
    """Return `raw` as a section; unknown keys (each with the nearest known one) and wrong values are refused."""
    problems = [
        f"Unknown key {dotted!r}. {did_you_mean(dotted.rpartition('.')[2], names_of(inner))}"
        for dotted, inner in unknown_keys(section, raw)
    ]
    if problems:
        raise ConfigError(" ".join(problems), where=where)
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(value_problems(error, raw).values()) + ".", where=where) from None
