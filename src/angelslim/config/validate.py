"""Check a configuration file without starting anything: what ``angelslim validate FILE...`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..base.errors import UserError
from . import upstream
from .recipe import load


@dataclass(frozen=True)
class Report:
    """What a file says and whether it can be understood."""

    path: str
    dialect: str = ""  # empty when the file could not be read
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    asks_for: list[str] = field(default_factory=list)  # one line a stage, in order

    @property
    def ok(self) -> bool:
        """Warnings are no failure."""
        return not self.errors


def validate_file(path: str | Path) -> Report:
    """Read a file or a recipe as a run would, and list what it asks for."""
    try:
        resolved = load(path)
    except UserError as error:
        return Report(str(path), errors=[str(error)])
    try:
        asks_for = [str(stage) for stage in upstream.stages(resolved.config)]
    except UserError as error:
        return Report(str(path), resolved.dialect, resolved.warnings, [str(error)])
    return Report(str(path), resolved.dialect, resolved.warnings, [], asks_for)
