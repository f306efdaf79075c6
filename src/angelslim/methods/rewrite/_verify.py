"""Does a rotated model compute what the original does? Asked of the weights themselves, before anything is compressed.

Structure says which tensors to rotate; this says whether that was all. One block of each kind runs in float32 on random
hidden states: once as it is, once rotated, on the rotated states. The second output has to be the first one, rotated.
Where experts are streamed, the block runs without them and one expert is compared by itself. Memory is one block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.activations import ActivationStore
from ...models.experts import ExpertTensors, StreamedExperts, streamable
from ...models.loading import Source, open_with
from ...models.walk import BlockStream
from ...numerics.hadamard import Rotation, rotation
from ._view import Edit, RewrittenCheckpoint

CPU = torch.device("cpu")
TOKENS = 24
ROOM = 1e-4  # of the largest element; float32 itself leaves about 1e-6
BUDGET = 2**30


def offset_of(norm: nn.Module) -> float | None:
    """Return what a materialised norm adds to its weight before it multiplies (0 or 1); None if it is no such norm.

    It has to scale each channel by ``weight + offset`` and, where that is 1, to commute with rotations. RMSNorm does;
    LayerNorm, which subtracts the mean, does not, nor does anything that adds a bias.
    """
    norm = deepcopy(norm).float()
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or len(list(norm.parameters(recurse=False))) != 1:
        return None
    turn = rotation(len(weight), "random_hadamard")
    hidden = _states(len(weight))
    gain = weight.detach().clone()
    found = None
    with torch.no_grad():
        given = norm(hidden)
        for offset in (0.0, 1.0):
            weight.fill_(1 - offset)
            plain = norm(hidden)
            if _close(plain * (gain + offset), given) and _close(norm(turn.apply(hidden)), turn.apply(plain)):
                found = offset
    return found


def in_float32(source: Source) -> Source:
    """Open the same model anew, to be computed in float32."""
    config = deepcopy(source.config)
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        part.dtype = torch.float32
    exact = open_with(source.name, source.folder, config, source.checkpoint)
    exact.structure = source.structure  # the same modules; finding them again takes a forward
    return exact


def difference(exact: Source, edits: Mapping[str, Edit], stream: Rotation | None) -> tuple[float, str]:
    """Return the largest relative difference that `edits` make to what blocks and experts compute, and where.

    `exact` comes from `in_float32`; `stream` is the rotation of the residual stream, None if it stays as it is.
    """
    view = RewrittenCheckpoint(exact.checkpoint, edits, dtype=torch.float32)
    rewritten = replace(exact, checkpoint=view)
    rewritten.structure = exact.structure
    found = [(0.0, "")]
    kinds = {_kind(exact, index): index for index in reversed(range(len(exact.structure.blocks)))}
    for index in sorted(kinds.values()):
        path = exact.structure.blocks[index]
        outputs = [_block(source, index, turn) for source, turn in ((exact, None), (rewritten, stream))]
        found.append((_apart(outputs[1], _turn(outputs[0], stream)), path))
        for name, tensors in streamable(exact, path).items():
            found.append((_expert(exact, rewritten, tensors, edits, stream), f"{name}.0"))
    return max(found)


def _expert(
    exact: Source,
    rewritten: Source,
    tensors: list[ExpertTensors],
    edits: Mapping[str, Edit],
    stream: Rotation | None,
) -> float:
    """Compare the first expert of a layer; the original reads what a norm multiplied with its gain."""
    hidden = _states(exact.checkpoint.tensors[tensors[0].first[0]].shape[1])
    edit = edits.get(tensors[0].first[0])
    gain = edit.gain if edit else None
    factor = 1.0 if gain is None else exact.checkpoint.read(gain.tensor).float() + gain.offset
    then, now = (StreamedExperts(source, tensors, CPU, 1).load(0) for source in (exact, rewritten))
    with torch.no_grad():
        return _apart(now(_turn(hidden, stream)), _turn(then(hidden * factor), stream))


def _kind(source: Source, index: int) -> Any:
    """Blocks of one kind hold the same modules with parameters of the same shapes, and attend alike."""
    module = source.model.get_submodule(source.structure.blocks[index])
    shapes = tuple((name, tuple(value.shape)) for name, value in module.named_parameters())
    types = getattr(source.config.get_text_config(), "layer_types", None) or ()
    return shapes, tuple(types)[index : index + 1]


def _block(source: Source, index: int, stream: Rotation | None) -> Tensor:
    """Run one block, its streamed experts silent, on random hidden states, rotated if asked for."""
    sample: dict[str, Tensor]
    width = int(source.model.get_input_embeddings().weight.shape[1])
    hidden = _states(width)
    if source.structure.towers:  # such models want ids to know where their features go
        sample = {"input_ids": torch.ones(1, TOKENS, dtype=torch.long)}
    else:
        sample = {"inputs_embeds": hidden}
    with tempfile.TemporaryDirectory() as folder:
        walk = BlockStream(source, [sample], ActivationStore(Path(folder), BUDGET), CPU)
        walk.prepare(0)
        walk.store.put(index, 0, _turn(hidden, stream))
        with walk.resident(index) as runner, torch.no_grad():
            return runner.forward([0])


def _states(width: int) -> Tensor:
    """Random hidden states ``[1, tokens, width]``, the same ones every time."""
    return torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(0))


def _turn(values: Tensor, stream: Rotation | None) -> Tensor:
    return values if stream is None else stream.apply(values)


def _apart(now: Tensor, then: Tensor) -> float:
    return float((now - then).abs().max() / then.abs().max().clamp_min(1e-30))


def _close(now: Tensor, then: Tensor) -> bool:
    return _apart(now, then) <= ROOM
