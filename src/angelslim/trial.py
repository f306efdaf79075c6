"""Layer 5: two sets of static input scales on trial: which model is nearer to the original on the calibration samples?

The judge is the KL divergence of the logits, mean over all tokens, in nats; nothing smaller can promise that a model
is not worse than another. All models compute in float32 from decoded weights, with inputs rounded as an engine rounds
them, so that nothing but the compression differs: in bfloat16 the forward pass alone moves the divergence by as much.

The searched scales have to win twice: on an eighth of the samples first, then on all of them. Where they lose the first
time the plain ones are taken without another look, for an eighth of the cost; to be taken, they have to be better on
everything that the calibration has.

Three block streams run, original, searched and plain, one block of one model in memory at a time. Up to the first
block whose scales differ the last two are one. At the end the model's tail (norm and head) turns the stored hidden
states into logits, sample by sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import parallel
from .base.memory import trim
from .export._checkpoint import QuantizedCheckpoint
from .models.activations import ActivationStore
from .models.experts import ExpertRunner
from .models.loading import Source
from .models.outline import Outline
from .models.walk import BlockStream
from .numerics.quantize import fake_quantize
from .numerics.scheme import Quant

Samples = Sequence[Tensor | Mapping[str, Tensor]]
FIRST = 8  # one sample in so many is looked at first, at least `LEAST` of them
LEAST = 2


@dataclass(frozen=True)
class Verdict:
    """Mean KL divergence from the original on the calibration samples, in nats a token, with either set of scales."""

    searched: float
    plain: float
    seen: float = 1.0  # share of the samples that was looked at

    @property
    def accepted(self) -> bool:
        """Whether the searched scales are better."""
        return self.searched < self.plain

    def to_dict(self) -> dict[str, Any]:
        """Return what the run's record says of it."""
        found = {"searched_kl": self.searched, "plain_kl": self.plain, "seen": self.seen}
        return {**found, "accepted": self.accepted}


@dataclass(frozen=True)
class _Compressed:
    """A compressed checkpoint, the layers of each block of it (None: outside), and how their inputs are rounded."""

    checkpoint: QuantizedCheckpoint
    layers: Mapping[int | None, Sequence[str]]
    scales: Mapping[str, Tensor]  # layer -> input scale that takes the place of its own

    def input_scale(self, layer: str) -> Tensor | None:
        """Return a layer's static input scale, None where it is dynamic."""
        own = layer not in self.scales and self.checkpoint.schemes[layer].needs_data
        return self.checkpoint.restore(layer).input_scale if own else self.scales.get(layer)


def try_scales(
    source: Source,
    checkpoint: QuantizedCheckpoint,
    plain: Mapping[str, Tensor],
    samples: Samples,
    folder: Path,
    budget: int,
    device: torch.device,
) -> Verdict:
    """Measure a compressed checkpoint with its own input scales and with those of `plain` (layer -> ``[1, 1]``).

    `source` is the original, in any type. Hidden states beyond `budget` bytes are kept in `folder`.
    """
    assert plain
    measure = partial(_divergences, source, checkpoint, plain, folder=folder, budget=budget, device=device)
    count = max(LEAST, -(-len(samples) // FIRST))
    # Otherwise a process would have nothing left for the second look.
    if parallel.total_count(int(len(samples) <= count)):
        return _verdict(measure(samples), 1.0)
    first = measure(samples[:count])
    found = _verdict(first, parallel.total_count(count) / parallel.total_count(len(samples)))
    return _verdict(first + measure(samples[count:]), 1.0) if found.accepted else found


def _verdict(sums: Tensor, seen: float) -> Verdict:
    searched, plain, tokens = sums.tolist()
    return Verdict(searched / tokens, plain / tokens, seen)


def _divergences(
    source: Source,
    checkpoint: QuantizedCheckpoint,
    plain: Mapping[str, Tensor],
    samples: Samples,
    *,
    folder: Path,
    budget: int,
    device: torch.device,
) -> Tensor:
    """Return, over the tokens of all processes, the sums of both divergences, and the number of tokens."""
    config = deepcopy(source.config)
    config.dtype = checkpoint.dtype
    original = replace(source, given=config, outline=Outline(source.structure, source.targets))
    compressed = replace(original, checkpoint=checkpoint)
    streams = {
        name: BlockStream(opened, samples, ActivationStore(folder / name, budget // 3), device)
        for name, opened in (("original", original), ("plain", compressed), ("searched", compressed))
    }
    for name in ("original", "plain"):
        streams[name].prepare(0)
    streams["searched"].share(streams["plain"])
    layers: dict[int | None, list[str]] = defaultdict(list)
    for layer in checkpoint.schemes:
        layers[_block_of(source, layer)].append(layer)
    given = {
        "plain": _Compressed(checkpoint, layers, plain),
        "searched": _Compressed(checkpoint, layers, {}),
    }
    first = min(index for index in map(partial(_block_of, source), plain) if index is not None)
    for index in range(len(source.structure.blocks)):
        if index == first:
            streams["searched"].store.copy(streams["plain"].store, index, len(samples))
        for name, stream in streams.items():
            if index >= first or name != "searched":
                _through(stream, index, given.get(name))
                stream.store.forget(index)
        trim()
    return _compare(streams, given["searched"])


def _block_of(source: Source, layer: str) -> int | None:
    return source.structure.block_of(source.targets[f"{layer}.weight"].parameter)


def _through(stream: BlockStream, index: int, compressed: _Compressed | None) -> None:
    """Run every sample through a block and its streamed experts, inputs rounded, and store the outputs."""
    with stream.resident(index):
        with _rounded(compressed, index, partial(_linear_of, stream.source), stream.device):
            stream.run(index, {}, keep=True)
        for experts in stream.experts.values():
            for tensors in experts.tensors:
                runner = ExpertRunner(experts, tensors.index)
                inside = {name.removesuffix(".weight"): tensors.module(name) for name in tensors.names}
                linears = {layer: runner.submodule(path) for layer, path in inside.items()}
                with _rounded(compressed, index, linears.get, stream.device):
                    runner.run({}, keep=True)
        stream.finish(index)


def _linear_of(source: Source, layer: str) -> nn.Module | None:
    """Return the module that a layer is; None for an expert of a fused stack."""
    target = source.targets[f"{layer}.weight"]
    return None if target.pattern else source.model.get_submodule(target.parameter.rpartition(".")[0])


@contextmanager
def _rounded(
    compressed: _Compressed | None,
    index: int | None,
    linear_of: Callable[[str], nn.Module | None],
    device: torch.device,
) -> Iterator[None]:
    """Let the quantized linears of one block, or of what lies outside, see their inputs as an engine would."""
    rounding = _Rounding()
    with ExitStack() as stack:
        for layer in compressed.layers.get(index, ()) if compressed is not None else ():
            assert compressed is not None
            quant, module = compressed.checkpoint.schemes[layer].input, linear_of(layer)
            if quant is not None and isinstance(module, nn.Linear):
                scale = compressed.input_scale(layer)
                placed = None if scale is None else scale.to(device).reshape(1, 1)
                stack.callback(rounding.attach(module, quant, placed).remove)
        yield


class _Rounding:
    """Rounds inputs; what several linears read with one scale is rounded once."""

    def __init__(self) -> None:
        self.seen: tuple[Tensor, Quant, float | None] | None = None
        self.rounded = torch.empty(0)

    def attach(self, module: nn.Module, quant: Quant, scale: Tensor | None) -> Any:
        """Round a linear's inputs from now on; returns the handle that ends it."""
        value = None if scale is None else float(scale)

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen = self.seen
            if seen is None or seen[0] is not args[0] or seen[1:] != (quant, value):
                self.seen = (args[0], quant, value)
                self.rounded = fake_quantize(args[0], quant, scale)
            return (self.rounded, *args[1:])

        return module.register_forward_pre_hook(hook)


def _compare(streams: Mapping[str, BlockStream], compressed: _Compressed) -> Tensor:
    """Return the summed divergences of the two compressed streams and the tokens, those of all processes."""
    plain = streams["plain"]
    last = len(plain.blocks)
    sums = torch.zeros(3, dtype=torch.float64, device=plain.device)
    outside = partial(_linear_of, plain.source)
    with streams["original"].tail() as exact, plain.tail() as found, ExitStack() as stack:
        stack.enter_context(_rounded(compressed, None, outside, plain.device))
        for sample in range(len(plain.samples)):
            wanted = exact(sample, streams["original"].store.get(last, sample)).log_softmax(-1)
            for place, name in enumerate(("searched", "plain")):
                given = found(sample, streams[name].store.get(last, sample)).log_softmax(-1)
                sums[place] += (wanted.exp() * (wanted - given)).sum(dtype=torch.float64)
            sums[2] += wanted[..., 0].numel()
    return parallel.total(sums)
