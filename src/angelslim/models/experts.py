"""Fused experts, one at a time: a mixture's block in the memory of its attention and a single expert.

transformers stacks the experts of a layer into one 3-D parameter; checkpoints keep a matrix for each, and a block of
DeepSeek-V3 has 256 of them, 22 GB in bf16. While the block runs its experts are therefore never loaded: the stacked
module *records* what the router sent (`Routing`) and answers zero. Afterwards each expert is read from disk, becomes
an ordinary module of linears, runs the tokens of all samples that were sent to it, is observed and rounded like any
block, and its answers are added up. At the end the block runs once more and the stacked module *plays* the answers.

Each expert reads the tokens that the router chose for it. One that got fewer than `ENOUGH` also reads some of the
others, spread evenly over the samples: they enter its statistics, never its answers. So no expert is rounded
blindly, and `ExpertUse` says how many tokens were its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..base import parallel
from .block import ObservePair
from .inputs import Observe
from .loading import Source
from .rules import UNLIKE, turns
from .structure import Group

ENOUGH = 256  # tokens that an expert's statistics are made from at least
CHUNK = 4096  # tokens that run through an expert together


@dataclass(frozen=True)
class ExpertTensors:
    """Where one expert's matrices lie in the checkpoint."""

    path: str  # of the stacked module, "model.layers.3.mlp.experts"
    index: int
    first: tuple[
        str, ...
    ]  # tensors that read the input, in the order in which the stack joins them (gate, up)
    last: str  # the tensor that makes the output (down)

    @property
    def names(self) -> tuple[str, ...]:
        """All of the expert's tensors."""
        return (*self.first, self.last)

    def module(self, tensor: str) -> str:
        """Return the module path of the linear that holds a tensor, as if the experts were a list of modules."""
        return f"{self.path}.{self.index}.{tensor.removesuffix('.weight').rpartition('.')[2]}"

    @property
    def groups(self) -> dict[str, Group]:
        """The linears that share an input."""
        first, last = tuple(map(self.module, self.first)), (self.module(self.last),)
        return dict.fromkeys(first, Group(None, first)) | {last[0]: Group(None, last)}


@dataclass(frozen=True)
class ExpertUse:
    """How much of the calibration an expert saw."""

    module: str  # path of the stacked module
    expert: int
    tokens: int  # sent by the router
    of: int  # tokens that the layer saw
    note: str = ""


def streamable(source: Source, block: str) -> dict[str, list[ExpertTensors]]:
    """Return, for each stacked module in a block, its experts, if they can be streamed.

    That takes a checkpoint with one matrix for each expert (`stacks` makes some of a stack) and the plain layout: gate
    above up, no biases.
    """
    found: dict[str, list[ExpertTensors]] = {}
    for experts in source.structure.experts:
        if not experts.path.startswith(block + "."):
            continue
        module: Any = source.model.get_submodule(experts.path)
        known = hasattr(module, "has_gate") or experts.sorted
        if not known or not getattr(module, "is_concatenated", True):
            continue
        if any(getattr(module, name, False) for name in UNLIKE):
            continue
        turned = getattr(module, "is_transposed", experts.sorted)
        gated = getattr(module, "has_gate", True)
        first = _by_pattern(source, f"{experts.path}.{'gate_up_proj' if gated else 'up_proj'}", turned)
        last = _by_pattern(source, f"{experts.path}.down_proj", turned)
        if len(last) == 1 and first and all(len(names) == experts.count for names in [*first, *last]):
            found[experts.path] = [
                ExpertTensors(experts.path, index, tuple(names[index] for names in first), last[0][index])
                for index in range(experts.count)
            ]
    return found


def _by_pattern(source: Source, parameter: str, turned: bool) -> list[list[str]]:
    """Return the checkpoint tensors of a stack: a list for each joined part, one matrix ``[out, in]`` an expert.

    A stack that is `turned` holds ``[in, out]``, so the rule that makes it has to turn the matrices.
    """
    names = source.tensors_of.get(parameter, [])
    pattern = source.targets[names[0]].pattern if names else None
    if pattern is None or any(len(source.checkpoint.tensors[name].shape) != 2 for name in names):
        return []
    if turned != turns(source.rules[pattern]):
        return []
    parts = source.rules[pattern].source_patterns
    return [[name for name in names if source.targets[name].pattern == part] for part in parts]


class Expert(nn.Module):
    """One expert as a module of linears; the activation is the stacked module's own."""

    def __init__(self, stack: Any, tensors: ExpertTensors, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._activate = _activation(stack)
        self._first = [tensors.module(name).rpartition(".")[2] for name in tensors.first]
        self._last = tensors.module(tensors.last).rpartition(".")[2]
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(tensors.module(name).rpartition(".")[2], linear)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., hidden]`` to ``[..., hidden]``; the router's weight is applied outside."""
        parts = [self.get_submodule(name)(hidden) for name in self._first]
        output: Tensor = self.get_submodule(self._last)(self._activate(torch.cat(parts, dim=-1)))
        return output


def _activation(stack: Any) -> Callable[[Tensor], Tensor]:
    """Return what lies between an expert's first and last product: its own function, or act(gate) * up."""
    if hasattr(stack, "_apply_gate"):
        gate: Callable[[Tensor], Tensor] = stack._apply_gate if stack.has_gate else stack.act_fn
        return gate

    def gated(joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, dim=-1)
        activated: Tensor = stack.act_fn(gate) * up
        return activated

    return gated


@dataclass(frozen=True)
class Routing:
    """What the experts of a layer were asked for one sample, in host memory."""

    hidden: Tensor  # [tokens, hidden]
    index: Tensor  # [tokens, k]
    weight: Tensor  # [tokens, k]
    rows: Tensor | None = None  # of sorted experts: where in the call the tokens lie

    @classmethod
    def of_sorted(cls, hidden: Tensor, experts: int) -> Routing:
        """Read the call of sorted experts ``[experts * tokens, hidden]``: rows of zeros were not sent anywhere."""
        rows = hidden.ne(0).any(dim=1).nonzero().flatten()
        index = (rows // (len(hidden) // experts))[:, None]
        return cls(hidden[rows], index, torch.ones(len(rows), 1, dtype=hidden.dtype), rows)

    def placed(self, answers: Tensor, like: Tensor) -> Tensor:
        """Return the answers in the shape of the call."""
        if self.rows is None:
            return answers.view_as(like)
        flat = torch.zeros_like(like).reshape(-1, like.shape[-1])
        flat[self.rows.to(like.device)] = answers
        return flat.view_as(like)

    def identity(self, tokens: Tensor) -> Tensor:
        """Return numbers that are equal for the same tokens of another call."""
        return tokens if self.rows is None else self.rows[tokens]

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return (tokens that were sent to an expert, their weights ``[n, 1]``)."""
        tokens, places = torch.where(self.index == expert)
        return tokens, self.weight[tokens, places, None]


@dataclass
class StreamedExperts:
    """The experts of one stacked module: what they were asked, and what they answer."""

    source: Source
    tensors: list[ExpertTensors]
    device: torch.device
    originals: int  # entries from this one on belong to the original model
    asked: dict[int, Routing] = field(default_factory=dict)
    answers: dict[int, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None  # multiplies the input columns of every expert
    mode: Literal["silent", "record", "play"] = "silent"
    entry: int = 0  # the sample that is running

    @property
    def path(self) -> str:
        """Module path of the stack."""
        return self.tensors[0].path

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in for the stacked module."""
        module = self.source.model.get_submodule(self.path)
        module.forward = self._stand_in
        try:
            yield
        finally:
            del module.forward

    def _stand_in(self, hidden: Tensor, index: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        if self.mode == "play":
            return self.asked[self.entry].placed(self.answers[self.entry].to(self.device), hidden)
        if self.mode == "record":
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            if index is None or weight is None:
                asked = Routing.of_sorted(flat.cpu(), len(self.tensors))
            else:
                asked = Routing(flat.cpu(), index.cpu(), weight.detach().cpu())
            self.asked[self.entry] = asked
            self.answers[self.entry] = torch.zeros_like(asked.hidden)
        return torch.zeros_like(hidden)

    def load(self, expert: int) -> Expert:
        """Read one expert from the checkpoint."""
        tensors = self.tensors[expert]
        if self.device.type != "cpu" and expert + 1 < len(self.tensors):
            self.source.checkpoint.ahead(self.tensors[expert + 1].names)
        weights = {}
        for name in tensors.names:
            weight = self.source.checkpoint.read(name, self.device).to(self.source.dtype)
            scaled = self.scale is not None and name != tensors.last
            weights[name] = (weight * self.scale).to(weight.dtype) if scaled else weight  # type: ignore[operator]
        return Expert(self.source.model.get_submodule(self.path), tensors, weights)


class ExpertRunner:
    """Runs the tokens of all samples that concern one expert."""

    def __init__(self, experts: StreamedExperts, expert: int) -> None:
        self.experts, self.expert = experts, expert
        self.tensors = experts.tensors[expert]
        self.module: Expert = experts.load(expert)
        own = {entry: routing.of(expert) for entry, routing in experts.asked.items()}
        self.own = {entry: found for entry, found in own.items() if len(found[0])}
        here = sum(len(r.hidden) for entry, r in experts.asked.items() if entry < experts.originals)
        mine = sum(len(found[0]) for entry, found in self.own.items() if entry < experts.originals)
        total, tokens = parallel.total_count(here), parallel.total_count(mine)
        missing = max(0, min(ENOUGH, total) - tokens)  # each process adds its share of the others' tokens
        self.extra = self._others(-(-missing * (here - mine) // max(1, total - tokens)))
        added = parallel.total_count(len(self.extra))
        note = f"too few tokens of its own; its statistics also use {added} of others"
        self.use = ExpertUse(experts.path, expert, tokens, total, note if added else "")
        for entry in [entry for entry in self.own if entry >= experts.originals]:
            self._answer([entry])  # the original's answers, before a method touches the weights

    @property
    def groups(self) -> dict[str, Group]:
        """The expert's linears that share an input."""
        return self.tensors.groups

    @property
    def samples(self) -> int:
        """Pieces of up to `CHUNK` tokens; at least one while any process has some."""
        return max(len(self._pieces), int(self.use.of > 0))

    @cached_property
    def _pieces(self) -> list[Tensor]:
        """Own tokens and the extra ones, ``[tokens, hidden]`` each, in host memory."""
        rows = [self.experts.asked[e].hidden[tokens] for e, (tokens, _) in self.own.items() if self._ours(e)]
        rows += [self.extra] if len(self.extra) else []
        return list(torch.split(torch.cat(rows), CHUNK)) if rows else []

    def _nothing(self) -> Tensor:
        """No tokens ``[0, hidden]``: other processes have some."""
        return next(iter(self.experts.asked.values())).hidden[:0]

    def _ours(self, entry: int) -> bool:
        return entry < self.experts.originals

    def _others(self, wanted: int) -> Tensor:
        """Return up to `wanted` tokens that were not sent here, evenly spaced."""
        if wanted <= 0:
            return torch.empty(0)
        kept = []
        for entry, routing in self.experts.asked.items():
            if self._ours(entry):
                kept.append(routing.hidden[(routing.index != self.expert).all(dim=1)])
        others = torch.cat(kept)
        step = max(1, len(others) // wanted)
        return others[::step][:wanted].clone()

    def submodule(self, path: str) -> nn.Module:
        """Return the expert or one of its linears by the path that `ExpertTensors.module` gives."""
        prefix = f"{self.experts.path}.{self.expert}"
        assert path == prefix or path.startswith(prefix + "."), path
        return self.module.get_submodule(path[len(prefix) + 1 :])

    def run(self, observe: Mapping[str, Observe], *, keep: bool, again: bool = False) -> None:
        """Run the expert's tokens; `keep` adds its weighted answers to those of the layer. The tokens stay."""
        with watching({path: self.submodule(path) for path in observe}, observe):
            if not keep:
                for piece in self._pieces:
                    self._through(piece)
                return
            self._answer([entry for entry in self.own if self._ours(entry)])
            if len(self.extra):
                self._through(self.extra)

    def _answer(self, entries: Sequence[int]) -> None:
        for chunk in self._chunks(entries):
            asked = [self.experts.asked[entry].hidden[self.own[entry][0]] for entry in chunk]
            outputs = torch.split(self._through(torch.cat(asked)).cpu(), [len(rows) for rows in asked])
            for entry, output in zip(chunk, outputs, strict=True):
                tokens, weight = self.own[entry]
                answers = self.experts.answers[entry]
                answers.index_add_(0, tokens, (output * weight).to(answers.dtype))

    def _chunks(self, entries: Sequence[int]) -> Iterator[list[int]]:
        """Yield entries in order, together up to `CHUNK` tokens."""
        chunk: list[int] = []
        size = 0
        for entry in entries:
            if chunk and size + len(self.own[entry][0]) > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(entry)
            size += len(self.own[entry][0])
        if chunk:
            yield chunk

    def _through(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.module(hidden.to(self.experts.device))
        return output

    def compare(self, observe: Mapping[str, ObservePair]) -> None:
        """Show the inputs of the linears for own tokens, beside those of the original where both were sent here."""
        count = self.experts.originals
        nothing = (torch.empty(0, dtype=torch.long), torch.empty(0))
        for entry in range(count):
            asked, before = self.experts.asked[entry], self.experts.asked[count + entry]
            own, original = (self.own.get(key, nothing)[0] for key in (entry, count + entry))
            here, there = asked.identity(own), before.identity(original)
            both, matched = torch.isin(here, there), original[torch.isin(there, here)]
            for tokens, others in ((own[both], matched), (own[~both], None)):
                if not len(tokens):
                    continue
                now = self._seen(observe, asked.hidden[tokens])
                then = None if others is None else self._seen(observe, before.hidden[others])
                for path, values in now.items():
                    observe[path](values, None if then is None else then[path])
        if len(self.extra):
            for path, values in self._seen(observe, self.extra).items():
                observe[path](values, None)

    def _seen(self, paths: Mapping[str, Any], hidden: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the linears at `paths` when `hidden` runs through the expert."""
        seen: dict[str, Tensor] = {}
        functions = {path: partial(seen.__setitem__, path) for path in paths}
        with watching({path: self.submodule(path) for path in paths}, functions):
            self._through(hidden)
        return seen

    def forward(self, samples: Sequence[int]) -> Tensor:
        """Return the expert's output for pieces of its tokens ``[1, tokens, hidden]``."""
        pieces = self._pieces or [self._nothing()]
        output: Tensor = self.module(torch.cat([pieces[i] for i in samples])[None].to(self.experts.device))
        return output

    def scale_expert_inputs(self, path: str, scale: Tensor) -> bool:
        """An expert holds no experts."""
        return False


@contextmanager
def watching(modules: Mapping[str, nn.Module], observe: Mapping[str, Observe]) -> Iterator[None]:
    """Give each linear's inputs ``[tokens, in]`` to its function while the context lasts."""
    hooks = [modules[path].register_forward_pre_hook(_hook(function)) for path, function in observe.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(function: Observe) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        function(args[0].detach().reshape(-1, args[0].shape[-1]))

    return hook
