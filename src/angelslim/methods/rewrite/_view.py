"""A checkpoint whose tensors are changed while they are read: gains folded, rows and columns rotated.

Nothing is written and nothing is kept: whoever asks for a tensor gets its changed value, computed from one stored
matrix (and the gain of one norm), on the device that asks. Arithmetic is in float32 for 16-bit weights and in float64
for others; the result has the stored type again, so that it is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.checkpoint import Checkpoint, TensorInfo
from ...numerics.hadamard import Rotation

CHUNK = 2**24  # elements that are rotated together when only columns are


@dataclass(frozen=True)
class Gain:
    """What a norm multiplies its channels with: the stored vector `tensor`, plus `offset` (1 where it is ``1 + w``)."""

    tensor: str
    offset: float


@dataclass(frozen=True, eq=False)
class Edit:
    """How a tensor differs from the stored one called `origin`; steps in the order of the fields."""

    origin: str
    gain: Gain | None = None  # multiplies the columns
    columns: Rotation | None = None  # W Q: the inputs come rotated
    rows: Rotation | None = None  # Q' W, Q' b: the outputs leave rotated
    where: Tensor | None = None  # rotates these rows only, as if they stood alone
    fill: float | None = None  # every element becomes this


class RewrittenCheckpoint(Checkpoint):
    """The tensors of `inner`, changed by `edits`; `added` are tensors that only exist here.

    With `dtype` the changed tensors have that type instead of the stored one, unrounded: for checks.
    """

    def __init__(
        self,
        inner: Checkpoint,
        edits: Mapping[str, Edit],
        added: Iterable[TensorInfo] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.inner, self.edits, self.dtype = inner, dict(edits), dtype
        self.folder = inner.folder
        self.tensors = {**inner.tensors, **{info.name: info for info in added}}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return self.inner.nbytes

    @property
    def parameters(self) -> int:
        """Numbers in the tensors as they are stored: what is added here is not the model's own."""
        return self.inner.parameters

    @property
    def decoded(self) -> bool:
        """What the stored tensors are."""
        return self.inner.decoded

    def sources(self, name: str) -> list[TensorInfo]:
        """Return the stored tensors that `read` needs for a name."""
        edit = self.edits.get(name)
        return self.inner.sources(edit.origin if edit else name)

    def ahead(self, names: Iterable[str]) -> None:
        """Start reading the stored tensors in the background."""
        self.inner.ahead(self.edits[name].origin if name in self.edits else name for name in names)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor and change it."""
        edit = self.edits.get(name)
        if edit is None:
            return self.inner.read(name, device)
        stored = self.inner.read(edit.origin, device)
        dtype = self.dtype or stored.dtype
        exact = torch.float64 if stored.dtype in (torch.float32, torch.float64) else torch.float32
        if edit.fill is not None:
            return torch.full_like(stored, edit.fill, dtype=dtype)
        gain = None
        if edit.gain is not None:
            gain = self.inner.read(edit.gain.tensor, device).to(exact) + edit.gain.offset
        if edit.rows is not None:
            return _turned(_scaled(stored.to(exact), gain, edit.columns), edit.rows, edit.where).to(dtype)
        changed = torch.empty_like(stored, dtype=dtype)
        size = max(1, CHUNK // stored.shape[-1])
        for part, into in zip(torch.split(stored, size), torch.split(changed, size), strict=True):
            into.copy_(_scaled(part.to(exact), gain, edit.columns))
        return changed


def _scaled(values: Tensor, gain: Tensor | None, columns: Rotation | None) -> Tensor:
    """Multiply the columns by a gain and rotate them."""
    values = values if gain is None else values * gain
    return values if columns is None else columns.apply(values)


def _turned(values: Tensor, rotation: Rotation, where: Tensor | None) -> Tensor:
    """Rotate the rows of a matrix ``[out, in]`` or the elements of a bias ``[out]``."""
    if where is None:
        return rotation.apply(values.T).T.contiguous() if values.dim() > 1 else rotation.apply(values)
    turned = values.clone()
    turned[where.to(values.device)] = _turned(values[where.to(values.device)], rotation, None)
    return turned
