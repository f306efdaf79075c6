"""Encoders of images and sound, calibrated: their linears see what the samples' images and sounds make of them.

A tower is small beside the decoder. So it is not walked block by block: the model runs whole up to its first decoder
block, once for each sample that has something for a tower, with the towers as they were published. What lies there
comes in portions (the units of a run that lie outside the blocks); each portion is a `Block` whose runner is this one.
Its inputs do not depend on how other portions were rounded, so a run that was killed finds the same numbers again.

The output of such a block is what enters the decoder: image and sound features among the embeddings of the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base import parallel
from ..base.errors import DataError
from .block import Block, ObservePair
from .experts import watching
from .inputs import Observe
from .loading import Source
from .outside import TEXT_INPUTS, before_blocks
from .select import Layer
from .structure import Group, groups_in_run

Samples = Sequence[Mapping[str, Tensor]]


class _Entered(Exception):
    """Raised with what the first decoder block is given."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@dataclass(frozen=True)
class TowerRunner:
    """Runs samples through everything before the first decoder block; use it while `awake`."""

    source: Source
    given: Samples  # those that have something for a tower
    device: torch.device

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Hold the towers and the embedding."""
        first = self.submodule(self.source.structure.blocks[0])
        first.forward = _enter
        try:
            with before_blocks(self.source, self.device, towers=True):
                yield
        finally:
            del first.forward
            self.source.free("")

    @property
    def samples(self) -> int:
        """How many samples have something for a tower."""
        return len(self.given)

    @property
    def module(self) -> nn.Module:
        """The model, empty from its first decoder block on."""
        found: nn.Module = self.source.model
        return found

    def submodule(self, path: str) -> nn.Module:
        """Return a module of the model by its full path."""
        return self.module.get_submodule(path)

    def run(self, observe: Mapping[str, Observe], *, keep: bool, again: bool = False) -> None:
        """Show the inputs of linears; nobody asks for the outputs."""
        if not observe:
            return
        with watching({path: self.submodule(path) for path in observe}, observe), torch.no_grad():
            for number in range(self.samples):
                self._through(number)

    def compare(self, observe: Mapping[str, ObservePair]) -> None:
        """The inputs are those of the original model."""
        self.run({path: partial(_twice, function) for path, function in observe.items()}, keep=False)

    def forward(self, samples: Sequence[int]) -> Tensor:
        """Return what enters the decoder for samples of one length ``[samples, tokens, hidden]``."""
        return torch.cat([self._through(number) for number in samples])

    def scale_expert_inputs(self, path: str, scale: Tensor) -> bool:
        """A tower has no streamed experts."""
        return False

    def groups(self) -> dict[str, Group]:
        """Run a sample of each kind; return the linears of towers that it reaches, each with those of the same input."""
        kinds = {frozenset(given): number for number, given in reversed(list(enumerate(self.given)))}
        inside = [name for name in self.source.structure.linears if self.source.structure.tower_of(name)]
        with torch.no_grad():
            runs = [partial(self._through, number) for number in sorted(kinds.values())]
            found = groups_in_run(self.source.model, inside, runs)
        return {linear: group for group in found for linear in group.linears}

    def _through(self, number: int) -> Tensor:
        inputs = {name: value.to(self.device) for name, value in self.given[number].items()}
        try:
            self.source.model(**inputs, use_cache=False)
        except _Entered as entered:
            return entered.hidden
        raise AssertionError("the model did not reach its first decoder block")


def _enter(hidden: Tensor, *_args: Any, **_kwargs: Any) -> None:
    raise _Entered(hidden)


def _twice(function: ObservePair, inputs: Tensor) -> None:
    function(inputs, inputs)


@contextmanager
def outside_blocks(
    source: Source, layers: Sequence[Layer], samples: Samples, device: torch.device
) -> Iterator[list[Block]]:
    """Yield layers outside the decoder as blocks: those of towers with the samples that reach them, others without."""
    inside = _in_towers(source, layers)
    runner = _runner(source, samples, device) if inside else None
    if runner is None:
        yield [Block(source, None, tuple(layers), {}, device)]
        return
    with runner.awake():
        groups = runner.groups()
        seen = tuple(layer for layer in inside if layer.module in groups)
        others = tuple(layer for layer in layers if layer not in seen)
        blocks = [Block(source, None, others, {}, device)] if others else []
        yield [*blocks, *([Block(source, None, seen, groups, device, runner)] if seen else [])]


def check_reached(source: Source, layers: Sequence[Layer], samples: Samples, device: torch.device) -> None:
    """Refuse static activation scales of a tower that no sample reaches, before any work."""
    static = [layer for layer in _in_towers(source, layers) if layer.scheme.needs_data]
    if not static:
        return
    runner, groups = _runner(source, samples, device), dict[str, Group]()
    if runner is not None:
        with runner.awake():
            groups = runner.groups()
    missed = [layer for layer in static if layer.module not in groups]
    if missed:
        raise DataError(
            f"No calibration sample reaches {len(missed)} layers of towers, such as {missed[0].name!r}, "
            "and a static activation scale comes from inputs.",
            fix="Use samples with images or sound for them, or add these layers to ignore_layers.",
        )


def _in_towers(source: Source, layers: Sequence[Layer]) -> list[Layer]:
    tower_of = source.structure.tower_of
    return [layer for layer in layers if layer.block is None and layer.module and tower_of(layer.module)]


def _runner(source: Source, samples: Samples, device: torch.device) -> TowerRunner | None:
    """Return what runs the samples with something for a tower, None where there are none."""
    given = [sample for sample in samples if sample.keys() - TEXT_INPUTS]
    if not parallel.total_count(len(given)):
        return None
    if parallel.total_count(int(not given)):
        raise DataError(
            "One of the processes got no sample with an image or a sound.",
            fix="Use more such samples, or fewer processes.",
        )
    return TowerRunner(source, given, device)
