"""The block stream: one decoder block in memory at a time, fed with its calibration inputs.

First a *skeleton* pass runs the model with its blocks replaced by recorders: only the embedding is loaded, and
each block's call arguments (rotary tables, masks, which differ between layer types) are noted per sample. Then
the blocks are walked: a block's weights are read from disk, the samples run through it, the method observes and
quantizes, the block is freed. Memory is one block plus the activations' budget, whatever the depth.

Samples run one by one at their own length, so no padding exists and none can enter a statistic. Some models add
to the hidden states between blocks (features of an image to the first few): the recorders pass their input on, so
the skeleton sees what was added, and the stream adds it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from .activations import ActivationStore
from .batches import Enough, Watch, batches, computes_together, finite
from .block import ObservePair
from .calls import Call, Interned, same
from .experts import ExpertRunner, StreamedExperts, streamable, watching
from .inputs import Observe
from .loading import Source
from .outside import TEXT_INPUTS, before_blocks, filled_on_demand


class BlockStream:
    """Walks the blocks of an opened model with calibration samples: token ids ``[1, tokens]``, or named tensors.

    With `follow_original` each sample is stored twice: entry s passes through the blocks as a method leaves
    them, entry ``len(samples) + s`` through the original ones. Both are committed and resumed together.

    Nobody in the walk reads what the last block gives, so a run that would only store it is left out, unless
    `keep_last` says that somebody else will.
    """

    def __init__(
        self,
        source: Source,
        samples: Sequence[Tensor | Mapping[str, Tensor]],
        store: ActivationStore,
        device: torch.device,
        *,
        follow_original: bool = False,
        keep_last: bool = True,
    ) -> None:
        self.source, self.store, self.device = source, store, device
        self.keep_last = keep_last
        self.samples = [{"input_ids": each} if isinstance(each, Tensor) else dict(each) for each in samples]
        self.blocks = source.structure.blocks
        self.entries = len(self.samples) * (2 if follow_original else 1)
        self.experts: dict[str, StreamedExperts] = {}  # those of the resident block
        self._calls: list[dict[int, Call]] = []  # sample -> block -> call
        self._added: list[dict[int, Tensor]] = []  # sample -> block -> what the model adds before it
        self._interned = Interned()
        self._together: dict[object, bool] = {}  # kind of block -> whether samples can run together

    def prepare(self, first: int) -> None:
        """Run the skeleton; generation 0 is stored unless the walk continues at block `first` > 0."""
        for sample, inputs in enumerate(self.samples):
            hidden, calls, added = self._record(inputs)
            self._calls.append(calls)
            self._added.append(added)
            if first == 0:
                for entry in range(sample, self.entries, len(self.samples)):
                    self.store.put(0, entry, hidden)
        self.source.free("")

    def share(self, other: BlockStream) -> None:
        """Take over the calls of a stream with the same samples through the same model, instead of `prepare`."""
        self._calls, self._added = other._calls, other._added

    @contextmanager
    def resident(self, index: int) -> Iterator[BlockRunner]:
        """Hold one block's weights in memory, without those of its experts where they can be streamed."""
        path = self.blocks[index]
        self.experts = {
            name: StreamedExperts(self.source, tensors, self.device, len(self.samples))
            for name, tensors in streamable(self.source, path).items()
        }
        try:
            with ExitStack() as standing_in:
                for experts in self.experts.values():
                    standing_in.enter_context(experts.installed())
                self.source.materialize(path, self.device, leave=frozenset(self.experts))
                self._read_ahead(index + 1)
                yield BlockRunner(self, index)
        finally:
            self.source.free(path)
            self.experts = {}

    def _read_ahead(self, index: int) -> None:
        """On an accelerator, read the next block's weights while this one computes."""
        if self.device.type == "cpu" or index >= len(self.blocks):
            return
        later = {
            name
            for tensors in streamable(self.source, self.blocks[index]).values()
            for expert in tensors
            for name in expert.names
        }
        inside = f"{self.blocks[index]}."
        targets = self.source.targets
        self.source.checkpoint.ahead(
            name for name in targets if targets[name].parameter.startswith(inside) and name not in later
        )

    def wanted(self, generation: int) -> bool:
        """Say whether anybody will read a generation: block `generation`, or who wants what the last one gives."""
        return self.keep_last or generation < len(self.blocks)

    def complete(self, generation: int) -> bool:
        """Say whether the walk can go on from a generation: all of it is stored, or nobody will read it."""
        return not self.wanted(generation) or self.store.complete(generation, self.entries)

    def run(self, index: int, observe: Mapping[str, Observe], *, keep: bool, again: bool = False) -> None:
        """Run every sample through block `index`; `keep` stores the outputs as the next generation, if it is wanted.

        The inputs are dropped then, unless block `index` will run `again`.

        With streamed experts, `keep` notes what is asked of them instead; `finish` stores the outputs.
        """
        if keep and not (observe or self.experts or self.wanted(index + 1)):
            return
        wanted = bool(self.experts) or (keep and self.wanted(index + 1))
        modules = {path: self.source.model.get_submodule(path) for path in observe}
        watch, together = Watch(modules, observe), self._batches(index)
        with watch.hooked(), torch.no_grad():
            for samples in together:
                watch.count, output = len(samples), None
                with suppress(Enough):
                    output = self._forward(index, samples, "record" if keep else "silent")
                    if not wanted:
                        watch.learn()
                for place, sample in enumerate(samples) if keep and not self.experts else ():
                    self._advance(index, sample, None if output is None else output[place : place + 1], again)

    def compare(self, index: int, observe: Mapping[str, ObservePair]) -> None:
        """Run every sample from both of its inputs; the outputs of the original's are the next generation."""
        count = len(self.samples)
        assert self.entries == 2 * count, "the method does not say that it follows the original"
        seen: dict[str, Tensor] = {}
        modules = {path: self.source.model.get_submodule(path) for path in observe}
        functions = {path: partial(seen.__setitem__, path) for path in observe}
        with watching(modules, functions), torch.no_grad():
            for sample, given in enumerate(self.samples):
                self._forward(index, [sample], "silent")
                inputs = dict(seen)
                seen.clear()
                output = self._forward(index, [count + sample], "record")
                if not self.experts:
                    self._advance(index, count + sample, output)
                for path, values in inputs.items():
                    original = seen.get(path)
                    # A whole number of rows per token: nothing was routed away, so rows belong together.
                    matched = original is not None and original.shape == values.shape
                    whole = values.shape[0] % given["input_ids"].shape[1] == 0
                    observe[path](values, original if matched and whole else None)
                seen.clear()

    def finish(self, index: int) -> None:
        """Run block `index` once more with the answers of its experts, and store the outputs.

        The original's entries need the block's original weights, which are read again.
        """
        if not (self.experts and self.wanted(index + 1)):
            return
        count = len(self.samples)
        with torch.no_grad():
            for entry in range(self.entries):
                if entry == count:
                    self.source.free(self.blocks[index])
                    self.source.materialize(self.blocks[index], self.device, leave=frozenset(self.experts))
                self._advance(index, entry, self._forward(index, [entry], "play"))

    def through(self, index: int) -> None:
        """Run every sample through the resident block `index` as it is, its experts too, and store the outputs."""
        self.run(index, {}, keep=True)
        for experts in self.experts.values():
            for tensors in experts.tensors:
                ExpertRunner(experts, tensors.index).run({}, keep=True)
        self.finish(index)

    def forward(self, index: int, samples: Sequence[int]) -> Tensor:
        """Return the outputs ``[samples, tokens, hidden]`` of block `index`; streamed experts answer zero."""
        self._set_mode("silent", 0)
        if all(self._alike(index, samples[0], sample) for sample in samples):
            return self._call(index, samples)
        return torch.cat([self._call(index, [sample]) for sample in samples])

    @contextmanager
    def tail(self) -> Iterator[Callable[[int, Tensor], Tensor]]:
        """Hand out what turns a sample's last hidden states ``[1, tokens, hidden]`` into logits.

        The model runs with blocks that return what is given: what follows them is its own.
        """
        model = self.source.model
        modules = [model.get_submodule(path) for path in self.blocks]
        given: list[Tensor] = []

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return (given[0],) if self.source.structure.tuple_outputs else given[0]

        def logits(sample: int, hidden: Tensor) -> Tensor:
            inputs = self.samples[sample]
            given[:] = [hidden.to(self.device)]
            named = {name: inputs[name].to(self.device) for name in TEXT_INPUTS & inputs.keys()}
            with torch.no_grad():
                found: Tensor = model(**named, use_cache=False).logits
            return found.float()

        for module in modules:
            module.forward = forward
        try:
            with filled_on_demand(self.source, self.device):
                yield logits
        finally:
            for module in modules:
                del module.forward
            self.source.free("")

    def _advance(self, index: int, entry: int, output: Tensor | None, again: bool = False) -> None:
        if output is not None and self.wanted(index + 1):
            self.store.put(index + 1, entry, output)
        if not again:
            self.store.drop(index, entry)

    def _set_mode(self, mode: Literal["silent", "record", "play"], entry: int) -> None:
        for experts in self.experts.values():
            experts.mode, experts.entry = mode, entry

    def _alike(self, index: int, one: int, other: int) -> bool:
        """Say whether two samples can run through a block together: of one length, and called alike."""
        return self._shape(one) == self._shape(other) and same(
            self._calls[one][index], self._calls[other][index]
        )

    def _shape(self, sample: int) -> tuple[int, ...]:
        """Return how many rows and tokens a sample has, be it ids or embeddings."""
        given = self.samples[sample]
        return tuple((given["input_ids"] if "input_ids" in given else given["inputs_embeds"]).shape[:2])

    def _batches(self, index: int) -> list[list[int]]:
        """Return the samples that run through a block together."""
        alone = [[sample] for sample in range(len(self.samples))]
        found = batches(len(alone), partial(self._alike, index), lambda sample: prod(self._shape(sample)))
        several = next((samples for samples in found if len(samples) > 1), None)
        if several is None or self.experts:
            return alone
        block = self.source.model.get_submodule(self.blocks[index])
        kind = type(block), *(name for name, _ in block.named_modules())
        if kind not in self._together:
            self._together[kind] = computes_together(block, partial(self._call, index), several[:2])
        return found if self._together[kind] else alone

    def _forward(
        self, index: int, entries: Sequence[int], mode: Literal["silent", "record", "play"]
    ) -> Tensor:
        self._set_mode(mode, entries[0])
        output = self._call(index, entries)
        if not finite(output):
            spoilt = [each for place, each in enumerate(entries) if not finite(output[place])]
            what = f"Block {index} ({self.blocks[index]}) gives NaN or infinity on sample {spoilt[0] % len(self.samples)}"
            block = self.source.model.get_submodule(self.blocks[index])
            damaged = next(
                (name for name, weight in block.named_parameters() if not (weight.is_meta or finite(weight))),
                None,
            )
            if damaged:
                tensor = f"{self.blocks[index]}.{damaged}"
                raise ModelError(
                    f"{what}: {tensor!r} holds some.", fix="Restore this tensor of the source model."
                )
            raise ModelError(
                f"{what}.",
                fix="The source model is damaged or overflows in its type; try model.torch_dtype=float32.",
            )
        return output

    def _input(self, index: int, entry: int) -> Tensor:
        hidden = self.store.get(index, entry)
        added = self._added[entry % len(self.samples)].get(index)
        return hidden if added is None else hidden + added

    def _call(self, index: int, entries: Sequence[int]) -> Tensor:
        """Run the block on entries that are alike."""
        module = self.source.model.get_submodule(self.blocks[index])
        args, named = self._calls[entries[0] % len(self.samples)][index]
        hidden = torch.cat([self._input(index, entry) for entry in entries])
        output = module(hidden.to(self.device), *args, **named)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def _record(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[int, Call], dict[int, Tensor]]:
        """Run the model without its blocks; return the first block's input, the calls, and what is added between."""
        model = self.source.model
        calls: dict[int, Call] = {}
        added: dict[int, Tensor] = {}
        first: list[Tensor] = []
        passed: list[Tensor] = []  # what the last recorder gave back
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        modules = [model.get_submodule(path) for path in self.blocks]

        def recorder(index: int) -> Callable[..., Any]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                if index == 0:
                    first.append(hidden.clone())
                elif not torch.equal(hidden, passed[0]):
                    added[index] = (hidden - passed[0]).cpu()
                passed[:] = [hidden.clone()]  # some models add in place
                calls[index] = (self._interned.share(args, seen), self._interned.share(kwargs, seen))
                if index == len(modules) - 1:
                    raise _Recorded
                return (hidden,) if self.source.structure.tuple_outputs else hidden

            return forward

        for index, module in enumerate(modules):
            module.forward = recorder(index)
        try:
            towers = bool(inputs.keys() - TEXT_INPUTS)
            with before_blocks(self.source, self.device, towers=towers), torch.no_grad():
                model(**{name: value.to(self.device) for name, value in inputs.items()}, use_cache=False)
        except _Recorded:
            pass
        finally:
            for module in modules:
                del module.forward
        return first[0], calls, added


class _Recorded(Exception):
    """Raised when the last block has been recorded."""


@dataclass(frozen=True)
class BlockRunner:
    """One resident block of a stream, as a method's `Block` sees it."""

    stream: BlockStream
    index: int

    @property
    def samples(self) -> int:
        """How many calibration samples there are."""
        return len(self.stream.samples)

    @property
    def module(self) -> nn.Module:
        """The resident block."""
        return self.submodule(self.stream.blocks[self.index])

    def submodule(self, path: str) -> nn.Module:
        """Return a module of the model by its full path."""
        found: nn.Module = self.stream.source.model.get_submodule(path)
        return found

    def run(self, observe: Mapping[str, Observe], *, keep: bool, again: bool = False) -> None:
        """Run every sample through the block."""
        self.stream.run(self.index, observe, keep=keep, again=again)

    def compare(self, observe: Mapping[str, ObservePair]) -> None:
        """Run every sample from both of its inputs."""
        self.stream.compare(self.index, observe)

    def forward(self, samples: Sequence[int]) -> Tensor:
        """Return the block's outputs for samples of one length."""
        return self.stream.forward(self.index, samples)

    def scale_expert_inputs(self, path: str, scale: Tensor) -> bool:
        """Multiply the input columns of streamed experts when they are read."""
        experts = self.stream.experts.get(path)
        if experts is not None:
            experts.scale = scale if experts.scale is None else experts.scale * scale
        return experts is not None
