"""Rounding shared among the processes of a run.

Once statistics are merged, what becomes of a group of layers depends on no other group. So each process rounds some of
a block's groups, about equally many weights, and all hand in all results: codes, scales and records as they are, to
the last bit. The first process writes them; methods whose next block shall see the rounding put them into the block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ...base import parallel
from ...models.block import Block, QuantizedLayer
from ...models.contest import ContestedLayer
from ...models.select import Layer
from ...numerics.error import LayerRecord
from ...numerics.quantize import Quantized


def round_together(
    block: Block, groups: Sequence[list[Layer]], round_group: Callable[[list[Layer]], None]
) -> list[QuantizedLayer]:
    """Call `round_group`, which emits each member, for this process's groups; hand in and return the others' results.

    Alone that is a call for each group, and nothing is returned.
    """
    costs = [sum(layer.shape[0] * layer.shape[1] for layer in members) for members in groups]
    owners = parallel.owners(costs)
    for members, owner in zip(groups, owners, strict=True):
        if owner == parallel.rank():
            round_group(members)
    return [] if parallel.world() == 1 else _exchange(block, groups, owners)


def _exchange(block: Block, groups: Sequence[list[Layer]], owners: Sequence[int]) -> list[QuantizedLayer]:
    """Bring the block's results of all processes into the order that one process would give them."""
    own = {result.layer.name: result for result in block.results}
    inside = {layer.name for members in groups for layer in members}
    received = []
    block.results[:] = [result for result in block.results if result.layer.name not in inside]
    for members, owner in zip(groups, owners, strict=True):
        for layer in members:
            result = own.get(layer.name)
            tensors = parallel.broadcast({} if result is None else _packed(result), owner)
            if result is None:
                result = _unpacked(layer, tensors)
                received.append(result)
            block.results.append(result)
    return received


def _packed(result: QuantizedLayer) -> dict[str, Tensor]:
    weight = result.weight
    plain = result.plain if isinstance(result, ContestedLayer) else None
    tensors = {
        "codes": weight.codes,
        "scale": weight.scale,
        "zero": weight.zero,
        "global_scale": weight.global_scale,
        "input_scale": result.input_scale,
        "record": _written(result.record),
        "plain_scale": None if plain is None else plain.input_scale,
        "plain_record": None if plain is None else _written(plain.record),
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _written(record: LayerRecord) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(asdict(record)).encode()), dtype=torch.uint8)


def _read(text: Tensor) -> LayerRecord:
    return LayerRecord.from_dict(json.loads(text.cpu().numpy().tobytes()))


def _unpacked(layer: Layer, tensors: dict[str, Tensor]) -> QuantizedLayer:
    weight = Quantized(
        tensors["codes"],
        tensors["scale"],
        tensors.get("zero"),
        layer.scheme.weight,
        tensors.get("global_scale"),
    )
    scale, record = tensors.get("input_scale"), _read(tensors["record"])
    if "plain_record" not in tensors:
        return QuantizedLayer(layer, weight, scale, record)
    plain = QuantizedLayer(layer, weight, tensors.get("plain_scale"), _read(tensors["plain_record"]))
    return ContestedLayer(layer, weight, scale, record, plain)
