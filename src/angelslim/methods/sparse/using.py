"""Sparse prefill by name: what users, evaluations and servers call.

`sparse_attention` gives a loaded model sparse prefill for as long as its result is not removed, from the name of a selector or
from the `sparse_attention.json` that a run left::

    attached = sparse_attention(model, "stem", density=0.1)
    attached = sparse_attention(model, "folder-of-a-run")
    with sparse_attention(model, "union", density=0.1) as attached: ...

`attention_context` is the same for measurements, which compare methods: sparse from the first token on (a crossover would
hide a method's errors on short prompts), with one object of figures for "dense" and all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...base.console import chose
from ...base.errors import ConfigError, did_you_mean
from .assign import Rule
from .attach import Attached, Settings, attach, tower_of
from .metadata import DENSE, FILE, Metadata, made, read
from .selectors.base import SELECTORS


class AttentionStats:
    """The figures of one measurement, readable while it runs and afterwards."""

    def __init__(self, name: str, attached: Attached | None = None) -> None:
        self.name, self._attached = name, attached

    def row(self) -> dict[str, Any]:
        """All layers together: calls, density, selector_ms, kernel_ms, fallbacks."""
        if self._attached is None:
            return {"calls": 0, "density": 1.0, "selector_ms": 0.0, "kernel_ms": 0.0, "fallbacks": {}}
        return self._attached.total()

    @property
    def calls(self) -> int:
        """How many times a layer attended sparsely."""
        return int(self.row()["calls"])

    @property
    def density(self) -> float | None:
        """The mean share of the causal area that sparse calls read; 1 for dense attention, None if nothing was sparse."""
        value: float | None = self.row()["density"]
        return value

    @property
    def fallbacks(self) -> dict[str, int]:
        """How many calls of a layer were dense, by reason."""
        counts: dict[str, int] = self.row()["fallbacks"]
        return counts

    @property
    def selector_ms(self) -> float:
        """Milliseconds spent choosing blocks."""
        return float(self.row()["selector_ms"])

    @property
    def kernel_ms(self) -> float:
        """Milliseconds spent in the kernel."""
        return float(self.row()["kernel_ms"])


@contextmanager
def attention_context(
    model: Any,
    name: str,
    density: float | None = None,
    *,
    block: int | None = None,
    crossover: int = 0,
    kernel: str = "auto",
) -> Iterator[AttentionStats]:
    """Give `model` the attention `name` inside the ``with``, and yield its figures.

    `name` is "dense", a selector, or a folder or file that a run left; `density` asks for the iso-density budget. Lengths are
    in tokens; `block` is 128, or what the file says, unless given.
    """
    if name == DENSE:
        check_density(density)
        yield AttentionStats(name)
        return
    given: dict[str, Any] = {"crossover": crossover, "kernel": kernel}
    with sparse_attention(model, name, density=density, block=block, **given) as attached:
        yield AttentionStats(name, attached)


def sparse_attention(
    model: Any,
    source: str | Path,
    *,
    density: float | None = None,
    block: int | None = None,
    crossover: int | str | None = None,
    kernel: str | None = None,
    options: dict[str, Any] | None = None,
    measure: bool = True,
) -> Attached:
    """Switch a loaded transformers model to sparse prefill and return the hook.

    `source` is a selector's name, or a folder with a `sparse_attention.json`, or such a file; `options` are the selector's.
    What is given here goes before what a file says. The hook is a context manager; its `remove` gives the model its
    attention back, and its `stats` and `total()` say what happened.
    """
    check_density(density)
    changes = {"block": block, "crossover": crossover, "kernel": kernel}
    changes = {name: value for name, value in changes.items() if value is not None}
    if str(source) in SELECTORS:
        chosen = {**(options or {}), **({} if density is None else {"density": density})}
        rules = [Rule(made(str(source), chosen).select)]
        return attach(model, rules, Settings(measure=measure, **changes))  # type: ignore[arg-type]
    found = find(source)
    found.check(tower_of(model).config)
    if density is not None or options:
        found = with_options(found, {**(options or {}), **({} if density is None else {"density": density})})
    return attach(model, found.make_rules(), found.settings(measure=measure, **changes))


def attentions(
    wanted: list[str], folder: Path, density: float | None = None, block: int | None = None
) -> list[str]:
    """What a measurement of the model in `folder` compares: what is wanted, else what the folder says, else dense.

    Wrong names, densities and blocks are refused here, before any work.
    """
    check_density(density)
    if block is not None:
        Settings(block)  # refuses what no block can be
    for name in wanted:
        if name != DENSE:
            check_source(name)
    said = not wanted and (folder / FILE).is_file()
    found = list(dict.fromkeys(wanted)) or [str(folder) if said else DENSE]
    for what, value in (("density", density), ("block", block)):
        if value is not None and found == [DENSE]:
            raise ConfigError(
                f"A {what} is given and no sparse attention.", fix="Name one, for example --attn stem."
            )
    if said:
        chose(f"sparse attention as {FILE} says", "the model's folder holds it; --attn dense leaves it out")
    return found


def check_source(source: str) -> None:
    """Refuse what is neither a selector nor a folder or file of settings."""
    if source not in SELECTORS:
        find(source)


def find(source: str | Path) -> Metadata:
    """Read a folder or file of settings; a name that is none is a `ConfigError` with the nearest selector."""
    if not Path(source).expanduser().exists():
        raise ConfigError(
            f"{str(source)!r} is neither a kind of sparse attention nor a folder with {FILE}.",
            fix=did_you_mean(str(source), [*SELECTORS, DENSE]),
        )
    return read(source)


def files_of(source: str) -> list[Path]:
    """The files that an attention's numbers depend on: none for "dense" and a selector."""
    if source == DENSE or source in SELECTORS:
        return []
    path = Path(source).expanduser()
    return [path / FILE if path.is_dir() else path, *find(source).files()]


def with_options(found: Metadata, options: dict[str, Any]) -> Metadata:
    """The same with other options for every rule that has a selector."""
    rules = tuple(
        rule if rule.selector == DENSE else replace(rule, options={**rule.options, **options})
        for rule in found.rules
    )
    return replace(found, rules=rules)


def check_density(density: float | None) -> None:
    """Refuse what is no share of the causal area; None leaves the budget to the method."""
    if density is not None and not 0 < density <= 1:
        raise ConfigError(
            f"The density is {density:g}; it is the share of the causal area that is read.",
            fix="Give a number above 0, at most 1, for example 0.1.",
        )
