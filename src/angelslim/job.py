"""Layer 5: from a resolved configuration and a model to a job whose every choice is made, and its cost.

`prepare` opens the model, asks the method and the format whether they can do what the recipe says, and selects
the layers: everything that can be refused is refused here, before any work. `estimate` then says what the job
will do and cost; ``angelslim plan`` prints it and starts nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .base.console import chose, log
from .base.errors import ConfigError, DataError, ResourceError, SchemeError
from .config.recipe import Resolved
from .config.schema import Config
from .config.upstream import Stage, stages
from .data import builtin
from .export.base import Exporter, choose
from .methods.base import PTQ, Blockwise
from .models.loading import Source, open_model
from .models.select import Choice, Layer, Selection, select
from .numerics.error import error_of
from .numerics.quantize import quantize, tile_of
from .numerics.scheme import Scheme

KEPT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")  # copied beside the weights
LIBRARIES = 520 * 2**20  # resident bytes of torch and transformers before any work
FLOAT32_COPIES = 5  # a layer being rounded: itself, its scale, the quotient, the restored weight, the error
# Switches that choose layers and formats, not algorithms.
READ_HERE = frozenset({"quant_vit", "quantize_embeddings", "save_name"})
NEVER_COPIED = ("model.safetensors.index.json", "training.json", "run.json")


@dataclass(frozen=True)
class Unit:
    """A piece of the output that is written, and resumed, as a whole."""

    name: str
    block: int | None
    tensors: tuple[str, ...]  # checkpoint tensors that go into it


@dataclass
class Job:
    """One compression, decided down to the last layer; nothing has been written."""

    resolved: Resolved
    config: Config
    source: Source
    stage: Stage
    scheme: Scheme
    method: Blockwise
    selection: Selection
    format: str
    exporter: Exporter
    device: torch.device
    units: tuple[Unit, ...]

    @property
    def calibrates(self) -> bool:
        """Whether the model has to run."""
        return self.method.needs_data(self.scheme)

    @property
    def name(self) -> str:
        """What the report calls the method: the public name when the recipe has one."""
        compression = self.config.compression[0]
        named = compression.quantization.name if compression.quantization else None
        return named or self.stage.method

    def fingerprint(self) -> str:
        """Identify the output: equal fingerprints give equal weights."""
        left_out: Any = {"global_": {"save_path", "activation_budget"}, "evaluation": True}
        settings = self.config.model_dump(mode="json", exclude=left_out)
        files = {info.file for info in self.source.checkpoint.tensors.values()}
        files |= set(self.source.folder.glob("*.json"))
        data = Path(self.config.dataset.data_path or "").expanduser()
        files |= {data} if self.calibrates and data.is_file() else set()
        sizes = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        parts = [
            settings,
            sizes,
            str(self.source.folder.resolve()),
            __version__,
            torch.__version__,
            str(self.device),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def prepare(resolved: Resolved, model: str | Path | None = None) -> Job:
    """Make every choice of a run; refuse what cannot be done."""
    config = resolved.config
    if not isinstance(config, Config):
        raise ConfigError(
            "Token pruning and the flat collection scripts are understood but not built yet.",
            fix="`angelslim ls` shows what runs today.",
        )
    stage = _only_stage(stages(config))
    reference = model or config.model.model_path
    if not reference:
        raise ConfigError("No model is named.", fix="Give a folder or 'tiny-lm', or set model.model_path.")
    assert stage.scheme is not None
    method = PTQ.get(stage.method)(stage.options)
    _report_unused(resolved, stage, method)
    quantization = config.compression[0].quantization
    assert quantization is not None
    _check_inputs(config, method.needs_data(stage.scheme))
    source = open_model(reference, trust_remote_code=config.model.trust_remote_code)
    source.check()
    _check_dtype(config, source)
    choice = Choice(
        ignore=stage.ignore,
        head=quantization.quantize_lm_head,
        embeddings=quantization.quantize_embeddings,
        towers=frozenset(("vision", "projector", "audio") if quantization.quant_vit else ()),
    )
    selection = select(source, stage.scheme, choice)
    if not selection.layers:
        raise ConfigError("No layer is left to quantize.", fix="Shorten ignore_layers.")
    _check_static(selection)
    schemes = {layer.scheme for layer in selection.layers}
    format_name, exporter = choose(schemes, quantization.format)
    device = _device(config.global_.device)
    units = _units(source)
    return Job(
        resolved, config, source, stage, stage.scheme, method, selection, format_name, exporter, device, units
    )


def _only_stage(found: Sequence[Stage]) -> Stage:
    for stage in found:
        if stage.kind != "ptq" or stage.method not in PTQ or stage.scheme is None:
            raise ConfigError(
                f"Understood, but not built yet: {stage.kind} method {stage.method!r}.",
                fix=f"Built methods: {', '.join(PTQ)}; `angelslim ls` lists the recipes that run.",
            )
        if stage.scheme.kv is not None:
            raise ConfigError(
                "Understood, but not built yet: quantization of the KV cache.",
                fix="Remove quant_method.kv_cache.",
            )
    if len(found) != 1:
        what = (
            "names no compression"
            if not found
            else f"asks for {len(found)} quantizations of the same weights"
        )
        raise ConfigError(f"The recipe {what}.", fix="Name exactly one.")
    return found[0]


def _check_inputs(config: Config, calibrates: bool) -> None:
    """Refuse data and measurements that would fail only after hours of work."""
    if calibrates and config.dataset.name != "TextDataset":
        raise ConfigError(
            f"Understood, but not built yet: calibration with dataset.name {config.dataset.name!r}.",
            fix="Use TextDataset, which calibrates the language model on text.",
        )
    settings = config.evaluation
    if settings.enabled:
        for task in settings.tasks:
            builtin.examples(task, "evaluation", 1)
        if isinstance(settings.perplexity, str) and not Path(settings.perplexity).is_file():
            raise DataError(
                f"There is no text file {settings.perplexity!r} to measure perplexity on.",
                fix="Check evaluation.perplexity.",
            )


def _check_static(selection: Selection) -> None:
    """Refuse static activation scales where the calibration has no input to look at."""
    static = [layer for layer in selection.layers if layer.scheme.needs_data]
    outside = [layer.name for layer in static if layer.block is None]
    if outside:
        raise SchemeError(
            f"{outside[0]!r} lies outside the blocks and cannot get a static activation scale.",
            fix="Leave the head in full precision, or use a dynamic scheme.",
        )
    experts = [layer.name for layer in static if layer.module is None]
    if experts:
        raise SchemeError(
            f"Static activation scales for fused experts are not built yet ({experts[0]} and {len(experts) - 1} more).",
            fix="Use a scheme with dynamic activations, or add 'experts' to ignore_layers.",
        )


def _report_unused(resolved: Resolved, stage: Stage, method: Blockwise) -> None:
    """Warn of switches without effect: a result that silently differs from its recipe would be a lie."""
    for key, value in stage.options.items():
        text = f"quantization.{key} has no effect on {stage.method} here."
        if value and key not in method.reads | READ_HERE and text not in resolved.warnings:
            log.warning("%s", text)
            resolved.warnings.append(text)


def _check_dtype(config: Config, source: Source) -> None:
    wanted = str(config.model.torch_dtype)
    if wanted not in ("auto", str(source.dtype).removeprefix("torch."), "None"):
        raise ConfigError(
            f"model.torch_dtype is {wanted}, the checkpoint is {source.dtype}.",
            fix="Use auto; converting while compressing is not supported.",
        )


def _device(wanted: str | None) -> torch.device:
    if wanted:
        try:
            device = torch.device(wanted)
        except RuntimeError as error:
            raise ConfigError(f"global.device {wanted!r} is no device.", fix="Use cpu or cuda.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ResourceError("global.device asks for CUDA, and no GPU is visible.", fix="Use device cpu.")
        return device
    if torch.cuda.is_available():
        chose("device cuda", "a GPU is visible")
        return torch.device("cuda")
    return torch.device("cpu")


def _units(source: Source, outside_bytes: int = 256 * 2**20) -> tuple[Unit, ...]:
    blocks: dict[int, list[str]] = {}
    outside: list[list[str]] = [[]]
    filled = 0
    for tensor, info in source.checkpoint.tensors.items():
        target = source.targets.get(tensor)
        block = source.structure.block_of(target.parameter) if target else None
        if block is not None:
            blocks.setdefault(block, []).append(tensor)
            continue
        if outside[-1] and filled + info.nbytes > outside_bytes:
            outside.append([])
            filled = 0
        outside[-1].append(tensor)
        filled += info.nbytes
    units = [Unit(f"block-{index:05d}", index, tuple(names)) for index, names in sorted(blocks.items())]
    units += [Unit(f"outside-{i:05d}", None, tuple(names)) for i, names in enumerate(outside) if names]
    return tuple(units)


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
    tensors = job.source.checkpoint.tensors
    weights = {layer.tensor: layer for layer in job.selection.layers}
    stored, kept = _written_bytes(job)
    count = sum(layer.shape[0] * layer.shape[1] for layer in weights.values())
    tokens = job.config.dataset.num_samples * job.config.dataset.max_seq_length if job.calibrates else 0
    return Plan(
        model=job.source.name,
        model_type=job.source.structure.model_type,
        method=job.name,
        scheme=str(job.scheme),
        format=job.exporter.describe(job.scheme),
        parameters=sum(torch.Size(info.shape).numel() for info in tensors.values()),
        layers=dict(Counter(_role(layer, job.source) for layer in weights.values())),
        skipped=job.selection.skipped,
        bits_per_weight=8 * stored / count,
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
    scale_bytes = dtype.itemsize if quant.format.bits < 8 else 4
    zero_bits = 0 if quant.symmetric else quant.format.bits
    return (
        layer.shape[0] * layer.shape[1] * quant.format.bits // 8
        + tiles * scale_bytes
        + tiles * zero_bits // 8
    )


def activation_bytes(job: Job) -> int:
    """Bytes of one generation of hidden states."""
    hidden: int = job.source.config.get_text_config().hidden_size
    data = job.config.dataset
    return (
        data.num_samples * data.max_seq_length * hidden * job.source.dtype.itemsize if job.calibrates else 0
    )


def peak_memory(job: Job) -> int:
    """Resident bytes at the worst unit: its tensors, its result, and float32 copies of its largest layer.

    While calibrating, the embedding is resident once, before the first block, and the activations always.
    """
    tensors = job.source.checkpoint.tensors
    layers = {layer.tensor: layer for layer in job.selection.layers}
    worst = 0
    for unit in job.units:
        quantized = [layers[name] for name in unit.tensors if name in layers]
        kept = sum(tensors[name].nbytes for name in unit.tensors if name not in layers)
        result = kept + sum(_stored_bytes(layer, tensors[layer.tensor].dtype) for layer in quantized)
        source = sum(tensors[layer.tensor].nbytes for layer in quantized) if job.calibrates else 0
        largest = max((layer.shape[0] * layer.shape[1] for layer in quantized), default=0)
        worst = max(worst, source + result + FLOAT32_COPIES * 4 * largest)
    activations = min(activation_bytes(job), job.config.global_.activation_budget)
    return LIBRARIES + worst + activations


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
            f"The run needs {needed / 1e9:.1f} GB on the disk of {folder}, and {free / 1e9:.1f} GB are free.",
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
