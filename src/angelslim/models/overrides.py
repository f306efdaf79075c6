"""Other schemes for some layers: the entries of ``quantization.overrides`` against module paths.

An entry is written like one of ``ignore_layers`` (see `config.ignore`). The first that matches a layer decides its
scheme; None keeps the layer in full precision. An entry that decides nothing is an error, since it says something
that will not happen.

Engines compute some linears as one matrix: q, k and v, gate and up, and all experts of a layer. They refuse a
folder in which these differ, and so does this module, before any work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..base.errors import ConfigError, SchemeError
from ..config.ignore import matches
from ..numerics.scheme import Scheme
from .structure import Structure

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")


class Overrides:
    """The entries in order, and what each has decided."""

    def __init__(self, entries: Sequence[tuple[str, Scheme | None]], default: Scheme) -> None:
        self.entries, self.default = list(entries), default
        self.decided: dict[str, str] = {}  # module -> the entry that decided it
        self._seen: dict[str, str] = {}  # entry -> a module that it matched

    def scheme_of(self, name: str, module: str) -> Scheme | None:
        """Return the scheme of a layer by its name in the checkpoint and in the model; None is full precision."""
        found = [
            (entry, scheme)
            for entry, scheme in self.entries
            if matches(entry, name) or matches(entry, module)
        ]
        for entry, _ in found:
            self._seen.setdefault(entry, module)
        if not found:
            return self.default
        self.decided[module] = found[0][0]
        return found[0][1]

    def refuse_unused(self, skipped: Mapping[str, str]) -> None:
        """Refuse entries that decided nothing, saying why where that can be told."""
        used = set(self.decided.values())
        for entry, _ in self.entries:
            if entry in used:
                continue
            if entry in self._seen:
                name = self._seen[entry]
                what = f"an earlier entry, {self.decided[name]!r}, decides {name!r} and all others that it matches"
                raise ConfigError(f"The override {entry!r} has no effect: {what}.", fix="Put it first.")
            name = next((name for name in skipped if matches(entry, name)), "")
            why = f": {name!r} is not quantized ({skipped[name]})" if name else ""
            fix = "Write it like an entry of ignore_layers; `angelslim inspect` lists the layers."
            raise ConfigError(f"The override {entry!r} matches no layer that is quantized{why}.", fix=fix)

    def refuse_mixed(self, schemes: Mapping[str, Scheme | None], structure: Structure) -> None:
        """Refuse layers that engines compute together and that an entry makes differ (module -> scheme)."""
        if not self.decided:
            return
        together: dict[object, list[str]] = {}
        keys = fused_with(structure)
        for name in schemes:
            expert = _EXPERT.match(name)
            together.setdefault(expert[1] if expert else keys.get(name, name), []).append(name)
        for names in together.values():
            found = {schemes[name]: name for name in reversed(names)}
            if len(found) < 2 or not any(name in self.decided for name in names):
                continue
            listed = ", ".join(f"{name!r} as {scheme or 'full precision'}" for scheme, name in found.items())
            raise SchemeError(
                f"Engines compute these as one matrix, and they differ: {listed}.",
                fix="Let the override match all of them, or none.",
            )


def fused_with(structure: Structure) -> dict[str, object]:
    """Return, for each linear of the blocks, what it shares with those that engines join it with.

    These read the same tensor and lie in the same module: q, k, v; gate, up; the first projections of MLA.
    """
    return {
        linear: (group, linear.rpartition(".")[0])
        for groups in structure.groups.values()
        for group in groups
        for linear in group.linears
    }
