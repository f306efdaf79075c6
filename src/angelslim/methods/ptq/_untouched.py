"""Round nothing: what a run has for a method when it only transforms weights, for another tool to go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...models.block import Block
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.scheme import Scheme


class Untouched:
    """Leaves every layer as the transforms have made it; hands in nothing."""

    reads: frozenset[str] = frozenset()
    follows_original = False
    keeps_function = True

    def needs_data(self, scheme: Scheme) -> bool:
        """Transforms ask for data themselves."""
        return False

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """Nothing."""
        return 0

    def statistics(self, block: Block) -> Makers:
        """None."""
        return {}

    def process(self, block: Block) -> None:
        """Do nothing."""
