"""A registry is a folder: each module in it is one entry, its file name is the entry's name.

Dropping a file into ``methods/ptq/`` or ``export/`` is all it takes to add a method or a format. Modules are
found without importing them (so listing names never loads torch) and imported when first asked for. Other
packages add entries through entry points of the group ``angelslim.<kind>s``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar, cast

from .errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries found in the modules of a package.

    `kind` is the word used in messages ("method"), `package` the dotted package to scan, `attribute` the
    name that each module must define. Modules whose name starts with an underscore, or is ``base``, are
    helpers and not entries.
    """

    def __init__(self, kind: str, package: str, attribute: str) -> None:
        self.kind, self.package, self.attribute = kind, package, attribute

    @cached_property
    def _targets(self) -> dict[str, str]:
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations is not None, self.package
        targets = {
            module.name: f"{self.package}.{module.name}"
            for module in pkgutil.iter_modules(spec.submodule_search_locations)
            if not module.ispkg and not module.name.startswith("_") and module.name != "base"
        }
        for entry in entry_points(group=f"angelslim.{self.kind}s"):
            targets.setdefault(entry.name, entry.value)
        return targets

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def get(self, name: str) -> T:
        """Import the entry's module and return its object; an unknown name is a `ConfigError`."""
        if name not in self._targets:
            raise ConfigError(f"Unknown {self.kind} {name!r}.", fix=did_you_mean(name, self))
        module = importlib.import_module(self._targets[name])
        return cast(T, getattr(module, self.attribute))

    def summary(self, name: str) -> str:
        """Return the first line of the entry's module docstring, read without importing the module."""
        spec = importlib.util.find_spec(self._targets[name])
        if spec is None or spec.origin is None:
            return ""
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""
        return docstring.partition("\n")[0]
