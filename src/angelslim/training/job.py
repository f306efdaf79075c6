"""A training run with every choice made: quantizer, layers, loss, teacher, data, settings.

The sections ``QAT``, ``QAD`` and ``Distill`` of a recipe lead here. Like `job.prepare`, `prepare_training` refuses what
cannot be done before any work; nothing has been read but the model's headers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..base import console, parallel
from ..base.errors import ConfigError, DataError, did_you_mean
from ..config import quantizers
from ..config.recipe import Resolved
from ..config.schema import Compression, Config
from ..config.training import QAD, QAT, Distill, TrainerArguments
from ..config.upstream import Stage, stages
from ..export._checkpoint import open_any
from ..export.base import choose
from ..job import device_of
from ..methods.base import make_quantizer
from ..models.loading import Source
from ..models.select import Choice, Layer, select
from ..numerics.distillation import Distillation
from ..numerics.scheme import Quant, Scheme
from ..teacher.stored import read_manifest
from ..train import TrainSettings

Section = QAT | QAD | Distill
ALIASES = {"scale": "quant", "origin": "lm"}
EPOCHS = 1.0
RATE = 1e-4
STACKED = "experts of a fused stack are no linear layers; they stay as they are"
READ = frozenset(  # arguments of the training loop that have an effect here
    [
        "learning_rate",
        "lr_scheduler_type",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "bf16",
        "seed",
        "save_steps",
        "dataloader_num_workers",
        "report_to",
        "adam_beta1",
        "adam_beta2",
        "torch_compile",
        "fsdp",
        "deepspeed",
    ]
)
SILENT = frozenset(  # how others save, log and recompute; leaving them out changes no result
    [
        "save_strategy",
        "save_total_limit",
        "logging_steps",
        "logging_first_step",
        "logging_strategy",
        "logging_dir",
        "output_dir",
        "run_name",
        "gradient_checkpointing_kwargs",
        "do_train",
        "eval_strategy",
        "remove_unused_columns",
        "overwrite_output_dir",
    ]
)
SCHEDULES = {  # transformers' name -> ours, and the share of the steps in which the rate falls
    "cosine": ("cosine", 0.0),
    "linear": ("wsd", 1.0),
    "constant": ("constant", 0.0),
    "constant_with_warmup": ("constant", 0.0),
    "warmup_stable_decay": ("wsd", 0.2),
    "wsd": ("wsd", 0.2),
}


@dataclass(frozen=True)
class Lessons:
    """Whom the student learns from: `folder` of a model or of stored logits, or its own original."""

    loss: Distillation
    hidden_weight: float = 0.0
    folder: Path | str | None = None
    stored: bool = False
    own: bool = False


@dataclass
class TrainingJob:
    """One training, decided; nothing has been written."""

    resolved: Resolved
    config: Config
    source: Source
    name: str
    quantizer: str  # "" trains in full precision
    options: Mapping[str, Any]
    inputs: Quant | None  # how the inputs of quantized layers are rounded while training
    layers: tuple[Layer, ...]
    skipped: dict[str, str]
    trainable: str
    lessons: Lessons
    settings: TrainSettings  # steps 0: as many as `epochs` passes over the data take
    epochs: float
    warmup: float  # share of the steps, where `settings` counts none
    rows: int  # of a batch
    length: int
    fake: bool  # save quantized values in full precision
    format: str
    device: torch.device

    def fingerprint(self) -> str:
        """Identify the result: equal fingerprints give equal weights on one device."""
        settings = self.config.model_dump(mode="json", exclude={"global_": {"save_path"}, "evaluation": True})
        files = sorted({info.file for info in self.source.checkpoint.tensors.values()})
        data = Path(self.config.dataset.data_path or "").expanduser()
        files += [data] if data.is_file() else []
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        parts: list[Any] = [
            settings,
            stats,
            str(self.source.folder.resolve()),
            asdict(self.settings),
            __version__,
        ]
        parts += [torch.__version__, self.device.type, parallel.world()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _section(stage: Compression) -> Section | None:
    if stage.qat is None and stage.name == "QAT":
        return QAT()
    return stage.qat or stage.qad or stage.distill


def _stage(config: Config) -> Stage:
    found = next((each for each in stages(config) if each.kind in ("qat", "distill")), None)
    if found is None:
        raise ConfigError(
            f"compression.name is {config.compression[0].name}, which trains nothing.",
            fix="Set it to QAT, QAD or Distill.",
        )
    return found


def prepare_training(resolved: Resolved, model: str | Path | None = None) -> TrainingJob:
    """Make every choice of a training run; refuse what cannot be done."""
    parallel.start()
    config = resolved.config
    assert isinstance(config, Config)
    if len(config.compression) > 1:
        raise ConfigError(
            "Training joins no other stage in one recipe yet.", fix="Run the stages one after another."
        )
    compression = config.compression[0]
    section = _section(compression)
    assert section is not None
    assert compression.trains, "training block by block is a method of post-training quantization"
    stage = _stage(config)
    reference = model or config.model.model_path
    if not reference:
        raise ConfigError("No model is named.", fix="Give a folder or 'tiny-lm', or set model.model_path.")
    quantizer, options, inputs = _quantizer(section, stage)
    learns = bool(quantizer and make_quantizer(quantizer, options).learned)
    source = open_any(reference, trust_remote_code=config.model.trust_remote_code)
    source.check()
    wanted = compression.quantization.format if compression.quantization else "auto"
    fake = section.save_format == "fake"
    layers, skipped = (), {}  # type: tuple[Layer, ...], dict[str, str]
    if quantizer:
        scheme = Scheme(quantizers.scheme_of(quantizer, options, shifted=fake).weight, inputs)
        layers, skipped = _layers(source, stage, scheme, "" if fake else wanted)
    arguments = section.hf_args or TrainerArguments.model_validate({})
    _warn(resolved, arguments, section, quantizer)
    lessons = _lessons(section, bool(quantizer))
    data = config.dataset
    rows, length = arguments.per_device_train_batch_size or max(data.batch_size, 1), data.max_seq_length
    if lessons.stored:
        rows, length = _stored(lessons, rows, length)
    if data.data_path and not Path(data.data_path).expanduser().exists() and "/" not in data.data_path:
        raise DataError(f"There is no data file {data.data_path!r}.", fix="Check dataset.data_path.")
    return TrainingJob(
        resolved=resolved,
        config=config,
        source=source,
        name=_name(compression, quantizer),
        quantizer=quantizer,
        options=options,
        inputs=inputs,
        layers=layers,
        skipped=skipped,
        trainable=_trainable(section, quantizer, learns),
        lessons=lessons,
        settings=_settings(arguments, config),
        epochs=float(arguments.num_train_epochs or EPOCHS),
        warmup=_warmup(arguments)[1],
        rows=rows,
        length=length,
        fake=fake,
        format=wanted,
        device=device_of(config.global_.device),
    )


def _quantizer(section: Section, stage: Stage) -> tuple[str, dict[str, Any], Quant | None]:
    """Return the quantizer's name and options, and how inputs are rounded."""
    plugin = getattr(section, "plugin_config", None)
    quant = plugin.quant_config if plugin else None
    special = quant.special if quant and quant.weight_quantizer == "special" else None
    if special is not None:
        return (*quantizers.special(special), None)
    if stage.scheme is not None:
        return (*quantizers.plain(stage.scheme), stage.scheme.input)
    if isinstance(section, Distill):
        return "", {}, None
    raise ConfigError(
        "The recipe does not say what the weights are quantized to.",
        fix="Set plugin_config.quant_config, as the recipe seq_2bit does, or quantization.name.",
    )


def _layers(
    source: Source, stage: Stage, scheme: Scheme, wanted: str
) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """Return the linear layers that are quantized, and why others are not.

    Groups that do not fit are refused, and what the wanted format of the checkpoint, if there is one, cannot hold.
    """
    selection = select(source, scheme, Choice(ignore=stage.ignore))
    stacked = [layer for layer in selection.layers if layer.module is None]
    chosen = tuple(layer for layer in selection.layers if layer.module is not None)
    if not chosen:
        raise ConfigError("No layer is left to quantize.", fix="Shorten ignore_layers.")
    if stacked:
        console.log.warning("%s and %d more: %s.", stacked[0].name, len(stacked) - 1, STACKED)
    if wanted:
        shapes = {layer.name: layer.shape for layer in chosen}
        choose(dict.fromkeys(shapes, scheme), wanted, shapes)
    return chosen, {**selection.skipped, **{layer.name: STACKED for layer in stacked}}


def _trainable(section: Section, quantizer: str, learns: bool) -> str:
    """Return what is trained; `learns` says whether the quantizer has scales to train."""
    asked = section.trainable_parameters
    if asked is not None:
        word = ALIASES.get(asked, asked)
    else:
        # Below eight bits the weights have to move; what ordinary integers need is good scales.
        word = "quant" if learns and quantizer in ("int", "fp") and isinstance(section, QAT) else "all"
    if word == "quant" and not quantizer:
        raise ConfigError(
            "There are no scales to train in full precision.", fix="Set trainable_parameters: all."
        )
    if word == "quant" and not learns:
        raise ConfigError(
            "The scales of this quantizer follow from the weights.", fix="Set trainable_parameters: all."
        )
    return word


def _lessons(section: Section, quantized: bool) -> Lessons:
    """Return the loss and the teacher: another model, stored logits, or the original itself."""
    kind = str(section.loss_type or ("lm" if isinstance(section, QAT) else "kl"))
    loss = Distillation(
        kind=ALIASES.get(kind, kind),  # type: ignore[arg-type]
        kd_weight=1.0 if section.kd_loss_weight is None else float(section.kd_loss_weight),
        lm_weight=0.0 if section.lm_loss_weight is None else float(section.lm_loss_weight),
        temperature=float(section.kd_temperature or 1.0),
        top_k=section.loss_topk or 1000,
    )
    if loss.kind == "lm":
        return Lessons(loss)
    hidden = float(section.hidden_loss_weight or 0.0)
    named = getattr(section, "teacher_model_path", None)
    if section.teacher_logits:
        if named or hidden:
            raise ConfigError(
                "Stored logits are a teacher by themselves, and hold no hidden states.",
                fix="Leave out teacher_model_path and hidden_loss_weight, or teacher_logits.",
            )
        return Lessons(loss, 0.0, Path(section.teacher_logits).expanduser(), stored=True)
    if not named and not quantized:
        raise ConfigError(
            "No teacher is named.",
            fix="Set compression.Distill.teacher_model_path to a model, or teacher_logits to stored logits.",
        )
    return Lessons(loss, hidden, named, own=not named)


def _stored(lessons: Lessons, rows: int, length: int) -> tuple[int, int]:
    """Return the rows of a batch and their length as the stored logits have them."""
    manifest = read_manifest(Path(str(lessons.folder)))
    if (manifest.rows, manifest.length) != (rows, length):
        console.chose(
            f"batches of {manifest.rows} rows of {manifest.length} tokens", "the stored logits have them"
        )
    return manifest.rows, manifest.length


def _settings(given: TrainerArguments, config: Config) -> TrainSettings:
    """Translate the loop's arguments; steps stay 0 where passes over the data decide."""
    name = given.lr_scheduler_type or "cosine"
    if name not in SCHEDULES:
        raise ConfigError(f"Unknown lr_scheduler_type {name!r}.", fix=did_you_mean(name, SCHEDULES))
    schedule, decay = SCHEDULES[name]
    extra = given.model_extra or {}
    report = given.report_to if isinstance(given.report_to, list) else [given.report_to]
    steps = max(int(given.max_steps or 0), 0)
    return TrainSettings(
        steps=steps,
        lr=float(given.learning_rate or RATE),
        warmup=_warmup(given)[0],
        schedule=schedule,  # type: ignore[arg-type]
        decay=decay,
        weight_decay=float(given.weight_decay or 0.0),
        betas=(float(extra.get("adam_beta1", 0.9)), float(extra.get("adam_beta2", 0.95))),
        clip=1.0 if given.max_grad_norm is None else float(given.max_grad_norm),
        bf16=bool(given.bf16),
        accumulation=given.gradient_accumulation_steps or 1,
        seed=config.global_.seed if given.seed is None else int(given.seed),
        checkpoint_every=int(given.save_steps or 200),
        workers=given.dataloader_num_workers or 0,
        compile=bool(extra.get("torch_compile", False)),
        gradient_checkpointing=bool(given.gradient_checkpointing),
        fsdp=bool(given.deepspeed or extra.get("fsdp")) and parallel.world() > 1,
        tensorboard="tensorboard" in [str(word) for word in report],
    )


def _warmup(given: TrainerArguments) -> tuple[int, float]:
    """Return the steps of the warm-up, or its share of all steps; a number of steps below 1 is a share, as there."""
    count = float(given.warmup_steps or 0.0)
    return (int(count), 0.0) if count >= 1 else (0, count or float(given.warmup_ratio or 0.0))


def _warn(resolved: Resolved, given: TrainerArguments, section: Section, quantizer: str) -> None:
    texts = [f"hf_args.{name} has no effect here." for name in given.given() if name not in READ | SILENT]
    if section.resume_ckpt_dir:
        texts.append("resume_ckpt_dir has no effect here: the same command continues what was stopped.")
    if quantizer == "dlt":
        texts.append("dlt's weights are saved as ordinary numbers: no quantized format holds their shifts.")
    for text in texts:
        console.log.warning("%s", text)
        resolved.warnings.append(text)


def _name(compression: Compression, quantizer: str) -> str:
    named = compression.quantization.name if compression.quantization else None
    return named or (f"qat_{quantizer}" if quantizer else "distill")
