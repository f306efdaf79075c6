"""Who reads the residual stream, who writes into it, and where each head's values come from.

A rotation of the residual stream has to reach every weight that touches it, and nothing else. No table of architectures
says which those are: the network runs once on the meta device (shapes, no memory), and the graph that autograd notes
while it runs is walked backwards. From a tensor the walk passes through additions, scalings and views, which commute
with a rotation, and stops at the modules whose outputs it meets: the tensor's *origins*.

* The origins of a block's output are the block before (or the embedding) and the block's *writers*: o_proj, down_proj,
  the experts.
* A norm whose input has the stream among its origins is a *norm of the stream*; those inside (of queries, of a latent
  vector, of what a sandwich block adds) have other origins.
* A *reader* is a module with a matrix whose only origin is such a norm.
* The values that attention is given are a view of some linear's output; where each channel lies in that view says
  which rows of the linear make it: all of v_proj, the last third of a fused one, the second half of each head of
  DeepSeek's kv_b_proj.

What does not fit this picture is refused with the module that does not fit: a norm between a writer and the stream
(Gemma, GLM-4), an image tower that writes features into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import ModelError
from ...models.attention import watched
from ...models.loading import Source, probe_model
from ...models.structure import PROBE_TOKENS

FIX = "Leave out the transform, or the rotation R1, for this model."
# What a network raises that cannot run in the way it is asked to.
UNFIT = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
# Operations of autograd's graph that a rotation of the last dimension commutes with, when they have one input.
SCALE = "MulBackward0"
PASSED = frozenset(
    f"{name}Backward0"
    for name in (
        *("Add", "View", "UnsafeView", "ReshapeAlias", "Clone", "ToCopy", "Alias", "Slice", "Unsqueeze"),
        *("Squeeze", "Transpose", "Permute", "Expand", "Split", "SplitWithSizes"),
    )
)


@dataclass(frozen=True)
class Residual:
    """The modules that touch the residual stream, as module paths."""

    embeddings: tuple[str, ...]
    writers: tuple[str, ...]
    readers: Mapping[
        str, str | None
    ]  # module -> the norm that it reads through; None where it reads the stream
    norms: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Values:
    """How the values of one attention module are made: rows of `maker`, `width` a head, read by `reader`."""

    maker: str
    rows: Tensor  # [kv_heads * width], head after head
    width: int
    reader: str  # its columns are heads of `width`


def residual(source: Source, trace: Trace) -> Residual:
    """Return the roles of one model; one whose stream R1 cannot rotate is a `ModelError`."""
    structure, model = source.structure, trace.model
    for kind, path in structure.towers.items():
        raise _refused(f"{path} ({kind}) writes features into it, and they would have to be rotated too")
    embeddings, written = set[str](), set[str]()
    for index, block in enumerate(structure.blocks):
        for origin in sorted(trace.before(block)):
            if origin in (structure.embeddings if index == 0 else structure.blocks[index - 1 : index]):
                embeddings |= {origin} if index == 0 else set()
            elif origin.startswith("?") or not _is_matrix(model, origin):
                raise _refused(f"{origin} stands between it and what {block} adds to it")
            else:
                written.add(origin)
    starts = {*embeddings, *structure.blocks}
    stream = starts | written
    reads = {name: trace.origins(given) for name, given in trace.inputs.items()}
    direct = [name for name, origins in reads.items() if origins & starts and origins <= stream]
    norms = {name for name in direct if _is_norm(model, name)}
    readers: dict[str, str | None] = {}
    for name, origins in reads.items():
        if name in structure.embeddings or not _is_matrix(model, name):
            continue
        if name in direct:
            readers[name] = None
        elif len(origins) == 1 and origins <= norms:
            readers[name] = next(iter(origins))
        elif origins & (stream | norms):
            raise _refused(f"{name} reads it mixed with something else ({', '.join(sorted(origins))})")
    unread = sorted(norms - {norm for norm in readers.values() if norm})
    if unread:
        raise _refused(f"nobody can say who reads {unread[0]}")
    if structure.head not in readers:
        raise _refused("the head does not read it")
    return Residual(tuple(sorted(embeddings)), tuple(sorted(written)), readers, tuple(sorted(norms)))


def values(trace: Trace) -> dict[str, Values | str]:
    """Return, for each attention module, how its values are made, or why nobody can say."""
    return {path: _values(trace, path) for path in trace.attention}


def _refused(why: str) -> ModelError:
    return ModelError(f"The residual stream of this model cannot be rotated: {why}.", fix=FIX)


def _own(model: nn.Module, path: str) -> list[Tensor]:
    return list(model.get_submodule(path).parameters(recurse=False))


def _is_matrix(model: nn.Module, path: str) -> bool:
    return any(parameter.dim() >= 2 for parameter in _own(model, path))


def _is_norm(model: nn.Module, path: str) -> bool:
    """Say whether a module could be a norm: one weight a channel, and nothing inside."""
    own, inside = _own(model, path), any(True for _ in model.get_submodule(path).children())
    return bool(own) and not inside and all(parameter.dim() == 1 for parameter in own)


@dataclass
class Trace:
    """What one forward on the meta device left behind; everything is kept, so that identities stay unique."""

    model: nn.Module
    blocks: frozenset[str]
    made: dict[Any, str] = field(default_factory=dict)  # node of the graph -> the module that returned it
    inputs: dict[str, Tensor] = field(default_factory=dict)  # module -> the tensor that it was given
    outputs: dict[str, Tensor] = field(default_factory=dict)  # linear -> what it returned
    attention: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # module -> (query, value)

    @classmethod
    def of(cls, source: Source) -> Trace:
        """Run the model once."""
        model = probe_model(source.config)
        trace = cls(model, frozenset(source.structure.blocks))
        names = {module: name for name, module in model.named_modules()}
        for module, name in names.items():
            if name in trace.blocks or any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(partial(trace._enter, name), with_kwargs=True)
                module.register_forward_hook(partial(trace._leave, name))

        def attend(module: nn.Module, query: Tensor, _key: Tensor, value: Tensor) -> None:
            trace.attention.setdefault(names[module], (query, value))

        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
        try:
            with watched(model, attend), torch.enable_grad(), torch.device("meta"):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except UNFIT as error:
            raise _refused(f"its operations could not be traced ({error})") from error
        return trace

    def _enter(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None:
            self.inputs.setdefault(name, given)

    def _leave(self, name: str, module: nn.Module, _args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) and output else output
        if isinstance(found, Tensor) and found.grad_fn is not None:
            self.made.setdefault(found.grad_fn, name)  # the innermost module returns first
            if isinstance(module, nn.Linear):
                self.outputs.setdefault(name, found)

    def origins(self, tensor: Tensor) -> set[str]:
        """Return the modules that a tensor comes from; ``?Name`` is an operation that nothing is known of."""
        return self._walk([tensor.grad_fn])

    def before(self, block: str) -> set[str]:
        """Return the modules whose outputs a block's output is the sum of."""
        node = next((node for node, name in self.made.items() if name == block), None)
        return {"?"} if node is None else self._walk([following for following, _ in node.next_functions])

    def _walk(self, nodes: Iterable[Any]) -> set[str]:
        found: set[str] = set()
        pending, seen = [node for node in nodes if node is not None], set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            name = type(node).__name__
            inputs = [(following, place) for following, place in node.next_functions if following is not None]
            if node in self.made:
                found.add(self.made[node])
            elif name in PASSED:
                pending += [following for following, _ in inputs]
            elif name == SCALE and (factors := _wide(inputs)) is not None:
                pending.append(factors)
            else:
                found.add("?" + name.removesuffix("Backward0"))
        return found


def _values(trace: Trace, path: str) -> Values | str:
    query, value = trace.attention[path]
    heads, width = query.shape[1], value.shape[-1]
    maker = next((name for name, out in trace.outputs.items() if _storage(out) == _storage(value)), None)
    if maker is None:
        return f"something stands between a linear and the values of {path}"
    # What the probing attention returns has no history, so whoever reads just that has no origins.
    readers = [
        name
        for name, given in trace.inputs.items()
        if name.startswith(path + ".") and given.grad_fn is None and given.shape[-1] == heads * width
    ]
    if len(readers) != 1 or not isinstance(trace.model.get_submodule(readers[0]), nn.Linear):
        return f"something stands between {path} and the linear that reads what it returns"
    head, channel = torch.arange(value.shape[1])[:, None], torch.arange(width)
    offset = int(value.storage_offset()) - int(trace.outputs[maker].storage_offset())
    rows = (offset + head * int(value.stride(1)) + channel * int(value.stride(3))).flatten()
    if not 0 <= int(rows.min()) <= int(rows.max()) < trace.outputs[maker].shape[-1]:
        return f"the values of {path} are no rows of {maker}"
    return Values(maker, rows, width, readers[0])


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _wide(inputs: list[tuple[Any, int]]) -> Any | None:
    """Return the one input of a product that is no number for each token; None if there are more."""
    wide = [node for node, place in inputs if tuple(node._input_metadata[place].shape)[-1:] != (1,)]
    return wide[0] if len(wide) == 1 else None
