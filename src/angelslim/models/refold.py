"""Foldings of a block, guessed from those of the block before it and verified all at once.

Looking for a folding takes a run of the block for each that is tried. Blocks of one model are mostly alike, so what was
found in one is taken for granted in the next until the proof: every maker is scaled, every reader makes up for it, and
in one run each reader's input has to change as predicted, while outputs stay what they were. Where anything is
different, `fold.find_all` looks for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from . import fold
from .block import Block
from .fold import Fold, Seen
from .structure import Group

Found = dict[Group, Fold | str]


class Folds:
    """Finds the foldings of block after block."""

    def __init__(self) -> None:
        self._known: Found = {}  # with paths inside the block

    def find_all(self, block: Block, groups: Sequence[Group]) -> Found:
        """Return what `fold.find_all` returns."""
        if block.index is None:
            return fold.find_all(block, groups)
        prefix = f"{block.source.structure.blocks[block.index]}."
        inside = {group: _group(group, lambda path: path.removeprefix(prefix)) for group in groups}
        if groups and all(each in self._known for each in inside.values()):
            guess = {
                group: _fold(self._known[each], group, lambda path: prefix + path)
                for group, each in inside.items()
            }
            if _holds(block, guess):
                return guess
        found = fold.find_all(block, groups)
        self._known = {
            each: _fold(found[group], each, lambda path: path.removeprefix(prefix))
            for group, each in inside.items()
        }
        return found


def _group(group: Group, named: Callable[[str], str]) -> Group:
    source = None if group.source is None else named(group.source)
    return Group(source, tuple(map(named, group.linears)), tuple(map(named, group.others)))


def _fold(found: Fold | str, group: Group, named: Callable[[str], str]) -> Fold | str:
    if isinstance(found, str):
        return found
    return replace(
        found, group=group, maker=named(found.maker), parameters=tuple(map(named, found.parameters))
    )


def _holds(block: Block, guess: Found) -> bool:
    """Say whether all foldings hold together; groups that had none before are believed to have none again."""
    folds = [each for each in guess.values() if isinstance(each, Fold)]
    if not folds or not fold.agreed(all(_possible(block, each) for each in folds)):
        return False
    before = fold.observe(block, [each.group for each in folds])
    columns: list[Tensor] = []
    makers: dict[str, Tensor] = {}
    with ExitStack() as changed:
        for each in folds:
            values, realised = fold.divided(block, each, fold.probe(each, block.device))
            columns.append(each.spread(realised))
            makers[each.maker] = realised
            values |= fold.multiplied(block, each, columns[-1])
            changed.enter_context(fold.with_values(block, values))
        after = fold.observe(block, [each.group for each in folds])
    return fold.agreed(
        all(_divided(each, scale, before, after) for each, scale in zip(folds, columns, strict=True))
        and _unchanged(before, after, makers, any(each.offset for each in folds))
    )


def _possible(block: Block, each: Fold) -> bool:
    """Say whether a folding fits the block's shapes, readers and storage."""
    paths = [*each.parameters, *(f"{path}.weight" for path in each.group.linears)]
    fits = all(len(block.parameter(path)) == each.channels for path in each.parameters)
    widths = [block.parameter(f"{path}.weight").shape[1] for path in each.group.linears]
    plain = all(fold.stored_plainly(block, path) for path in paths)
    return fits and plain and {*widths} <= {each.width} and not fold.refusal(block, each.group)


def _divided(each: Fold, columns: Tensor, before: Seen, after: Seen) -> bool:
    paths = (*each.group.linears, *each.group.others)
    return all(
        path in before.inputs and fold.close(after.inputs.get(path), columns, before.inputs[path])
        for path in paths
    )


def _unchanged(before: Seen, after: Seen, makers: dict[str, Tensor], rounded: bool) -> bool:
    """Compare outputs with what they were; those of makers are divided."""
    pairs = [(after.block, before.block)]
    for path, outputs in before.outputs.items():
        now = after.outputs.get(path, outputs)
        if path in makers:
            now = [each.float() * makers[path] for each in now]
        pairs += zip(now, outputs, strict=True)
    # Powers of two are exact; 1 + w is not, and its error is that of storing the weights.
    room = 4 * torch.finfo(before.block.dtype).eps if rounded else 1e-6
    return all(
        bool((now - then).abs().max() <= room * then.abs().max()) for now, then in pairs if then.numel()
    )
