"""What a study searches, as a YAML file.

.. code-block:: yaml

    search:
      lr: {log: [1e-4, 1e-2]}            # log-uniform between the ends
      decay: {uniform: [0.1, 0.5]}
      warmup: {int: [0, 100]}            # both ends included
      schedule: {choice: [cosine, wsd]}  # or the list alone
    trials: 12
    volumes: [0.3, 0.5, 0.7]             # shares of the data

Names are override paths (``compression.QAT.hf_args.learning_rate``). `Plan` says what the other keys mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..base.errors import ConfigError, did_you_mean
from ..config.files import read_yaml

KINDS = ("log", "uniform", "int", "choice")


@dataclass(frozen=True)
class Knob:
    """One searched value: the ends of a range, or the choices."""

    kind: str
    values: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask optuna's trial for a value."""
        if self.kind == "choice":
            return trial.suggest_categorical(name, self.values)
        if self.kind == "int":
            return trial.suggest_int(name, *self.values)
        return trial.suggest_float(name, *self.values, log=self.kind == "log")


@dataclass(frozen=True)
class Plan:
    """A study: `trials` settings at the smallest volume, then the best of them at every volume."""

    search: dict[str, Knob]
    trials: int = 12
    volumes: tuple[float, ...] = (0.3, 0.5, 0.7)
    seeds: int = 1  # runs of the winner at each volume
    tolerance: float = 0.01  # the smallest volume within this share of the best loss is chosen
    patience: int = 4  # trials that run to their end before any is stopped early
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """Return what may not change when a study is continued; more trials, volumes and seeds may be asked for."""
        kept = asdict(self)
        return {
            "search": kept["search"],
            "patience": self.patience,
            "seed": self.seed,
            "at": min(self.volumes),
        }


def read_plan(path: Path) -> Plan:
    """Read a plan; whatever is wrong with it is a `ConfigError` that names the key."""
    return plan_from(read_yaml(path), str(path))


def plan_from(data: Mapping[str, Any], where: str = "") -> Plan:
    """Check a parsed plan."""
    known = [field.name for field in fields(Plan)]
    for key in data:
        if key not in known:
            raise ConfigError(f"Unknown key {key!r}.", where=where, fix=did_you_mean(key, known))
    search = data.get("search")
    if not isinstance(search, Mapping) or not search:
        raise ConfigError(
            "The section search is missing.",
            where=where,
            fix="For example search: {lr: {log: [1e-4, 1e-2]}}.",
        )
    knobs = {name: _knob(value, name, where) for name, value in search.items()}
    values = {name: value for name, value in data.items() if name != "search"}
    for name, value in values.items():
        _check(name, value, where)
    if "volumes" in values:
        values["volumes"] = tuple(sorted(float(share) for share in values["volumes"]))
    return Plan(knobs, **values)


def _check(name: str, value: Any, where: str) -> None:
    def number(found: Any, whole: bool) -> bool:
        return isinstance(found, int if whole else (int, float)) and not isinstance(found, bool)

    if name == "volumes":
        fits = isinstance(value, list) and value and all(number(s, False) and 0 < s <= 1 for s in value)
        needed = "a list of shares above 0 and up to 1"
    elif name == "tolerance":
        fits, needed = number(value, False) and value >= 0, "a share of 0 or more"
    else:
        least = 1 if name in ("trials", "seeds") else 0
        fits, needed = number(value, True) and value >= least, f"a whole number of at least {least}"
    if not fits:
        raise ConfigError(f"{name} is {value!r}.", where=where, fix=f"Give {needed}.")


def _knob(value: Any, name: str, where: str) -> Knob:
    def wrong(what: str) -> ConfigError:
        return ConfigError(
            f"search.{name}: {what}.",
            where=where,
            fix="Use {log: [low, high]}, {uniform: [low, high]}, {int: [low, high]} or a list of choices.",
        )

    if isinstance(value, list):
        value = {"choice": value}
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise wrong(f"{value!r} is no range")
    kind, values = next(iter(value.items()))
    if not isinstance(values, list) or not values:
        raise wrong(f"{values!r} is no list")
    if kind == "choice":
        if not all(isinstance(choice, (str, int, float, bool)) for choice in values):
            raise wrong("a choice must be a text, a number or a truth value")
        return Knob(kind, tuple(values))
    types: Any = int if kind == "int" else (int, float)
    if len(values) != 2 or not all(isinstance(end, types) and not isinstance(end, bool) for end in values):
        raise wrong(f"{values!r} are no two ends of kind {kind}")
    low, high = values
    if low > high or (kind == "log" and low <= 0):
        raise wrong(f"the range from {low} to {high} is empty or leaves the positive numbers")
    return Knob(kind, (low, high))
