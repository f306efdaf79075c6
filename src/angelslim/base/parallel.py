"""Several processes of one run, started by torchrun: who am I, and what do the others know?

Every function also works alone, where there is nothing to exchange. Processes hold different calibration samples; they
add up their statistics, so that all of them decide and round from the same numbers. Rounding is shared too
(`methods.ptq._processes`). Each function that exchanges something has to be called by all processes, in one order:
also by one that has no sample to contribute. ``torchrun`` ends the others when one fails. torch is imported when first
used: the command line stays fast.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def start() -> None:
    """Join the processes that torchrun started; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:  # NCCL talks from the current device, which would be the first one in every process
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def world() -> int:
    """How many processes there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1
    from torch import distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def local_rank() -> int:
    """Return the number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


def first() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def wait() -> None:
    """Wait until every process is here."""
    if world() > 1:
        from torch import distributed

        distributed.barrier()


def total(value: Tensor) -> Tensor:
    """Return the sum of all processes' tensors of one shape."""
    return _reduced(value, "SUM")


def highest(value: Tensor) -> Tensor:
    """Return the largest of all processes' tensors, element by element."""
    return _reduced(value, "MAX")


def lowest(value: Tensor) -> Tensor:
    """Return the smallest of all processes' tensors, element by element."""
    return _reduced(value, "MIN")


def _reduced(value: Tensor, how: str) -> Tensor:
    if world() == 1:
        return value
    from torch import distributed

    value = value.contiguous()
    distributed.all_reduce(value, getattr(distributed.ReduceOp, how))
    return value


def total_count(value: int) -> int:
    """Return the sum of a whole number over the processes."""
    if world() == 1:
        return value
    import torch

    return int(total(torch.tensor([value])).item())


def numbered(count: int) -> tuple[int, int]:
    """Return where this process's `count` things begin when those of all are numbered in a row, and how many there are."""
    if world() == 1:
        return 0, count
    import torch

    counts = torch.zeros(world(), dtype=torch.int64)
    counts[rank()] = count
    found = total(counts)
    return int(found[: rank()].sum()), int(found.sum())


def share(items: Sequence[T]) -> list[T]:
    """Return this process's share of a list: a run of neighbours, so that items picked evenly belong to all alike."""
    start, stop = (len(items) * number // world() for number in (rank(), rank() + 1))
    return list(items[start:stop])


def spread(tasks: Sequence[Callable[[], float]]) -> list[float]:
    """Compute each number in one of the processes; return all of them everywhere, in order.

    Processes that decide by such numbers decide alike, whatever their processors make of the last bit.
    """
    return spread_all(len(tasks), lambda numbers: [tasks[number]() for number in numbers])


def spread_all(count: int, compute: Callable[[Sequence[int]], Sequence[float]]) -> list[float]:
    """Do the same for tasks that are cheaper together: `compute` gets the numbers of one process's tasks."""
    if world() == 1:
        return list(compute(range(count)))
    import torch

    found = torch.zeros(count, dtype=torch.float64)
    mine = range(rank(), count, world())
    found[list(mine)] = torch.tensor(compute(mine), dtype=torch.float64)
    numbers: list[float] = total(found).tolist()
    return numbers


def owners(costs: Sequence[int]) -> list[int]:
    """Return which process does which of some tasks: the dearest first, each for the one with least to do so far.

    >>> owners([5, 1, 1])
    [0, 0, 0]
    """
    loads = [0] * world()
    found = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda each: -costs[each]):
        found[task] = loads.index(min(loads))
        loads[found[task]] += costs[task]
    return found


def broadcast(tensors: Mapping[str, Tensor], source: int) -> dict[str, Tensor]:
    """Return the tensors of process `source`, bit by bit; what the others give is left aside.

    A tensor on a GPU arrives on the receiver's own. Names, types and shapes travel before as JSON.
    """
    if world() == 1:
        return dict(tensors)
    import torch
    from torch import distributed

    own = rank() == source
    heads = [(name, str(x.dtype)[6:], tuple(x.shape), x.device.type) for name, x in tensors.items() if own]
    text = json.dumps(heads).encode()
    length = torch.tensor(len(text))
    distributed.broadcast(length, source)
    letters = torch.frombuffer(bytearray(text), dtype=torch.uint8) if own else _bytes(int(length), "cpu")
    distributed.broadcast(letters, source)
    found = {}
    for name, kind, shape, place in json.loads(letters.numpy().tobytes()):
        dtype = getattr(torch, kind)
        size = math.prod(shape) * dtype.itemsize
        raw = tensors[name].contiguous().reshape(-1).view(torch.uint8) if own else _bytes(size, place)
        if size:
            distributed.broadcast(raw, source)
        found[name] = tensors[name] if own else raw.view(dtype).reshape(shape)
    return found


def gathered(value: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, which may differ in shape."""
    return [broadcast({"value": value}, source)["value"] for source in range(world())]


def _bytes(count: int, place: str) -> Tensor:
    import torch

    device = torch.device(place) if place == "cpu" else torch.device(place, local_rank())
    return torch.empty(count, dtype=torch.uint8, device=device)
