"""Experts that a checkpoint stores as one stack, seen as one matrix each.

Most mixtures store a matrix for every expert. Some store all experts of a layer in two 3-D tensors: ``gate_up_proj``
``[experts, 2 * width, hidden]`` and ``down_proj`` ``[experts, hidden, width]``, or both transposed (Llama 4,
Qwen3-VL-MoE). Engines read quantized experts one by one even then, as ``experts.3.gate_proj``, ``up_proj`` and
``down_proj``. `UnstackedCheckpoint` shows the stacks under those names: a part is a stretch of bytes of the stored
tensor, read when it is asked for, so a stack is never in memory as a whole. Everything else then treats these experts
like any others.

Which way a stack lies follows from the two shapes alone. Stacks whose gate and up alternate, or that carry biases
(gpt-oss), stay as they are: no engine reads quantized experts of that kind under such names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..numerics.quantize import Quantized
from ..numerics.scheme import Quant
from .checkpoint import Checkpoint, TensorInfo
from .loading import Source
from .outline import Outline, Target
from .rules import PARTS, pattern_of, transposed


@dataclass(frozen=True)
class Part:
    """One expert's matrix inside a stored stack."""

    stack: str  # the stored tensor
    expert: int
    number: int  # which of the matrices that lie side by side in it
    count: int  # how many do
    transposed: bool  # stored as [in, out]

    def of(self, stored: Tensor) -> Tensor:
        """Cut the matrix ``[out, in]`` out of the expert's stored one."""
        matrix = stored.T if self.transposed else stored
        return matrix.chunk(self.count)[self.number].contiguous()


class UnstackedCheckpoint(Checkpoint):
    """The tensors of `inner`, with `parts` (name -> where it lies) instead of the stacks that hold them."""

    def __init__(self, inner: Checkpoint, parts: Mapping[str, Part]) -> None:
        self.inner, self.parts = inner, dict(parts)
        self.folder = inner.folder
        self.tensors = {}
        names: dict[str, list[str]] = {}
        for name, part in parts.items():
            names.setdefault(part.stack, []).append(name)
        for tensor, info in inner.tensors.items():
            self.tensors |= {name: self._info(name) for name in names.get(tensor, ())} or {tensor: info}

    def _info(self, name: str) -> TensorInfo:
        part, whole = self.parts[name], self._slab(name)
        rows, columns = whole.shape[::-1] if part.transposed else whole.shape
        return replace(
            whole, name=name, shape=(rows // part.count, columns), nbytes=whole.nbytes // part.count
        )

    def _slab(self, name: str) -> TensorInfo:
        """Return where the expert's stored matrix lies; gate and up share one."""
        part = self.parts[name]
        info = self.inner.tensors[part.stack]
        shape = info.shape[1:]
        size = prod(shape) * info.dtype.itemsize
        return TensorInfo(
            f"{name} in {part.stack}", info.dtype, shape, info.file, info.offset + part.expert * size, size
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return self.inner.nbytes

    @property
    def decoded(self) -> bool:
        """What the stored tensors are."""
        return self.inner.decoded

    def published(self, name: str, quant: Quant, device: torch.device | str = "cpu") -> Quantized | None:
        """Return what the stored tensor has; a stack has nothing."""
        return None if name in self.parts else self.inner.published(name, quant, device)

    def sources(self, name: str) -> list[TensorInfo]:
        """Return the stretch of a stack, or what the stored tensor needs."""
        return [self._slab(name)] if name in self.parts else self.inner.sources(name)

    def ahead(self, names: Iterable[str]) -> None:
        """Start reading in the background."""
        names = list(names)
        self.inner.ahead_of(self._slab(name) for name in names if name in self.parts)
        self.inner.ahead(name for name in names if name not in self.parts)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one expert's matrix, or another tensor."""
        part = self.parts.get(name)
        if part is None:
            return self.inner.read(name, device)
        return part.of(self.inner.fetch(self._slab(name)).to(device))


def unstacked(source: Source, leave: Collection[str] = ()) -> Source:
    """Return the model with its stacked experts as single matrices; `leave` names stacks that stay.

    A model without any is returned as it is.
    """
    parts: dict[str, Part] = {}
    targets: dict[str, Target] = {}
    for tensor, target in source.targets.items():
        found = dict(_parts_of(source, tensor)) if tensor not in leave else {}
        parts |= found
        if not found:
            targets[tensor] = target
        for name in found:
            targets[name] = Target(target.parameter, pattern_of(name))
    if not parts:
        return source
    checkpoint = UnstackedCheckpoint(source.checkpoint, parts)
    return Source(
        source.name,
        source.folder,
        source.config,
        checkpoint,
        source.edits,
        Outline(source.structure, targets),
    )


def _parts_of(source: Source, tensor: str) -> Iterator[tuple[str, Part]]:
    """Yield the names and places of the matrices in a stored tensor; nothing if it is no stack that can be split."""
    head, _, leaf = tensor.rpartition(".")
    path, _, parameter = source.targets[tensor].parameter.rpartition(".")
    infos = source.checkpoint.tensors
    both = [f"{head}.{name}" for name in PARTS]
    if leaf != parameter or leaf not in PARTS or not all(name in infos for name in both):
        return
    known = next((experts for experts in source.structure.experts if experts.path == path), None)
    if not head.endswith("experts") or known is None or not known.plain:
        return
    way = transposed(*(infos[name].shape for name in both))
    if way is None:
        return
    count = len(PARTS[leaf])
    for expert in range(infos[tensor].shape[0]):
        for number, name in enumerate(PARTS[leaf]):
            yield f"{head}.{expert}.{name}.weight", Part(tensor, expert, number, count, way)


def stacks_of(source: Source) -> dict[str, list[str]]:
    """Return stored stack -> the names of its matrices, for a model that `unstacked` returned."""
    found: dict[str, list[str]] = {}
    if isinstance(source.checkpoint, UnstackedCheckpoint):
        for name, part in source.checkpoint.parts.items():
            found.setdefault(part.stack, []).append(name)
    return found
