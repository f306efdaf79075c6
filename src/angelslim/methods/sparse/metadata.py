"""`sparse_attention.json`: what a model needs to know to prefill sparsely, in one small file beside its weights.

Nothing of a model's weights changes, so a result is this file: which selector chooses for which layers and heads, with
which options, how long a prompt must be, the side of a block, the kernel, and a fingerprint of the model it was made for::

    {"version": 1, "block": 128, "crossover": 8192, "kernel": "auto",
     "rules": [{"selector": "dense", "layers": [0, 1]}, {"selector": "stem", "options": {"density": 0.1}}],
     "model": {"model_type": "qwen3", "num_hidden_layers": 36, ...}}

The first rule that names a layer and a head decides; a rule without layers or heads means all of them; what no rule names
stays dense, and so does what the rule ``dense`` names. Files that options name (MInference's patterns) are given
relative to the folder of this one. A file of another model, of a later version, or with an unknown selector or option is
a `ConfigError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...base.errors import ConfigError
from ...base.files import write_atomically
from .assign import Rule
from .attach import Settings
from .selectors.base import SELECTORS, SelectorClass

FILE = "sparse_attention.json"
VERSION = 1
DENSE = "dense"
PATHS = ("patterns",)  # options that name a file
_FINGERPRINT = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class HeadRule:
    """One rule as plain values: a selector's name, or "dense", with its options; None means all layers, all heads."""

    selector: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def make(self, folder: Path | None = None) -> Rule:
        """The rule with its selector made; paths in the options start at `folder`."""
        chosen = None
        if self.selector != DENSE:
            chosen = made(self.selector, self.options, folder).select
        layers = None if self.layers is None else frozenset(self.layers)
        return Rule(chosen, layers, None if self.heads is None else frozenset(self.heads))


@dataclass(frozen=True)
class Metadata:
    """Everything that the file holds; `folder` is where it was read, for the paths in it."""

    rules: tuple[HeadRule, ...]
    block: int = 128
    crossover: int | Literal["auto"] = "auto"
    kernel: str = "auto"
    model: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def settings(self, **changes: Any) -> Settings:
        """The hook's settings; `changes` are fields of `attach.Settings`."""
        return replace(Settings(self.block, self.crossover, self.kernel), **changes)

    def make_rules(self) -> list[Rule]:
        """The rules with their selectors made."""
        return [rule.make(self.folder) for rule in self.rules]

    def files(self) -> list[Path]:
        """The files that the options of the rules name."""
        named = [rule.options[key] for rule in self.rules for key in PATHS if rule.options.get(key)]
        return [(self.folder or Path()) / Path(str(name)).expanduser() for name in named]

    def check(self, config: Any) -> None:
        """Refuse a model of another shape; `config` is that of its text tower."""
        mine = fingerprint(config)
        for key, value in self.model.items():
            if key in mine and mine[key] != value:
                raise ConfigError(
                    f"These settings of sparse attention are for a model with {key} {value!r}, this one has {mine[key]!r}.",
                    where=str(self.folder / FILE) if self.folder else "",
                    fix="Run the recipe on this model.",
                )

    def to_json(self) -> str:
        """The file's text."""
        rules = []
        for rule in self.rules:
            entry: dict[str, Any] = {"selector": rule.selector}
            entry |= {"options": dict(rule.options)} if rule.options else {}
            for name, numbers in (("layers", rule.layers), ("heads", rule.heads)):
                entry |= {name: list(numbers)} if numbers is not None else {}
            rules.append(entry)
        content = {
            "version": VERSION,
            "block": self.block,
            "crossover": self.crossover,
            "kernel": self.kernel,
            "rules": rules,
            "model": dict(self.model),
        }
        return json.dumps(content, indent=1) + "\n"

    def write(self, folder: Path) -> Path:
        """Write the file into `folder`."""
        write_atomically(folder / FILE, self.to_json().encode())
        return folder / FILE


def made(name: str, options: Mapping[str, Any], folder: Path | None = None) -> SelectorClass:
    """A selector with its options; an unknown name or option, or a wrong value, is a `ConfigError`."""
    given = dict(options)
    for key in PATHS:
        path = Path(str(given[key])).expanduser() if given.get(key) else None
        if path is not None and folder is not None and not path.is_absolute():
            given[key] = str(folder / path)
    return SELECTORS.get(name)(given)


def read(path: str | Path) -> Metadata:
    """Read the file, or that of a folder."""
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["version"] > VERSION:
            raise ConfigError(
                f"The file is of version {content['version']}, this program reads {VERSION}.",
                where=str(path),
                fix="Install a newer angelslim.",
            )
        rules = tuple(
            HeadRule(
                entry["selector"],
                dict(entry.get("options", {})),
                _numbers(entry.get("layers")),
                _numbers(entry.get("heads")),
            )
            for entry in content["rules"]
        )
        crossover = content["crossover"]
        return Metadata(
            rules,
            int(content["block"]),
            "auto" if crossover == "auto" else int(crossover),
            str(content["kernel"]),
            dict(content.get("model", {})),
            path.parent,
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"There is no readable {FILE} at {str(path)!r}.",
            fix="Make one with a recipe of sparse attention.",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"This is no description of sparse attention ({type(error).__name__}: {error}).",
            where=str(path),
            fix="Make it again with a recipe of sparse attention.",
        ) from error


def fingerprint(config: Any) -> dict[str, Any]:
    """What tells a model's attention from another's, from the configuration of its text tower."""
    found = {name: getattr(config, name, None) for name in _FINGERPRINT}
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping) and isinstance(rope.get("rope_theta"), (int, float)):
        found["rope_theta"] = float(rope["rope_theta"])
    return {name: value for name, value in found.items() if value is not None}


def _numbers(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(int(value) for value in values)
