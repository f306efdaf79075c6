"""What discovery finds in common dense families, shipped with the package: their first run builds no network.

Importing the modelling code of transformers takes longer than rounding a small model, and for these families its answer
is known: the same block, over and over. ``families.json`` holds one block of each, as patterns, with the sizes that
config.json gives their tensors. Nobody writes it: ``python -m angelslim.lab.families`` asks transformers, and tests compare
what is read here with what discovery finds.

It is believed only of a checkpoint that holds exactly the tensors that are expected, each in the expected shape, for
the class and the major version of transformers that were asked. Anything else is discovered: own code, another head, a
tensor more or less, a setting of another kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .outline import Outline, Target
from .structure import Group, Structure

FILE = Path(__file__).with_name("families.json")
NUMBER = "{}"  # stands for the block's number
Shapes = Mapping[str, list[str]]  # parameter -> its sizes, each the name of a size or a sum of names


@dataclass(frozen=True)
class Family:
    """One family: paths of modules and parameters, those of a block relative to it."""

    architecture: str  # the class that config.json names
    head_dim: int | None  # where config.json does not say; None: the hidden size's share of a head
    tied: bool  # whether the output head is the embedding where config.json does not say
    decoder: str
    block: str  # a block's path, with `NUMBER`
    embeddings: list[str]
    head: str
    groups: list[tuple[str | None, list[str]]]  # source, linears
    linears: list[str]
    parameters: Shapes  # of a block
    outside: Shapes
    options: Mapping[str, bool]  # settings that add parameters to a block, with their defaults
    added: Mapping[str, Shapes]  # what they add

    def sizes(self, settings: Mapping[str, Any]) -> dict[str, int]:
        """Return the named sizes; a KeyError, TypeError or ZeroDivisionError where config.json does not give them."""
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        head = settings.get("head_dim") or self.head_dim or hidden // heads
        return {
            "hidden": hidden,
            "inner": settings["intermediate_size"],
            "vocabulary": settings["vocab_size"],
            "head": head,
            "queries": heads * head,
            "keys": settings["num_key_value_heads"] * head,
        }

    def shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter, that of the head included."""
        sizes = self.sizes(settings)

        def shape(named: list[str]) -> tuple[int, ...]:
            return tuple(sum(sizes[part] for part in each.split("+")) for each in named)

        block = dict(self.parameters)
        for option, default in self.options.items():
            if settings.get(option, default) is True:
                block |= self.added[option]
        found = {name: shape(named) for name, named in self.outside.items()}
        for path in self.blocks(settings):
            found |= {f"{path}.{name}": shape(named) for name, named in block.items()}
        return found

    def blocks(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield the blocks' paths."""
        return (self.block.replace(NUMBER, str(each)) for each in range(settings["num_hidden_layers"]))

    def structure(self, settings: Mapping[str, Any]) -> Structure:
        """Return what discovery finds."""
        shapes = self.shapes(settings)
        groups: dict[str, tuple[Group, ...]] = {}
        linears: list[str] = []
        for block in self.blocks(settings):
            groups[block] = tuple(
                Group(
                    None if source is None else f"{block}.{source}",
                    tuple(f"{block}.{name}" for name in names),
                )
                for source, names in self.groups
            )
            linears += [f"{block}.{name}" for name in self.linears]
        sizes = {name: shapes[f"{name}.weight"] for name in (*linears, self.head)}
        return Structure(
            model_type=str(settings["model_type"]),
            decoder=self.decoder,
            blocks=tuple(groups),
            groups=groups,
            linears={name: (shape[0], shape[1]) for name, shape in sizes.items()},
            embeddings=tuple(self.embeddings),
            head=self.head,
        )


@cache
def known() -> tuple[str, dict[str, Family]]:
    """Return the version of transformers that was asked, and what it said of each `model_type`."""
    raw = json.loads(FILE.read_text("utf-8"))
    return raw["transformers"], {name: Family(**each) for name, each in raw["families"].items()}


def shipped(settings: Mapping[str, Any], checkpoint: Checkpoint) -> Outline | None:
    """Return the outline of a model whose family is known and whose tensors are exactly the expected ones.

    `settings` are config.json as it is, without what it says of quantization.
    """
    asked, families = known()
    family = families.get(str(settings.get("model_type")))
    if family is None or settings.get("auto_map") or settings.get("architectures") != [family.architecture]:
        return None
    if version("transformers").partition(".")[0] != asked.partition(".")[0]:
        return None
    switches = {**family.options, "tie_word_embeddings": family.tied}
    if not all(isinstance(settings.get(name, default), bool) for name, default in switches.items()):
        return None
    try:
        expected = family.shapes(settings)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return None
    stored = {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
    head = f"{family.head}.weight"
    if settings.get("tie_word_embeddings", family.tied) and head not in stored:
        stored[head] = expected[head]
    if stored != expected or not any(family.blocks(settings)):
        return None
    return Outline(family.structure(settings), {name: Target(name) for name in checkpoint.tensors})
