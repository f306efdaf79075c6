"""Key checks: every unknown key of a file at once, each with the nearest known one; and readable value errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from ..base.errors import did_you_mean
from .fields import Section
from .schema import names_of

_NEEDED = {  # pydantic's error kinds, by the start of their names
    "int": "a whole number is needed",
    "float": "a number is needed",
    "bool": "true or false is needed",
    "string": "a text is needed",
    "model": "a section (key: value lines) is needed",
    "dict": "a section (key: value lines) is needed",
    "list": "a list is needed",
}


def inner_section(annotation: Any) -> type[Section] | None:
    """The section type within an annotation such as ``list[Stage] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (inner_section(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def _below(section: type[Section], key: str) -> tuple[bool, type[Section] | None]:
    """Whether `key` is known in `section`, and the section it opens."""
    name = names_of(section).get(key)
    if name is not None:
        return True, inner_section(section.model_fields[name].annotation)
    opened = section.extra_section(key)
    return opened is not None or key in section.extra_keys, opened


def unknown_keys(section: type[Section], raw: object, path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield the dotted path of each unknown key, with the section it stands in."""
    if isinstance(raw, list):
        for index, item in enumerate(raw):
            yield from unknown_keys(section, item, f"{path}{index}.")
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            known, opened = _below(section, key)
            if not known:
                yield f"{path}{key}", section
            elif opened is not None:
                yield from unknown_keys(opened, value, f"{path}{key}.")


def _places(section: type[Section], path: str = "") -> Iterator[str]:
    """Every dotted key below a section."""
    for key, name in names_of(section).items():
        yield f"{path}{key}"
        opened = inner_section(section.model_fields[name].annotation)
        if opened is not None:
            yield from _places(opened, f"{path}{key}.")


def suggestion(root: type[Section], section: type[Section], dotted: str) -> str:
    """The way out of an unknown key: the same key elsewhere, a near one here, a near one elsewhere, or all."""
    key = dotted.rpartition(".")[2]
    here = {*names_of(section), *section.extra_keys} | ({"extends"} if section is root else set())
    elsewhere = [place for place in _places(root) if place.rpartition(".")[2] == key]
    if elsewhere:
        return f"Did you mean {elsewhere[0]!r}?"
    if near := difflib.get_close_matches(key, here, n=1, cutoff=0.5):
        return f"Did you mean {near[0]!r}?"
    names = {place.rpartition(".")[2]: place for place in reversed(list(_places(root)))}
    if far := difflib.get_close_matches(key, names, n=1, cutoff=0.8):
        return f"Did you mean {names[far[0]]!r}?"
    return "Known here: " + ", ".join(sorted(here)[:20]) + (", ..." if len(here) > 20 else ".")


def value_problems(error: ValidationError, raw: object) -> dict[str, str]:
    """Each wrong value by its dotted key, in words; of nested complaints the deepest is kept."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        dotted = ".".join(_trace(item["loc"], raw))
        given = item["input"]
        shown = "" if item["type"] == "missing" or isinstance(given, Mapping | list) else f" is {given!r}"
        text = f"{dotted}{shown}: {_words(item)}"
        if problems.setdefault(dotted, text) != text and item["type"] == "literal_error":
            problems[dotted] += f", or {' or '.join(_literals(item))}"  # a value or one of some words
    return {
        key: text
        for key, text in problems.items()
        if not any(other.startswith(key + ".") for other in problems)
    }


def _trace(loc: tuple[int | str, ...], raw: object) -> Iterator[str]:
    """The parts of a pydantic location that are keys of the file, without union tags and added lists."""
    node: Any = raw
    for position, part in enumerate(loc):
        children: Any = (
            node if isinstance(node, Mapping) else dict(enumerate(node)) if isinstance(node, list) else {}
        )
        last = position == len(loc) - 1
        if part in children or (last and isinstance(node, Mapping) and isinstance(part, str)):
            yield str(part)
            node = children.get(part)


def _words(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "it is missing"
    if kind == "literal_error":
        return "not one of the known words. " + did_you_mean(
            str(item["input"]), filter(None, _literals(item))
        )
    if needed := _NEEDED.get(kind.partition("_")[0]):
        return str(needed)
    return str(item["msg"]).replace("Input should", "it must")


def _literals(item: Any) -> list[str]:
    """The words that a literal may be."""
    return re.findall(r"'([^']*)'", item["ctx"]["expected"])
