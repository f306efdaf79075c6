"""Layer 6: what a job will do and what it will cost, before it starts: ``angelslim plan`` prints it.

Sizes follow from shapes; the time from half a second of measuring this machine. Nothing is written.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .base.errors import ResourceError
from .job import Job, Unit
from .models.experts import streamable
from .models.families import shipped
from .models.loading import Source, raw_config
from .models.outline import file_of
from .models.outside import before_blocks_bytes
from .models.select import Layer, groups_by_linear
from .models.structure import Group
from .numerics.error import error_of
from .numerics.quantize import quantize, scale_type, tile_of
from .numerics.scales import SCALE_BITS
from .report.words import megabytes

LIBRARIES = 520 * 2**20  # resident bytes of torch and transformers, with the network, before any work
WITHOUT_NETWORK = 275 * 2**20  # the same where the structure is remembered and nothing runs
COMPILED = (
    110 * 2**20
)  # what oneDNN keeps for experts, whose numbers of tokens are ever new ones (`base.memory`)
FLOAT32_COPIES = 5  # a layer being rounded: itself, its scale, the quotient, the restored weight, the error


@dataclass(frozen=True)
class Plan:
    """What a job will do and what it will cost. Bytes, seconds; estimates are marked so where printed."""

    model: str
    model_type: str
    method: str
    scheme: str
    format: str
    parameters: int
    layers: dict[str, int]  # role ("mlp.down_proj") -> how many are quantized
    skipped: dict[str, str]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    peak_memory: int
    disk: int
    seconds: float
    samples: int
    max_length: int
    files: int
    warnings: list[str]

    def to_json(self) -> str:
        """Serialise for programs."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def estimate(job: Job) -> Plan:
    """Predict the job's cost from shapes and a measurement of this machine of about half a second."""
    weights = {layer.tensor: layer for layer in job.selection.layers}
    stored, kept = _written_bytes(job)
    count = sum(layer.shape[0] * layer.shape[1] for layer in weights.values())
    tokens = job.config.dataset.num_samples * job.config.dataset.max_seq_length if job.calibrates else 0
    return Plan(
        model=job.source.name,
        model_type=job.source.structure.model_type,
        method=job.name,
        scheme=job.rounds_to,
        format=job.written_as,
        parameters=job.source.checkpoint.parameters,
        layers=dict(Counter(_role(layer, job.source) for layer in weights.values())),
        skipped=job.selection.skipped,
        bits_per_weight=8 * stored / count if count else 8.0 * job.source.dtype.itemsize,
        bytes_before=job.source.checkpoint.nbytes,
        bytes_after=stored + kept,
        peak_memory=peak_memory(job),
        disk=disk_needed(job, stored + kept),
        seconds=_seconds(job, count, tokens),
        samples=job.config.dataset.num_samples if job.calibrates else 0,
        max_length=job.config.dataset.max_seq_length if job.calibrates else 0,
        files=max(1, -(-(stored + kept) // job.config.global_.max_shard_size)),
        warnings=job.resolved.warnings,
    )


def _role(layer: Layer, source: Source) -> str:
    if layer.block is None:
        return layer.name
    return ".".join(
        part for part in layer.name.split(f".{layer.block}.", 1)[-1].split(".") if not part.isdigit()
    )


def _stored_bytes(layer: Layer, dtype: torch.dtype) -> int:
    quant = layer.scheme.weight
    rows, columns = tile_of(quant.granularity, layer.shape)
    tiles = -(-layer.shape[0] // rows) * -(-layer.shape[1] // columns)
    scale_bytes = 2 if quant.scale == "float16" else scale_type(quant, dtype).itemsize
    scale_bytes = SCALE_BITS.get(quant.scale, 8 * scale_bytes) // 8
    zero_bits = 0 if quant.symmetric else quant.format.bits
    return (
        layer.shape[0] * layer.shape[1] * quant.format.bits // 8
        + tiles * scale_bytes
        + tiles * zero_bits // 8
    )


def activation_bytes(job: Job) -> int:
    """Bytes of one generation of hidden states, those of the original model too where the method follows it."""
    if not job.calibrates:
        return 0
    hidden: int = job.source.config.get_text_config().hidden_size
    data = job.config.dataset
    streams = 2 if job.follows_original else 1
    return streams * data.num_samples * data.max_seq_length * hidden * job.source.dtype.itemsize


def peak_memory(job: Job) -> int:
    """Resident bytes at the worst unit: its tensors, its result, and what working on its largest piece takes.

    Pieces are the block and each streamed expert, one at a time. While calibrating, the embedding is resident once,
    before the first block, and the activations always; streamed experts keep what they were asked and what they
    answer beside them.
    """
    worst = max(_unit_memory(job, unit) for unit in job.units)
    activations = min(activation_bytes(job), job.config.global_.activation_budget)
    mixture = any(job.calibrates and streamable(job.source, block) for block in job.source.structure.blocks)
    libraries = LIBRARIES if job.calibrates or job.rewrites or not _remembers(job) else WITHOUT_NETWORK
    compiled = COMPILED if job.device.type == "cpu" else 0
    return libraries + worst + activations + (2 * activation_bytes(job) + compiled if mixture else 0)


def _remembers(job: Job) -> bool:
    """Say whether the structure is known without the network, under the names that the result is opened by at the end."""
    if shipped(raw_config(job.source.folder), job.source.checkpoint) is not None:
        return True
    file = file_of(job.source.config, job.source.checkpoint)
    return file is not None and file.is_file()


def _unit_memory(job: Job, unit: Unit) -> int:
    tensors = job.source.checkpoint.tensors
    layers = [layer for layer in job.selection.layers if layer.tensor in set(unit.tensors)]
    chosen = {layer.tensor for layer in layers}
    kept = sum(tensors[name].nbytes for name in unit.tensors if name not in chosen)
    result = kept + sum(_stored_bytes(layer, tensors[layer.tensor].dtype) for layer in layers)
    if unit.block is None and job.calibrates:
        towers = [layer for layer in layers if layer.module and job.source.structure.tower_of(layer.module)]
        groups = {str(layer.module): Group(None, (str(layer.module),)) for layer in towers}
        awake = before_blocks_bytes(job.source) if towers and job.config.dataset.name != "TextDataset" else 0
        return result + awake + _piece_memory(job, layers, groups if awake else {})
    if unit.block is None or not job.calibrates:
        return result + _piece_memory(job, layers, {})
    block = job.source.structure.blocks[unit.block]
    experts = [one for each in streamable(job.source, block).values() for one in each]
    apart = {name for expert in experts for name in expert.names}
    own = [layer for layer in layers if layer.tensor not in apart]
    worst = streamed = 0
    for expert in experts[:1]:  # they are all alike
        placed = [replace(x, module=expert.module(x.tensor)) for x in layers if x.tensor in expert.names]
        streamed = sum(tensors[name].nbytes for name in expert.names)
        worst = streamed + _piece_memory(job, placed, expert.groups)
    dense = sum(tensors[layer.tensor].nbytes for layer in own)
    return result + dense + max(_piece_memory(job, own, groups_by_linear(job.source)), worst)


def _piece_memory(job: Job, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
    """Bytes for rounding the largest of these layers, and what the job's steps hold for all of them."""
    largest = max((layer.shape[0] * layer.shape[1] for layer in layers), default=0)
    steps = (*job.transforms, job.method) if groups else ()
    own = sum(step.working_memory(layers, groups) for step in steps)
    return FLOAT32_COPIES * 4 * largest + own


def disk_needed(job: Job, output: int) -> int:
    """Bytes written at the worst moment: units and the shard being joined, plus two generations of activations."""
    shard = min(output, job.config.global_.max_shard_size)
    return output + shard + 2 * activation_bytes(job)


def check_disk(job: Job, out: Path) -> None:
    """Refuse a run that would fill the disk."""
    folder = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    needed = disk_needed(job, sum(_written_bytes(job))) + 64 * 2**20
    if needed > free:
        raise ResourceError(
            f"The run needs {megabytes(needed)} on the disk of {folder}, and {megabytes(free)} are free.",
            fix="Choose another --out, or use fewer or shorter calibration samples.",
        )


def _written_bytes(job: Job) -> tuple[int, int]:
    """Bytes of the output's quantized layers, and of what is carried over."""
    tensors = job.source.checkpoint.tensors
    weights = {layer.tensor: layer for layer in job.selection.layers}
    stored = sum(_stored_bytes(layer, tensors[layer.tensor].dtype) for layer in weights.values())
    return stored, sum(info.nbytes for name, info in tensors.items() if name not in weights)


def _seconds(job: Job, weights: int, tokens: int) -> float:
    """Time a small product and a small rounding on this device, and scale."""
    side = 1024
    matrix = torch.randn(side, side, device=job.device, dtype=job.source.dtype)
    quant = job.scheme.weight
    rates = []
    for work in (lambda: matrix @ matrix, lambda: error_of(matrix, quantize(matrix, quant).dequantize())):
        work()
        start = time.perf_counter()
        for _ in range(3):
            work()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append((time.perf_counter() - start) / 3)
    product, rounding = rates
    forward = 2 * weights * tokens / (2 * side**3) * product
    return 5 + forward + 4 * weights / side**2 * rounding + job.source.checkpoint.nbytes / 400e6
