"""A cheap pass of the samples through a block: several at a time, and no further than somebody looks.

Every operation costs time of its own, however little it works on, so short samples run together: neighbours of one
length that are called alike, up to `TOGETHER` tokens. Not every block can do that (some expect tables or masks with a
row for each sample), so the first two samples tell: they have to give what they give one by one. A watched linear still
gets the inputs of one sample after those of another.

A run whose outputs nobody wants ends at the last linear that is watched: a quarter of a block's products lies behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .inputs import Observe

TOGETHER = 512  # tokens: more leave a processor's cache
ALIKE = 0.02  # the share of the outputs that may differ: bfloat16 sums come in another order


class Enough(Exception):
    """Raised when every watched linear has been seen."""


class Watch:
    """Gives the inputs ``[tokens, in]`` of linears to their functions, one sample after another."""

    def __init__(self, modules: Mapping[str, nn.Module], observe: Mapping[str, Observe]) -> None:
        self.count = 1  # samples that run together
        self._modules, self._observe = modules, observe
        self._called: list[str] = []
        self._last: str | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch while the context lasts."""
        hooks = [
            self._modules[path].register_forward_pre_hook(partial(self._see, path)) for path in self._observe
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def learn(self) -> None:
        """A run went to its end: if it saw every linear once, later ones may end with the same linear."""
        once = self._called and sorted(self._called) == sorted(self._observe)
        self._last = self._called[-1] if once else None
        self._called.clear()

    def _see(self, path: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].detach()
        for part in values.unbind() if self.count > 1 else (values,):
            self._observe[path](part.reshape(-1, values.shape[-1]))
        self._called.append(path)
        if path == self._last and len(self._called) == len(self._observe) and finite(values):
            self._called.clear()
            raise Enough


def batches(count: int, alike: Callable[[int, int], bool], tokens: Callable[[int], int]) -> list[list[int]]:
    """Divide samples into runs of neighbours that are alike, of at most `TOGETHER` tokens."""
    found: list[list[int]] = []
    for sample in range(count):
        now = found[-1] if found else []
        if now and (len(now) + 1) * tokens(now[0]) <= TOGETHER and alike(now[0], sample):
            now.append(sample)
        else:
            found.append([sample])
    return found


def computes_together(block: nn.Module, call: Callable[[list[int]], Tensor], samples: list[int]) -> bool:
    """Try whether a block gives for several samples together what it gives for each alone.

    Each linear inside has to get a part of its inputs from each.
    """
    shapes: list[torch.Size] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.append(args[0].shape)

    with torch.no_grad():
        alone = torch.cat([call([sample]) for sample in samples]).float()
        hooks = [
            module.register_forward_pre_hook(note)
            for module in block.modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            together = call(samples).float()
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        finally:
            for hook in hooks:
                hook.remove()
    if together.shape != alone.shape or any(len(x) != 3 or x[0] != len(samples) for x in shapes):
        return False
    return bool((together - alone).norm() <= ALIKE * alone.norm())


def finite(values: Tensor) -> bool:
    """Say whether no value is NaN or infinite; one of them is enough to spoil a sum, which is cheap."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())
