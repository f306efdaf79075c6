"""Several processes of one run, started by torchrun: who am I, and what do the others know?

Every function also works alone, where there is nothing to exchange. Processes hold different calibration samples; they
add up their statistics, so that all of them round from the same numbers. ``torchrun`` ends the others when one
fails. torch is imported when first used: the command line stays fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

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
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


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


def share(items: Sequence[T]) -> list[T]:
    """Return this process's share of a list: every item belongs to exactly one process."""
    return list(items[rank() :: world()])


def spread(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run each task in one of the processes; return all results everywhere, in order.

    Results travel pickled between processes of this very program.
    """
    if world() == 1:
        return [task() for task in tasks]
    from torch import distributed

    own = {number: tasks[number]() for number in range(rank(), len(tasks), world())}
    results: list[T] = []
    for number in range(len(tasks)):
        box: list[Any] = [own.get(number)]
        distributed.broadcast_object_list(box, src=number % world())
        results.append(box[0])
    return results
