"""What is known of the inputs of a block's linears: collected in one run of the samples for whoever will ask.

Transforms and rounding look at the same inputs, each in its own way: largest magnitudes, second moments, Hessians, ranges.
Every stage names beforehand what it will ask for (`expect`), so the first that asks has all of it collected together.

Between two stages a block changes. A transform that folds a scale away divides the inputs of one group by it and leaves
everything else as it was; what was collected then follows by arithmetic, ``X / s`` (`rescaled`), where its kind allows
it. Any other change makes what was collected false, and it is collected again when it is asked for (`forget`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

Observe = Callable[[Tensor], None]


class Statistic(Protocol):
    """Something about the inputs ``[tokens, in]`` of one linear, summed up over samples."""

    def update(self, inputs: Tensor) -> None:
        """Take in one sample's inputs ``[tokens, in]``."""

    def merge(self) -> None:
        """Take in what the other processes of the run have seen."""

    def rescale(self, columns: Tensor) -> bool:
        """Become the statistic of inputs divided by `columns` ``[in]``; False where only another run would tell."""


Kind = type[Any]
Makers = Mapping[tuple[str, Kind], Callable[[], Statistic]]  # (module path of a linear, kind) -> an empty one
S = TypeVar("S", bound=Statistic)


class Inputs:
    """The statistics of one block's inputs, expected and collected."""

    def __init__(self) -> None:
        self._expected: dict[tuple[str, Kind], Callable[[], Statistic]] = {}
        self._seen: dict[tuple[str, Kind], Statistic] = {}

    def expect(self, makers: Makers) -> None:
        """Have these collected with the others; what is expected or known already stays."""
        for key, make in makers.items():
            self._expected.setdefault(key, make)

    def find(self, kind: type[S], path: str, run: Callable[[Mapping[str, Observe]], None]) -> S:
        """Return a statistic that is expected; `run` shows the samples to all that are not known yet, if this is one."""
        if (path, kind) not in self._seen:
            self._collect(run)
        found = self._seen[path, kind]
        assert isinstance(found, kind)
        return found

    def drop(self, kind: Kind, path: str) -> None:
        """Forget a statistic that nobody will ask for again."""
        self._expected.pop((path, kind), None)
        self._seen.pop((path, kind), None)

    def rescaled(self, paths: Collection[str], columns: Tensor) -> None:
        """The inputs of the linears at `paths` are divided by `columns` ``[in]`` from now on."""
        for key in [key for key in self._seen if key[0] in paths]:
            if not self._seen[key].rescale(columns):
                del self._seen[key]

    def forget(self) -> None:
        """The inputs may be others from now on."""
        self._seen.clear()

    def _collect(self, run: Callable[[Mapping[str, Observe]], None]) -> None:
        missing = {key: make() for key, make in self._expected.items() if key not in self._seen}
        by_path: dict[str, list[Statistic]] = {}
        for (path, _), statistic in missing.items():
            by_path.setdefault(path, []).append(statistic)
        run({path: _all_of(statistics) for path, statistics in by_path.items()})
        for statistic in missing.values():
            statistic.merge()
        self._seen |= missing


def _all_of(statistics: list[Statistic]) -> Observe:
    def observe(inputs: Tensor) -> None:
        for statistic in statistics:
            statistic.update(inputs)

    return observe
