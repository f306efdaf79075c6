"""Foldings: places where a block's inner values can be rescaled without changing what it computes.

The inputs of a group of linears can be divided by a scale, channel by channel, where they are made, and multiplied
back in the columns of every weight that reads them. SmoothQuant and AWQ need exactly this. Three makers allow it:

* a **norm**: its weight and bias are divided; a norm that multiplies with ``1 + w`` (Gemma) gets ``(1 + w) / s - 1``;
* **up_proj** before down_proj: ``act(gate) * up`` is linear in the rows of up;
* **v_proj** before o_proj: attention is linear in v. With grouped queries one row of v feeds a column of o in several
  heads, so those columns share their scale (`Fold.rows`).

No table names these for an architecture. Candidates are read off the shapes (the module that made the input, or a
linear beside the reader whose outputs could be its inputs), and each is *verified* on a real sample: the maker is
scaled by powers of two, which cost no precision, and every reader's input has to change exactly as predicted; then the
readers are compensated, and their outputs and the block's have to be what they were. What does not pass is not
folded, and `find` says why: a gate under an activation, a query under a softmax, a norm whose output something
unknown also reads. Streamed experts answer nothing while the block is tried; their columns are scaled when they are
read (`Block.scale_expert_inputs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..base import parallel
from .block import Block
from .structure import Group

PROBED = 0  # the calibration sample that foldings are verified on
UNREACHED = "no token of the sample that it is tried on reaches it"
NO_MAKER = "nothing makes its input in a way that can be rescaled"


@dataclass(frozen=True, eq=False)
class Fold:
    """A verified folding. `width` channels are read; `channels` of the maker feed them."""

    group: Group
    maker: str  # module path
    parameters: tuple[str, ...]  # of the maker, full paths; the first dimension is the channel
    rows: Tensor  # [width]: the maker's channel behind each input channel
    channels: int
    offset: float = 0.0  # 1 where a norm multiplies with 1 + w

    @property
    def width(self) -> int:
        """Number of input channels of the readers."""
        return len(self.rows)

    def shared(self, values: Tensor, how: Literal["amax", "mean"]) -> Tensor:
        """Give input channels that must have one scale one value of a statistic ``[width]``."""
        rows = self.rows.to(values.device)
        empty = values.new_zeros(self.channels)
        return empty.scatter_reduce(0, rows, values, how, include_self=False)[rows]

    def spread(self, scale: Tensor) -> Tensor:
        """Repeat a scale of the maker's channels ``[channels]`` over the input channels ``[width]``."""
        return scale[self.rows.to(scale.device)]


def find_all(block: Block, groups: Sequence[Group]) -> dict[Group, Fold | str]:
    """Return the folding behind each group's input, or the reason why there is none."""
    refused = {group: refusal(block, group) for group in groups}
    tried = [group for group in groups if not refused[group]]
    before = observe(block, tried) if tried else None
    return {
        group: refused[group] if before is None or refused[group] else _search(block, group, before)
        for group in groups
    }


def find(block: Block, group: Group) -> Fold | str:
    """Return the folding behind one group's input, or the reason why there is none."""
    return find_all(block, [group])[group]


def refusal(block: Block, group: Group) -> str:
    """Return why a group's inputs cannot be rescaled, whoever makes them; "" where they can."""
    width = _width(block, group)
    for reader in group.others:
        if not _readable(block, reader, width):
            return f"{reader} also reads the input, and its weights cannot be rescaled"
    return ""


def _search(block: Block, group: Group, seen: Seen) -> Fold | str:
    if not agreed(all(path in seen.inputs for path in (*group.linears, *group.others))):
        return UNREACHED
    before = seen.of(group)
    readers = [f"{path}.weight" for path in group.linears]
    for options in _candidates(block, group, _width(block, group)):
        if not all(stored_plainly(block, path) for path in (*readers, *options[0].parameters)):
            continue
        # A single one is tried together with what makes up for it: inputs and outputs are checked in one run.
        matching = options if len(options) == 1 else _matching(block, options, before)
        for fold in matching:
            if _compensates(block, fold, before):
                return fold
    return NO_MAKER


def apply(block: Block, fold: Fold, scale: Tensor) -> Tensor | str:
    """Divide the group's inputs by `scale` ``[width]`` and multiply its readers' columns.

    `scale` has one value for channels that `Fold.shared` joins. Returns the scale ``[width]`` that the readers got:
    the maker's new values are rounded to their own type first, and the readers make up for what they really are.
    Where a value would overflow nothing is changed, and the reason is returned.
    """
    by_channel = torch.ones(fold.channels, device=scale.device)
    by_channel[fold.rows.to(scale.device)] = scale.float()
    values, realised = divided(block, fold, by_channel)
    columns = fold.spread(realised)
    values |= multiplied(block, fold, columns)
    if not all(value.to(block.parameter(path).dtype).isfinite().all() for path, value in values.items()):
        return "the rescaled weights overflow their type"
    block.rescale(values, (*fold.group.linears, *fold.group.others), columns)
    for path in _stacked(block, fold.group):
        assert block.scale_expert_inputs(path, columns)
    return columns


@contextmanager
def with_values(block: Block, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the block compute with other parameters for a moment; nothing of it is written."""
    kept = {path: block.parameter(path) for path in values}
    try:
        for path, value in values.items():
            _set(block, path, nn.Parameter(value.to(kept[path].dtype), requires_grad=False))
        yield
    finally:
        for path, parameter in kept.items():
            _set(block, path, parameter)


def submodule(block: Block, path: str) -> nn.Module:
    """Return a module of the resident block by its full path."""
    assert block.runner is not None
    return block.runner.submodule(path)


def _set(block: Block, path: str, value: Tensor) -> None:
    module, _, leaf = path.rpartition(".")
    setattr(submodule(block, module), leaf, value)


def _width(block: Block, group: Group) -> int:
    if group.linears:
        return int(block.parameter(f"{group.linears[0]}.weight").shape[1])
    matrices = [value for path in group.others for value in submodule(block, path).parameters(recurse=False)]
    return int(min(matrices, key=lambda value: value.dim()).shape[-1])


def _readable(block: Block, path: str, width: int) -> bool:
    """Say whether a reader that is no linear can be compensated: a matrix over the inputs, or streamed experts."""
    if path in _stacked(block, Group(None, (), (path,))):
        return block.scale_expert_inputs(path, torch.ones(width, device=block.device))
    shapes = [tuple(value.shape) for value in submodule(block, path).parameters(recurse=False)]
    return all(len(shape) == 1 or (len(shape) == 2 and shape[1] == width) for shape in shapes)


def stored_plainly(block: Block, path: str) -> bool:
    """Say whether the checkpoint has a parameter as it is, so that another value of it can be written."""
    tensors = block.source.tensors_of.get(path)
    return tensors is None or block.source.targets[tensors[0]].pattern is None


def _stacked(block: Block, group: Group) -> list[str]:
    """Return the readers that are stacks of experts."""
    return [
        path
        for path in group.others
        if any(value.dim() == 3 for value in submodule(block, path).parameters(recurse=False))
    ]


# ------------------------------------------------------------------------------------------ candidates


def _candidates(block: Block, group: Group, width: int) -> Iterator[list[Fold]]:
    """Yield foldings that the shapes allow; those of one list scale the same channels of the same maker."""
    if group.source is not None:
        shapes = {
            f"{group.source}.{name}": tuple(value.shape)
            for name, value in submodule(block, group.source).named_parameters(recurse=False)
        }
        if shapes and set(shapes.values()) == {(width,)}:
            same = torch.arange(width)
            names = tuple(sorted(shapes, reverse=True))  # the weight before the bias
            for offset in (0.0, 1.0):
                yield [Fold(group, group.source, names, same, width, offset)]
            return
    if not group.linears:
        return
    parent = group.linears[0].rpartition(".")[0]
    for name, module in reversed(list(submodule(block, parent).named_children())):
        path = f"{parent}.{name}"
        if isinstance(module, nn.Linear) and path not in group.linears:
            names = tuple(f"{path}.{key}" for key, _ in module.named_parameters(recurse=False))
            for maps in _row_maps(module.out_features, width):
                yield [Fold(group, path, names, rows, module.out_features) for rows in maps]


def _row_maps(out: int, width: int) -> Iterator[list[Tensor]]:
    """Yield ways in which `out` rows may feed `width` columns; the maps of one list use the same rows.

    >>> [[rows.tolist() for rows in maps] for maps in _row_maps(2, 4)]
    [[[0, 1, 0, 1], [0, 0, 1, 1]]]
    """
    same = torch.arange(width)
    if out == width:
        yield [same]
    elif out < width and width % out == 0:
        yield _repeated(out, width)
    elif out > width:
        if out == 2 * width:  # gate and up in one matrix, in either order
            yield from ([same + width], [same])
        values = (out - width) // 2  # q, k, v in one matrix
        if values and (out - width) % 2 == 0 and width % values == 0:
            yield [rows + out - values for rows in _repeated(values, width)]
        for heads in _divisors(width):  # each head's rows together, those of v last (latent attention)
            size = width // heads
            if heads > 1 and size > 1 and out % heads == 0:
                yield [(same // size) * (out // heads) + (out // heads - size) + same % size]


def _repeated(out: int, width: int) -> list[Tensor]:
    """Return the maps in which every head of `out` rows serves ``width / out`` heads in turn, for all head sizes."""
    column = torch.arange(width)
    repeats = width // out
    return [(column // (size * repeats)) * size + column % size for size in reversed(_divisors(out))]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


# -------------------------------------------------------------------------------------------- verifying


@dataclass(frozen=True, eq=False)
class Seen:
    """What one sample shows: each reader's input and outputs, and the block's output."""

    inputs: dict[str, Tensor]
    outputs: dict[str, list[Tensor]]
    block: Tensor

    def of(self, group: Group) -> Seen:
        """Return what it shows of one group's readers."""
        paths = (*group.linears, *group.others)
        return Seen({p: self.inputs[p] for p in paths}, {p: self.outputs[p] for p in paths}, self.block)


def observe(block: Block, groups: Sequence[Group]) -> Seen:
    """Run the sample that foldings are verified on, and return what the groups' readers see and give."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, list[Tensor]] = {}
    handles = []
    for path in [path for group in groups for path in (*group.linears, *group.others)]:

        def note(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, path: str = path
        ) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            inputs[path] = given.reshape(-1, given.shape[-1])
            found = output if isinstance(output, tuple) else (output,)
            outputs[path] = [v for v in found if isinstance(v, Tensor) and v.is_floating_point()]

        handles.append(submodule(block, path).register_forward_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            output = block.forward([PROBED])
    finally:
        for handle in handles:
            handle.remove()
    return Seen(inputs, outputs, output)


def probe(fold: Fold, device: torch.device) -> Tensor:
    """Return powers of two ``[channels]``; channels that feed nothing keep 1."""
    powers = torch.randint(-1, 2, (fold.channels,), generator=torch.Generator().manual_seed(fold.channels))
    scale = torch.ones(fold.channels)
    scale[fold.rows] = 2.0 ** powers[fold.rows]
    return scale.to(device)


def _matching(block: Block, options: Sequence[Fold], before: Seen) -> Iterator[Fold]:
    """Yield the options under which scaling the maker changes every reader's input as predicted."""
    values, realised = divided(block, options[0], probe(options[0], block.device))
    with with_values(block, values):
        after = observe(block, [options[0].group]).inputs
    for fold in options:
        columns = fold.spread(realised)
        if agreed(all(close(after.get(path), columns, then) for path, then in before.inputs.items())):
            yield fold


def _compensates(block: Block, fold: Fold, before: Seen) -> bool:
    """Say whether the readers' inputs are divided, and their outputs and the block's stay what they were.

    The readers make up for the scale here.
    """
    values, realised = divided(block, fold, probe(fold, block.device))
    columns = fold.spread(realised)
    with with_values(block, values | multiplied(block, fold, columns)):
        after = observe(block, [fold.group])
    predicted = all(close(after.inputs.get(path), columns, then) for path, then in before.inputs.items())
    pairs = [(after.block, before.block)]
    for path, outputs in before.outputs.items():
        pairs += zip(after.outputs.get(path, outputs), outputs, strict=True)
    # Powers of two are exact; 1 + w is not, and its error is that of storing the weights.
    room = 4 * torch.finfo(before.block.dtype).eps if fold.offset else 1e-6
    same = ((now - then).abs().max() <= room * then.abs().max() for now, then in pairs if then.numel())
    return agreed(predicted and all(same))


def close(now: Tensor | None, columns: Tensor, then: Tensor) -> bool:
    """Compare inputs times their scale with what they were, element by element, up to a few roundings of the type."""
    if now is None or now.shape != then.shape:
        return False
    room = 8 * torch.finfo(then.dtype).eps
    then = then.float()
    return bool(((now.float() * columns - then).abs() <= room * then.abs()).all())


def agreed(holds: bool) -> bool:
    """Say whether something holds in every process of the run: each tries its own sample."""
    return not parallel.total_count(int(not holds))


# ------------------------------------------------------------------------------------------- the values


def divided(block: Block, fold: Fold, scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the maker's parameters divided by `scale` ``[channels]``, and the scale they really are divided by."""
    parameters = {path: block.parameter(path) for path in fold.parameters}
    values: dict[str, Tensor] = {}
    for path, now in parameters.items():
        if now.dim() == 1 and not values:  # a norm's weight: one value a channel, whose rounding is known
            exact = now.float() + fold.offset
            value = (exact / scale - fold.offset).to(now.dtype)
            rounded = value.float() + fold.offset
            lost = (rounded == 0) & (exact != 0)  # underflow: this channel stays as it is
            values[path] = torch.where(lost, now, value)
            scale = torch.where(lost, 1.0, torch.where(exact == 0, scale, exact / rounded))
        else:
            shape = (-1,) + (1,) * (now.dim() - 1)
            values[path] = block.exact(path).float() / scale.view(shape)
    return values, scale


def multiplied(block: Block, fold: Fold, columns: Tensor) -> dict[str, Tensor]:
    """Return the readers' matrices with their columns multiplied."""
    values = {}
    for path in (*fold.group.linears, *fold.group.others):
        for name, now in submodule(block, path).named_parameters(recurse=False):
            if now.dim() == 2:
                values[f"{path}.{name}"] = block.exact(f"{path}.{name}").float() * columns
    return values
