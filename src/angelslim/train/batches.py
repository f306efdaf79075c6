"""Batches by their number, prepared ahead by other processes where that is asked for."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch

Batch = Any  # what `batch_at` returns: a mapping or tuple of tensors, moved to the device by the loop
BatchAt = Callable[[int], Batch]


class _Indexed(torch.utils.data.Dataset[Batch]):
    def __init__(self, batch_at: BatchAt) -> None:
        self.batch_at = batch_at

    def __getitem__(self, index: int) -> Batch:
        return self.batch_at(index)


def _leave_interrupts_to_the_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ahead(batch_at: BatchAt, indices: range, workers: int) -> Iterable[Batch]:
    """Yield the batches of those numbers, in order."""
    if not workers:
        return map(batch_at, indices)
    return torch.utils.data.DataLoader(
        _Indexed(batch_at),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=4,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
