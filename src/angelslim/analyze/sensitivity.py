"""What rounding each layer alone would do, before anything is compressed: which layers a recipe should spare.

The blocks are walked once, in float32, with the original's activations. In each block every layer is rounded to
nearest by itself (see `rounding`) and the samples run through the block again; the *block error* is the norm of the
change of the block's output over the norm of the output. That costs one pass over the model for each layer of a block
and the memory of one whole block, experts included. With `kl` the effect on the model's answers is measured too (see
`logits`).

Methods that make up for their rounding lower what is found here, and transforms of the recipe are not applied: the
ranking is that of the plain scheme. The suggestion takes what hurts most for each weight that it keeps, in whole
groups, since engines want q, k and v, gate and up, and all experts of a layer alike.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..base.console import bar
from ..base.errors import ConfigError
from ..base.memory import trim
from ..job import Job
from ..models.activations import ActivationStore
from ..models.loading import Source
from ..models.overrides import fused_with
from ..models.walk import BlockStream
from ..report.findings import LayerSensitivity, Sensitivity
from ..work import calibration_samples
from .logits import divergences
from .rounding import InputRanges, Unit, computing_with, precise, rounded, units

KEEP = 3  # groups that a suggestion spares
KL_SAMPLES = 8


@dataclass
class Measured:
    """What the walk over the blocks found for one unit."""

    sqnr_db: float
    block_error: float
    bits_per_weight: float


def sensitivity(
    job: Job, *, recipe: str, kl: bool = False, kl_samples: int = KL_SAMPLES, keep: int = KEEP
) -> Sensitivity:
    """Measure every layer in the decoder blocks that a job would round; the most sensitive come first.

    `keep` is how many groups of layers the suggestion spares. Layers outside the blocks are left out.
    """
    found = units([layer for layer in job.selection.layers if layer.block is not None])
    if not found:
        raise ConfigError("The recipe rounds no layer of the decoder blocks.", fix="Shorten ignore_layers.")
    samples = calibration_samples(job)
    source, ranges = precise(job.source), InputRanges(job.stage.options)
    measured = _walk(job, source, found, samples, ranges)
    chosen = samples[:kl_samples]
    scores, together = ({}, None) if not kl else divergences(source, found, chosen, ranges, job.device)
    layers = [
        LayerSensitivity(
            name=unit.name,
            block=unit.block,
            role=unit.role,
            scheme=str(unit.scheme),
            weights=unit.weights,
            members=tuple(layer.name for layer in unit.layers),
            sqnr_db=measured[unit.name].sqnr_db,
            block_error=measured[unit.name].block_error,
            kl=scores[unit.name][0] if kl else None,
            kl_stderr=scores[unit.name][1] if kl else None,
            note=unit.note,
        )
        for unit in found
    ]
    result = Sensitivity(
        model=job.source.name,
        recipe=recipe,
        scheme=str(job.scheme),
        samples=len(samples),
        tokens=sum(sample["input_ids"].numel() for sample in samples),
        layers=sorted(layers, key=lambda layer: (-harm(layer), layer.name)),
        together=together,
        kl_samples=len(chosen) if kl else 0,
    )
    bits = {unit.name: measured[unit.name].bits_per_weight for unit in found}
    return _with_suggestion(result, found, bits, job, keep)


def harm(layer: LayerSensitivity) -> float:
    """Return what layers are ranked by, and what adds up over layers: the KL if known, else the squared error."""
    return layer.block_error**2 if layer.kl is None else layer.kl


def _walk(
    job: Job,
    source: Source,
    found: Sequence[Unit],
    samples: Sequence[Mapping[str, Tensor]],
    ranges: InputRanges,
) -> dict[str, Measured]:
    """Walk the blocks with the original's activations and round each unit by itself."""
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="angelslim-") as folder, bar("blocks", len(found)) as progress:
        store = ActivationStore(Path(folder), job.config.global_.activation_budget)
        stream = BlockStream(source, samples, store, job.device)
        stream.prepare(0)
        for index, path in enumerate(stream.blocks):
            inside = [unit for unit in found if unit.block == index]
            source.materialize(path, job.device)
            try:
                stream.run(index, ranges.watch([x for unit in inside for x in unit.layers]), keep=False)
                exact = _outputs(stream, index)
                norm = math.sqrt(sum(_square(output) for output in exact))
                for unit in inside:
                    new = rounded(source, unit, job.device)
                    with computing_with(source, unit, new.weights, ranges, job.device):
                        change = sum(
                            _square(now - then)
                            for now, then in zip(_outputs(stream, index), exact, strict=True)
                        )
                    error = math.sqrt(change) / max(norm, 1e-300)
                    measured[unit.name] = Measured(new.sqnr_db, error, new.bits_per_weight)
                    progress.advance()
                stream.run(index, {}, keep=True)
            finally:
                source.free(path)
            store.forget(index)
            trim()
    return measured


def _outputs(stream: BlockStream, index: int) -> list[Tensor]:
    """Return the outputs of the resident block for every sample, in host memory."""
    with torch.no_grad():
        return [stream.forward(index, [sample]).cpu() for sample in range(len(stream.samples))]


def _square(values: Tensor) -> float:
    return values.float().square().sum(dtype=torch.float64).item()


def _with_suggestion(
    result: Sensitivity, found: Sequence[Unit], bits: Mapping[str, float], job: Job, keep: int
) -> Sensitivity:
    """Add the groups that hurt most, as entries of ignore_layers, and what keeping them costs."""
    groups: dict[object, list[Unit]] = {}
    joined = fused_with(job.source.structure)
    for unit in found:
        groups.setdefault(_entry(unit, joined), []).append(unit)
    scores = {layer.name: harm(layer) for layer in result.layers}

    def worth(key: object) -> float:
        """What a group hurts for each weight that would have to be kept."""
        return sum(scores[unit.name] for unit in groups[key]) / sum(unit.weights for unit in groups[key])

    ranked = sorted(groups, key=worth, reverse=True)
    spared = [unit for key in ranked[:keep] for unit in groups[key]]
    entries = [
        name
        for unit in spared
        for name in ([str(_entry(unit, {}))] if unit.experts else [layer.name for layer in unit.layers])
    ]
    full = 8.0 * job.source.dtype.itemsize
    names = {unit.name for unit in spared}
    total = sum(unit.weights for unit in found)
    before = sum(bits[unit.name] * unit.weights for unit in found) / total
    after = sum((full if u.name in names else bits[u.name]) * u.weights for u in found) / total
    return replace(
        result,
        suggestion=list(dict.fromkeys([*job.stage.ignore, *entries])),
        kept=[unit.name for unit in spared],
        bits=(before, after),
    )


def _entry(unit: Unit, joined: Mapping[str, object]) -> object:
    """Return what stands for all that engines want alike: the linears joined with a unit, the experts of its layer."""
    first = unit.layers[0]
    if unit.experts:
        return first.name.partition(".experts.")[0] + ".experts"
    return joined.get(first.module or first.name, first.name)
