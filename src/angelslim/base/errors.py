"""One family of errors for everything a user can get wrong.

A `UserError` says three things: *what* is wrong (naming the thing), *where*, and *how to fix it*. The
command line prints it as one line and exits with code 2; a traceback appears only under `--debug`.
A programmer's mistake stays an `AssertionError` or `TypeError` with its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(Exception):
    """Something the user can mend.

    `what` is one sentence naming the thing; `fix` is one sentence naming the way out; `where` is the file,
    the key or the layer, when `what` does not already carry it.
    """

    def __init__(self, what: str, *, fix: str = "", where: str = "") -> None:
        self.what, self.fix, self.where = what, fix, where
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} {self.fix}".rstrip()


class ConfigError(UserError):
    """A recipe, an override or a command-line value is wrong."""


class ModelError(UserError):
    """A model folder is missing, damaged or of an unknown kind."""


class DataError(UserError):
    """A calibration or evaluation file is missing, empty or malformed."""


class SchemeError(UserError):
    """A quantization scheme does not fit a layer or an export format."""


class ResourceError(UserError):
    """Not enough disk, memory or devices."""


class Diverged(ConfigError):
    """A training ran away: its loss is no longer a number. A search of settings takes that as a result."""


class MissingExtra(UserError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed.",
            fix=f"Install it with: pip install 'angelslim[{extra}]'",
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the sentence ``Did you mean 'x'?``, or the list of known words when none is near.

    >>> did_you_mean("fp8_statik", ["fp8_static", "int8_dynamic"])
    "Did you mean 'fp8_static'?"
    """
    choices = sorted(set(known))
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    if not choices:
        return ""
    return "Known: " + ", ".join(choices) + "."
