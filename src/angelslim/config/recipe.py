"""From a recipe's name or a file, plus overrides, to a checked run whose every value has a known origin.

A run is a stack of layers: the recipes it `extends`, the file itself, and overrides such as
``dataset.num_samples=64``. Mappings merge key by key, lists and values replace; a scheme also replaces the words about
granularity of the layers below, which adjusted another one. Unknown keys of all layers are reported at once. `Resolved.to_yaml` writes what was set, merged: a ``run.yaml`` that loads to the same run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from ..base.errors import ConfigError, did_you_mean
from .files import parse_yaml, plain, read_yaml, write_yaml
from .keys import suggestion, unknown_keys, value_problems
from .remarks import remarks
from .schema import CONFIGS, AnyConfig, Dialect, dialect_of, names_of
from .slips import mend
from .upstream import METHODS

OVERRIDE = "override"
GRANULARITY = ("weight", "activation", "group_size", "block_size", "zero_point")  # words that adjust a scheme
_RECIPE = "recipe "  # what provenance says before the name of a recipe of the package
_BASES = ("base", "qat_base", "sparse_base")  # what the recipes extend; nothing to run by themselves


@dataclass(frozen=True)
class Resolved:
    """A run, resolved: typed values, where each came from, and what deserves a warning."""

    config: AnyConfig
    dialect: Dialect
    provenance: dict[str, str]  # dotted key -> "default", "recipe <name>", a file, or "override"
    warnings: list[str]
    raw: dict[str, Any]  # what was set, merged
    # The recipe of the package that says what is done, unless something on top says it.
    recipe: str | None = None

    def to_yaml(self) -> str:
        """Write what was set as YAML that loads to the same configuration."""
        return write_yaml(self.raw)


@dataclass(frozen=True)
class _Layer:
    source: str
    values: dict[str, Any]


def recipes() -> dict[str, str]:
    """The recipes that come with the package: name -> the first comment line of the file."""
    return {
        path.stem: path.read_text("utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(_recipe_folder().glob("*.yaml"))
        if path.stem not in _BASES
    }


def recipe_path(name: str) -> Path:
    """The file of a recipe of the package; an unknown name is a `ConfigError`."""
    plain_name = name.replace("-", "_")
    if plain_name not in recipes():
        raise ConfigError(f"Unknown recipe {name!r}.", fix=did_you_mean(plain_name, recipes()))
    return _recipe_folder() / f"{plain_name}.yaml"


@cache
def _recipe_folder() -> Path:
    return Path(__file__).parent.parent / "recipes"


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Resolved:
    """Resolve a recipe name, a YAML file or a mapping, with overrides ``dotted.key=value`` on top.

    Every problem is a `ConfigError` that names the file, the dotted key, the value, and the nearest known key.
    """
    if isinstance(source, Mapping):
        layers, where = _stack(_Layer("given", plain(dict(source), "given")), Path(), ()), "given"
    else:
        path, where = _locate(str(source), Path())
        layers = _stack(_Layer(where, read_yaml(path)), path.parent, (path.resolve(),))
    raw: dict[str, Any] = {}
    sources: dict[str, str] = {}
    warnings: list[str] = []
    for layer in layers:
        warnings += mend(layer.values, layer.source)
        _merge(raw, layer.values, sources, layer.source)
    for override in overrides:
        _apply(raw, override, sources)
    dialect = dialect_of(raw) or _nearest_dialect(raw)
    config = _check(raw, dialect, sources, where)
    warnings += remarks(config)
    recipe = _recipe(layers, sources)
    return Resolved(config, dialect, _provenance(config, raw, sources), warnings, raw, recipe)


def _recipe(layers: Sequence[_Layer], sources: Mapping[str, str]) -> str | None:
    """The most special recipe of the package below a run, if no file or override renames what is done."""
    named = {
        source
        for key, source in sources.items()
        if key.endswith((".quantization.name", "transform.name", "special.quant_method"))
    }
    below = [layer.source.removeprefix(_RECIPE) for layer in layers if layer.source.startswith(_RECIPE)]
    found = next((name for name in reversed(below) if name in recipes()), None)
    return found if all(source.startswith(_RECIPE) for source in named) else None


# ---------------------------------------------------------------------------------------------- layers


def _locate(name: str, folder: Path) -> tuple[Path, str]:
    """A file, or else a recipe of the package; `folder` is where relative paths start."""
    path = folder / name
    if path.is_file() or name.endswith((".yaml", ".yml")) or (path.is_dir() and "/" in name):
        return path, str(path)
    plain_name = name.replace("-", "_")
    if plain_name in {*recipes(), *_BASES}:
        return _recipe_folder() / f"{plain_name}.yaml", f"{_RECIPE}{plain_name}"
    if plain_name in METHODS:
        fix = "Recipes: " + ", ".join(recipes()) + "."
        raise ConfigError(f"The method {name!r} has no recipe.", fix=f"Give it in a YAML file. {fix}")
    fix = did_you_mean(plain_name, recipes())
    raise ConfigError(f"{name!r} is neither a recipe nor a YAML file.", fix=fix)


def _stack(layer: _Layer, folder: Path, seen: tuple[Path, ...]) -> list[_Layer]:
    """The layers below and including `layer`, the most general first."""
    parent = layer.values.pop("extends", None)
    if parent is None:
        return [layer]
    if not isinstance(parent, str):
        raise ConfigError(
            f"extends is {parent!r}; it must name one recipe or file.", where=layer.source, fix="Use a name."
        )
    try:
        path, source = _locate(parent, folder)
        if path.resolve() in seen:
            chain = " -> ".join([*(item.name for item in seen), path.name])
            raise ConfigError(f"extends runs in a circle: {chain}.", fix="Remove one extends.")
        below = _Layer(source, read_yaml(path))
    except ConfigError as error:
        if error.where:
            raise
        raise ConfigError(error.what, where=f"{layer.source}, extends", fix=error.fix) from None
    return [*_stack(below, path.parent, (*seen, path.resolve())), layer]


def _merge(
    into: dict[str, Any], values: dict[str, Any], sources: dict[str, str], source: str, path: str = ""
) -> None:
    for key, value in values.items():
        dotted = f"{path}{key}"
        present = into.get(key)
        if isinstance(value, dict) and isinstance(present, dict):
            _merge(present, value, sources, source, f"{dotted}.")
            continue
        for old in [name for name in sources if name == dotted or name.startswith(f"{dotted}.")]:
            del sources[old]
        if dotted.endswith("quantization.scheme"):
            _drop_granularity(into, sources, source, path)
        into[key] = copy.deepcopy(value)
        sources.update((leaf, source) for leaf in _leaves(value, dotted))


def _drop_granularity(section: dict[str, Any], sources: dict[str, str], source: str, path: str) -> None:
    """Remove the words that adjusted the scheme which another replaces now, unless who names it says them too."""
    words = section.get("quant_method")
    if not isinstance(words, dict):
        return
    for word in GRANULARITY:
        dotted = f"{path}quant_method.{word}"
        if word in words and sources.get(dotted) != source:
            del words[word]
            for old in [name for name in sources if name == dotted or name.startswith(f"{dotted}.")]:
                del sources[old]


def _leaves(value: object, dotted: str) -> Iterator[str]:
    """Dotted keys of the values below a node; a list of values is one leaf, a list of sections is not."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{dotted}.{key}")
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{dotted}.{index}")
    else:
        yield dotted


def _provenance(config: AnyConfig, raw: dict[str, Any], sources: dict[str, str]) -> dict[str, str]:
    values = config.model_dump(by_alias=True)
    if "compression" in values and not isinstance(raw.get("compression"), list):
        values["compression"] = values["compression"][0] if values["compression"] else None
    leaves = [leaf for key, value in values.items() for leaf in _leaves(value, key)]
    return {leaf: sources.get(leaf, "default") for leaf in leaves}


# ------------------------------------------------------------------------------------------- overrides


def _apply(raw: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    """Set one ``dotted.key=value`` in place."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        fix = "Write it as dotted.key=value, for example dataset.num_samples=64."
        raise ConfigError(f"{override!r} is not an override.", fix=fix)
    value = parse_yaml(text, f"{OVERRIDE} {override!r}")
    node: Any = raw
    path = ""
    for position, part in enumerate(parts[:-1]):
        node = _descend(node, part, path, override)
        path += f"{part}."
        after = parts[position + 1]
        if isinstance(node, list) and not after.isdigit():
            if len(node) != 1 or not isinstance(node[0], dict):
                fix = f"Say which one: {path}0.{after}, up to {path}{len(node) - 1}.{after}." if node else ""
                raise ConfigError(
                    f"{path[:-1]} is a list of {len(node)}.", where=f"{OVERRIDE} {override!r}", fix=fix
                )
            node, path = node[0], f"{path}0."
    if not isinstance(node, dict):
        fix = "Give the whole list, as in key=[a, b]."
        raise ConfigError(f"{path[:-1]} is a list.", where=f"{OVERRIDE} {override!r}", fix=fix)
    _merge(node, {parts[-1]: value}, sources, OVERRIDE, path)


def _descend(node: Any, part: str, path: str, override: str) -> Any:
    """One step towards an override's key; absent sections are made."""
    where = f"{OVERRIDE} {override!r}"
    if isinstance(node, list):
        if int(part) >= len(node):
            raise ConfigError(f"{path[:-1]} has {len(node)} entries; {part} is none of them.", where=where)
        return node[int(part)]
    if not isinstance(node, dict):
        fix = f"Set {path[:-1]} itself."
        raise ConfigError(f"{path[:-1]} holds the value {node!r}, not a section.", where=where, fix=fix)
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], dict | list):
        fix = f"Set {path}{part} itself."
        raise ConfigError(
            f"{path}{part} holds the value {node[part]!r}, not a section.", where=where, fix=fix
        )
    return node[part]


# -------------------------------------------------------------------------------------------- checking


def _nearest_dialect(raw: dict[str, Any]) -> Dialect:
    """The dialect whose keys are nearest to a file's, when none of its keys is known."""

    def nearness(dialect: Dialect) -> int:
        known = names_of(CONFIGS[dialect])
        return sum(did_you_mean(key, known).startswith("Did") for key in raw)

    return max(CONFIGS, key=nearness)


def _check(raw: dict[str, Any], dialect: Dialect, sources: dict[str, str], where: str) -> AnyConfig:
    root = CONFIGS[dialect]
    unknown = {
        dotted: f"Unknown key {dotted!r}. {suggestion(root, section, dotted)}"
        for dotted, section in unknown_keys(root, raw)
    }
    _refuse(unknown, sources, where)
    try:
        return cast(AnyConfig, root.model_validate(raw))
    except ValidationError as error:
        _refuse(value_problems(error, raw), sources, where)
        raise  # unreachable: a validation error holds at least one problem


def _refuse(problems: dict[str, str], sources: dict[str, str], where: str) -> None:
    """Raise one error for all problems; each says which layer it came from when that is not the file itself."""
    if not problems:
        return
    lines = []
    for dotted, text in problems.items():
        below = (source for leaf, source in sources.items() if leaf.startswith(f"{dotted}."))
        lines.append((sources.get(dotted) or next(below, where), text))
    if len({source for source, _ in lines}) == 1:
        where = lines[0][0]
        texts = [text for _, text in lines]
    else:
        texts = [f"{text} (from {source})" for source, text in lines]
    if len(texts) == 1:
        raise ConfigError(texts[0], where=where)
    raise ConfigError(f"{len(texts)} problems.\n  - " + "\n  - ".join(texts), where=where)
