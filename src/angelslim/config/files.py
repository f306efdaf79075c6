"""Read YAML as plain values: strings, numbers, truth values, lists and mappings with string keys.

Stricter than YAML where silence would hurt (a key given twice is refused, with its line) and kinder where YAML
1.1 surprises (``1e-6`` is a number here). Nothing in a file is ever executed: the loader is the safe one.
"""

from __future__ import annotations

import datetime
import math
import re
from pathlib import Path
from typing import Any

import yaml

from ..base.errors import ConfigError

_MOST_NODES = 100_000  # aliases can make a small file unfold without end
_DEEPEST = 40
# YAML 1.1 wants a dot and a signed exponent; people and papers write 1e-6.
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_FLOAT_STARTS = list("-+0123456789.")


class _Loader(yaml.SafeLoader):
    """The safe loader, with numbers as people write them and no key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; a key that stands twice would silently lose one of its values."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """The safe dumper, quoting every string that `_Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out; an alias in a run file helps nobody."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # YAML folds these three line breaks into spaces unless they are escaped.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

# A class-level copy keeps the change away from everyone else's yaml.SafeLoader.
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        start: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:float"]
        for start, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FLOAT_STARTS)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document into plain values; `where` names it in errors."""
    try:
        loader = _Loader(text)
        try:
            return _plain(loader.get_single_data(), where)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ConfigError(f"Not valid YAML: {error.problem or error.context}.", where=place) from None
    except (yaml.YAMLError, ValueError) as error:
        problem = str(error).partition("\n")[0]
        raise ConfigError(f"Not valid YAML: {problem}.", where=where) from None
    except RecursionError:
        raise ConfigError("The YAML is nested too deeply.", where=where) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file whose top level is a mapping."""
    where = str(path)
    if path.is_dir():
        raise ConfigError("This is a folder.", where=where, fix="Name a .yaml file in it.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("There is no such file.", where=where, fix="Check the path.") from None
    except UnicodeDecodeError as error:
        fix = "Save the file as UTF-8."
        raise ConfigError(f"Not UTF-8 text (byte {error.start}).", where=where, fix=fix) from None
    except OSError as error:
        raise ConfigError(f"Cannot be read: {error.strerror}.", where=where) from None
    data = parse_yaml(text, where)
    if data is None:
        raise ConfigError(
            "The file is empty.", where=where, fix="A recipe has at least a compression section."
        )
    if not isinstance(data, dict):
        fix = "The top level must be sections such as 'model:' and 'compression:'."
        raise ConfigError(f"The file holds a {_kind(data)}, not sections.", where=where, fix=fix)
    return data


def write_yaml(data: object) -> str:
    """Write plain values as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _kind(data: object) -> str:
    names = {list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return names.get(type(data), "value")


def plain(data: object, where: str) -> Any:
    """Copy values given from Python into plain ones; anything else is refused."""
    return _plain(data, where)


def _plain(data: object, where: str) -> Any:
    budget = [_MOST_NODES]

    def copy(node: object, depth: int) -> Any:
        budget[0] -= 1
        if budget[0] < 0 or depth > _DEEPEST:
            fix = "Write the values out instead of using anchors."
            raise ConfigError("The YAML unfolds into too many values.", where=where, fix=fix)
        if isinstance(node, dict):
            return {str(key): copy(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [copy(item, depth + 1) for item in node]
        if isinstance(node, datetime.date):
            return node.isoformat()
        if isinstance(node, Path):
            return str(node)
        if node is None or isinstance(node, str | bool | int):
            return node
        if isinstance(node, float):
            if math.isfinite(node):
                return node
            raise ConfigError(f"The number {node} is not finite.", where=where)
        raise ConfigError(f"A value of type {type(node).__name__} has no place here.", where=where)

    return copy(data, 0)
