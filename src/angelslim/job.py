"""Layer 5: from a resolved configuration and a model to a job whose every choice is made.

`prepare` opens the model, asks the method and the format whether they can do what the recipe says, and selects
the layers: everything that can be refused is refused here, before any work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .base import parallel
from .base.console import chose, log
from .base.errors import ConfigError, DataError, ModelError, ResourceError, SchemeError
from .base.memory import keep_few_kernels, return_large_blocks
from .config.quantization import Quantization
from .config.recipe import Resolved
from .config.schema import Config
from .config.upstream import Stage, stages
from .data import builtin
from .export._checkpoint import QuantizedCheckpoint, open_any
from .export._dense import FORMAT as DENSE
from .export.base import Exporter, choose
from .methods.base import PTQ, REWRITES, TRANSFORMS, Blockwise
from .methods.ptq._untouched import Untouched
from .models.experts import streamable
from .models.loading import Source
from .models.select import Choice, Layer, Selection, kept_stacks, select
from .models.stacks import unstacked
from .numerics.scheme import FORMATS, PER_CHANNEL, Quant, Scheme

KEPT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")  # copied beside the weights
# Switches that choose layers and formats, not algorithms.
READ_HERE = frozenset(
    {"quant_vit", "quantize_embeddings", "save_name", "quant_analyse", "share_gate_up_weight_scale_2"}
)
FULL_PRECISION = "full precision"
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
    stage: Stage  # the rounding
    scheme: Scheme
    rewrites: tuple[str, ...]  # changes of the whole checkpoint that `source` already has
    transforms: tuple[Blockwise, ...]  # run in each block before the method
    method: Blockwise
    selection: Selection
    format: str
    exporter: Exporter
    device: torch.device
    units: tuple[Unit, ...]
    shown: tuple[Layer, ...] = ()  # layers that transforms see where nothing is rounded

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that steps work on: those that are rounded, or else those that transforms see."""
        return self.selection.layers or self.shown

    @property
    def rounds_to(self) -> str:
        """The scheme of most layers in words."""
        return str(self.scheme) if self.selection.layers else FULL_PRECISION

    @property
    def written_as(self) -> str:
        """The format in words."""
        return self.exporter.describe(self.scheme) if self.selection.layers else FULL_PRECISION

    @property
    def calibrates(self) -> bool:
        """Whether the model has to run."""
        return _calibrates(self.stage, (*self.transforms, self.method))

    @property
    def follows_original(self) -> bool:
        """Whether the original model's activations travel beside."""
        return any(step.follows_original for step in (*self.transforms, self.method))

    @property
    def name(self) -> str:
        """What the report calls the run: the recipe, else the method by its public name if the file gives one."""
        if self.resolved.recipe:
            return self.resolved.recipe
        compression = next(iter(self.config.compression), None)
        quantization = None if compression is None or compression.blockwise else compression.quantization
        named = quantization.name if quantization else None
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
            self.device.type,
            parallel.world(),  # sums are rounded in another order
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def prepare(resolved: Resolved, model: str | Path | None = None) -> Job:
    """Make every choice of a run; refuse what cannot be done."""
    return_large_blocks()
    keep_few_kernels()
    parallel.start()
    config = resolved.config
    if not isinstance(config, Config):
        raise ConfigError(
            "Token pruning and the flat collection scripts are understood but not built yet.",
            fix="`angelslim ls` shows what runs today.",
        )
    work = stages(config)
    transforms = [each for each in work if each.kind == "transform" and each.method in TRANSFORMS]
    rewrites = [each for each in work if each.kind == "transform" and each.method in REWRITES]
    stage = _rounding(work)
    rounds = stage.kind == "ptq"
    reference = model or config.model.model_path
    if not reference:
        raise ConfigError("No model is named.", fix="Give a folder or 'tiny-lm', or set model.model_path.")
    assert stage.scheme is not None
    method = PTQ.get(stage.method)(stage.options) if rounds else Untouched()
    _report_unused(resolved, stage, method.reads)
    steps = tuple(TRANSFORMS.get(each.method)(each.options) for each in transforms)
    sections = (each.quantization for each in config.compression if each.quantization)
    quantization = next(sections, None) or Quantization()
    _check_inputs(config)
    choice = _choice(stage, quantization)
    source = _with_experts(_open(reference, config), stage.scheme, choice)
    for each in rewrites:
        source = REWRITES.get(each.method)(each.options).rewrite(source)
    selection = select(source, stage.scheme, choice)
    if not selection.layers:
        raise ConfigError("No layer is left to quantize.", fix="Shorten ignore_layers.")
    shown = () if rounds else selection.layers
    if rounds:
        _check_static(source, selection, config.dataset.name)
        format_name, exporter, selection = _formatted(selection, quantization.format)
    else:
        format_name, exporter = "dense", DENSE
        selection = Selection((), selection.skipped | dict.fromkeys((x.name for x in shown), "not asked for"))
    return Job(
        resolved=resolved,
        config=config,
        source=source,
        stage=stage,
        scheme=stage.scheme,
        rewrites=tuple(each.method for each in rewrites),
        transforms=steps,
        method=method,
        selection=selection,
        format=format_name,
        exporter=exporter,
        device=device_of(config.global_.device),
        units=units_of(source),
        shown=shown,
    )


def _choice(stage: Stage, quantization: Quantization) -> Choice:
    """Return which layers the recipe asks for."""
    return Choice(
        ignore=stage.ignore,
        overrides=stage.overrides,
        head=quantization.quantize_lm_head,
        embeddings=quantization.quantize_embeddings,
        towers=frozenset(("vision", "projector", "audio") if quantization.quant_vit else ()),
    )


def _with_experts(source: Source, scheme: Scheme, choice: Choice) -> Source:
    """Return the model with stacked experts as single matrices, but for stacks of which nothing is quantized."""
    single = unstacked(source)
    kept = kept_stacks(single, scheme, choice)
    return unstacked(source, kept) if kept else single


def _formatted(selection: Selection, wanted: str) -> tuple[str, Exporter, Selection]:
    """Return the format to write, and the layers with scales as it keeps them."""
    schemes = {layer.name: layer.scheme for layer in selection.layers}
    shapes = {layer.name: layer.shape for layer in selection.layers}
    name, exporter = choose(schemes, wanted, shapes)
    layers = (replace(layer, scheme=exporter.stored(layer.scheme)) for layer in selection.layers)
    return name, exporter, replace(selection, layers=tuple(layers))


def _rounding(work: Sequence[Stage]) -> Stage:
    """Return the one stage that rounds, after refusing what is not built."""
    for stage in work:
        known = stage.method in PTQ if stage.kind == "ptq" else stage.method in {*TRANSFORMS, *REWRITES}
        if stage.kind not in ("ptq", "transform") or not known or (stage.kind == "ptq" and not stage.scheme):
            raise ConfigError(
                f"Understood, but not built yet: {stage.kind} method {stage.method!r}.",
                fix=f"Built methods: {', '.join(PTQ)}; `angelslim ls` lists the recipes that run.",
            )
    rounding = [stage for stage in work if stage.kind == "ptq"]
    if not rounding and work:
        return _alone(work)
    if len(rounding) != 1:
        asked = f"asks for {len(rounding)} quantizations of the same weights"
        what = asked if rounding else "names no quantization"
        raise ConfigError(f"The recipe {what}.", fix="Name exactly one.")
    return rounding[0]


def _alone(work: Sequence[Stage]) -> Stage:
    """Return a stage that rounds nothing, for a run that only transforms.

    Transforms are shown every layer of the blocks, with a scheme that fits all of them and decides nothing.
    """
    name = "+".join(dict.fromkeys(stage.method for stage in work))
    return Stage("transform", name, Scheme(Quant(FORMATS["int8"], PER_CHANNEL)), {}, work[-1].ignore)


def _calibrates(stage: Stage, steps: Sequence[Blockwise]) -> bool:
    """Say whether the model has to run: for the scheme of most layers, or for static inputs of an override."""
    assert stage.scheme is not None
    static = any(scheme is not None and scheme.needs_data for _, scheme in stage.overrides)
    return static or any(step.needs_data(stage.scheme) for step in steps)


def _open(reference: str | Path, config: Config) -> Source:
    """Open the model; one that was published in FP8 is decoded as it is read."""
    source = open_any(reference, trust_remote_code=config.model.trust_remote_code)
    checkpoint = source.checkpoint
    if isinstance(checkpoint, QuantizedCheckpoint):
        kinds = {scheme.weight.format for scheme in checkpoint.schemes.values()}
        if any(kind.kind == "int" or kind.bits < 8 for kind in kinds):
            raise ModelError(
                f"{source.folder} is already quantized ({checkpoint.exporter.method}).",
                fix="Start from the full-precision model instead.",
            )
        chose(f"decoding {checkpoint.exporter.method} as it is read", "the model was published in FP8")
    source.check()
    _check_dtype(config, source)
    return source


def _check_inputs(config: Config) -> None:
    """Refuse measurements that would fail only after hours of work."""
    settings = config.evaluation
    if settings.enabled:
        for task in settings.tasks:
            builtin.examples(task, "evaluation", 1)
        if isinstance(settings.perplexity, str) and not Path(settings.perplexity).is_file():
            raise DataError(
                f"There is no text file {settings.perplexity!r} to measure perplexity on.",
                fix="Check evaluation.perplexity.",
            )


def _check_static(source: Source, selection: Selection, data: str) -> None:
    """Refuse static activation scales where the calibration, with that kind of data, has no input to look at."""
    static = [layer for layer in selection.layers if layer.scheme.needs_data]
    if not static:  # what follows takes the network, which a run without data can do without
        return
    towers = [layer for layer in static if layer.module and source.structure.tower_of(layer.module)]
    if towers and data == "TextDataset":
        raise SchemeError(
            f"{towers[0].name!r} lies in a tower: texts give it no input to choose a static activation scale from.",
            fix="Use dataset.name: MultiModalDataset or AudioDataset, a dynamic scheme, or quant_vit: false.",
        )
    outside = [layer.name for layer in static if layer.block is None and layer not in towers]
    if outside:
        raise SchemeError(
            f"{outside[0]!r} lies outside the blocks and cannot get a static activation scale.",
            fix="Leave the head in full precision, or use a dynamic scheme.",
        )
    streamed = {
        tensor
        for block in source.structure.blocks
        for experts in streamable(source, block).values()
        for expert in experts
        for tensor in expert.names
    }
    experts = [layer.name for layer in static if layer.module is None and layer.tensor not in streamed]
    if experts:
        raise SchemeError(
            f"Static activation scales for stacked experts of this layout are not built ({experts[0]} and "
            f"{len(experts) - 1} more).",
            fix="Use a scheme with dynamic activations, or add 'experts' to ignore_layers.",
        )


def _report_unused(resolved: Resolved, stage: Stage, reads: frozenset[str]) -> None:
    """Warn of switches without effect: a result that silently differs from its recipe would be a lie."""
    config = resolved.config
    trains = isinstance(config, Config) and any(each.blockwise for each in config.compression)
    section = "QAT" if trains else "quantization"
    for key, value in stage.options.items():
        text = f"{section}.{key} has no effect on {stage.method} here."
        if value and key not in reads | READ_HERE and text not in resolved.warnings:
            log.warning("%s", text)
            resolved.warnings.append(text)


def _check_dtype(config: Config, source: Source) -> None:
    wanted = str(config.model.torch_dtype)
    if wanted not in ("auto", str(source.dtype).removeprefix("torch."), "None"):
        raise ConfigError(
            f"model.torch_dtype is {wanted}, the checkpoint is {source.dtype}.",
            fix="Use auto; converting while compressing is not supported.",
        )


def device_of(wanted: str | None) -> torch.device:
    """Return the device that a recipe names, or the best one there is."""
    if wanted:
        try:
            device = torch.device(wanted)
        except RuntimeError as error:
            raise ConfigError(f"{wanted!r} is no device.", fix="Use cpu or cuda.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ResourceError(
                f"Device {wanted} is asked for, and no GPU is visible.", fix="Use device cpu."
            )
        each_its_own = device == torch.device("cuda") and parallel.world() > 1
        return torch.device("cuda", parallel.local_rank()) if each_its_own else device
    if torch.cuda.is_available():
        chose("device cuda", "a GPU is visible")
        return torch.device("cuda", parallel.local_rank()) if parallel.world() > 1 else torch.device("cuda")
    return torch.device("cpu")


def units_of(source: Source, outside_bytes: int = 256 * 2**20) -> tuple[Unit, ...]:
    """Return the pieces of the output: a block each, and what lies outside in portions."""
    blocks: dict[int, list[str]] = {}
    parts: dict[
        str, list[str]
    ] = {}  # what lies outside; linears of one block of a tower are rounded together
    for tensor in source.checkpoint.tensors:
        target = source.targets.get(tensor)
        block = source.structure.block_of(target.parameter) if target else None
        if block is not None:
            blocks.setdefault(block, []).append(tensor)
        else:
            part = _part_of(target.parameter) if target else ""
            parts.setdefault(part or tensor, []).append(tensor)
    outside: list[list[str]] = [[]]
    filled = 0
    for names in parts.values():
        size = sum(source.checkpoint.tensors[name].nbytes for name in names)
        if outside[-1] and filled + size > outside_bytes:
            outside.append([])
            filled = 0
        outside[-1] += names
        filled += size
    units = [Unit(f"block-{index:05d}", index, tuple(names)) for index, names in sorted(blocks.items())]
    units += [Unit(f"outside-{i:05d}", None, tuple(names)) for i, names in enumerate(outside) if names]
    return tuple(units)


def _part_of(parameter: str) -> str:
    """Return a path up to its last number, such as a block of a tower; empty without one.

    >>> _part_of("visual.blocks.3.attn.qkv.weight")
    'visual.blocks.3'
    """
    parts = parameter.split(".")
    return ".".join(
        parts[: max((place + 1 for place, part in enumerate(parts) if part.isdigit()), default=0)]
    )
