"""Layer 5: from a resolved configuration and a model to a job whose every choice is made.

`prepare` opens the model, asks the method and the format whether they can do what the recipe says, and selects
the layers: everything that can be refused is refused here, before any work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .base.console import chose, log
from .base.errors import ConfigError, DataError, ResourceError, SchemeError
from .base.memory import return_large_blocks
from .config.recipe import Resolved
from .config.schema import Config
from .config.upstream import Stage, stages
from .data import builtin
from .export.base import Exporter, choose
from .methods.base import PTQ, Blockwise
from .models.loading import Source, open_model
from .models.select import Choice, Selection, select
from .numerics.scheme import Scheme

KEPT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")  # copied beside the weights
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
    return_large_blocks()
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
