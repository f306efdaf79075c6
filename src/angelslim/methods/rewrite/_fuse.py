"""From the roles of modules to what becomes of each checkpoint tensor.

==================  =========================================================
embedding           ``E Q``
writer              ``Q' W``, ``Q' b``
reader              ``W diag(g) Q`` with the gain g of its norm, the head too
norm                gain 1
rows of values      ``R' W``, ``R' b`` for each head
reader of values    ``W R`` for each head
==================  =========================================================

Q belongs to the residual stream, R to one attention module. Without Q the gains are folded and nothing is rotated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...base.errors import ModelError
from ...models.checkpoint import TensorInfo
from ...models.experts import ExpertTensors, streamable
from ...models.loading import Source
from ...numerics.hadamard import Rotation
from ._residual import FIX, Residual, Values
from ._verify import offset_of
from ._view import Edit, Gain


@dataclass
class Changes:
    """Collects the edits of one model; `added` are tensors that it does not store yet."""

    source: Source
    edits: dict[str, Edit] = field(default_factory=dict)
    added: dict[str, TensorInfo] = field(default_factory=dict)

    def stream(self, roles: Residual, turn: Rotation | None) -> None:
        """Fold the gains of the stream's norms into their readers, and rotate the stream."""
        source = self.source
        head = f"{source.structure.head}.weight"
        if head not in source.tensors_of:
            self._untie(head)
        experts = {
            path: found
            for block in source.structure.blocks
            for path, found in streamable(source, block).items()
        }
        gains = self._gains(roles.norms)
        for path in roles.embeddings:
            self._edit(self._tensor(f"{path}.weight"), columns=turn)
        for path, norm in roles.readers.items():
            gain = gains[norm] if norm else None
            for tensor in self._matrices(path, experts, "reader"):
                self._edit(tensor, gain=gain, columns=turn)
        for path in roles.writers:
            for tensor in self._matrices(path, experts, "writer"):
                self._edit(tensor, rows=turn)
            if path not in experts and f"{path}.bias" in self._parameters(path):
                self._edit(self._tensor(f"{path}.bias"), rows=turn)
        for gain in gains.values():
            self._edit(gain.tensor, fill=1 - gain.offset)

    def values(self, made: Values, turn: Rotation) -> None:
        """Rotate the values of one attention module."""
        for parameter in self._parameters(made.maker):
            self._edit(self._tensor(parameter), rows=turn, where=made.rows)
        self._edit(self._tensor(f"{made.reader}.weight"), columns=turn)

    def _edit(self, tensor: str, **steps: Any) -> None:
        now = self.edits.get(tensor, Edit(tensor))
        twice = [
            step for step, value in steps.items() if value is not None and getattr(now, step) is not None
        ]
        assert not twice, f"{tensor} is changed twice: {twice}"
        self.edits[tensor] = replace(
            now, **{step: value for step, value in steps.items() if value is not None}
        )

    def _untie(self, head: str) -> None:
        """Give the head a tensor of its own, which starts as the embedding."""
        model = self.source.model
        path = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        origin = self._tensor(f"{path}.weight")
        self.added[head] = replace(self.source.checkpoint.tensors[origin], name=head)
        self.edits[head] = Edit(origin)

    def _gains(self, norms: Iterable[str]) -> dict[str, Gain]:
        """Return the gain of each norm, having tried one norm of each class."""
        offsets: dict[type[nn.Module], float | None] = {}
        gains = {}
        for path in norms:
            kind = type(self.source.model.get_submodule(path))
            if kind not in offsets:
                offsets[kind] = offset_of(self.source.materialize(path, torch.device("cpu")))
                self.source.free(path)
            offset = offsets[kind]
            if offset is None:
                raise ModelError(
                    f"The residual stream of this model cannot be rotated: {path} ({kind.__name__}) is no RMSNorm.",
                    fix=FIX,
                )
            gains[path] = Gain(self._tensor(f"{path}.weight"), offset)
        return gains

    def _matrices(self, path: str, experts: Mapping[str, list[ExpertTensors]], role: str) -> list[str]:
        """Return the tensors of a module that read, or write, the residual stream."""
        if path in experts:
            reads = role == "reader"
            return [name for each in experts[path] for name in (each.first if reads else (each.last,))]
        found = [name for name, shape in self._parameters(path).items() if len(shape) > 1]
        plain = isinstance(self.source.model.get_submodule(path), nn.Linear) or role == "reader"
        shapes = [self._parameters(path)[name] for name in found]
        if not plain or any(len(shape) != 2 for shape in shapes):
            raise ModelError(
                f"The residual stream of this model cannot be rotated: {path} is stored as one stack, or is no linear.",
                fix=FIX,
            )
        return [self._tensor(name) for name in found]

    def _parameters(self, path: str) -> dict[str, tuple[int, ...]]:
        module = self.source.model.get_submodule(path)
        return {
            f"{path}.{name}": tuple(value.shape) for name, value in module.named_parameters(recurse=False)
        }

    def _tensor(self, parameter: str) -> str:
        """Return the checkpoint tensor that holds a parameter as it is."""
        if parameter in self.added:
            return parameter
        names = self.source.tensors_of.get(parameter, [])
        if len(names) != 1 or self.source.targets[names[0]].pattern is not None:
            raise ModelError(
                f"{parameter!r} is stored in another form and cannot be rotated while it is read.", fix=FIX
            )
        return names[0]
