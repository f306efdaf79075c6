"""Carry out a training job: train, merge, and hand over to the pipeline, which writes, checks, measures and reports.

Everything of the training lies in ``OUT.training`` until `OUT` is complete: the packed data, the checkpoint of the loop, the
record of its steps. The same command continues after a kill, in whichever part it was; on a CPU the weights come out
byte for byte the same.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import pipeline
from ..base import console, parallel
from ..base.errors import UserError
from ..config.upstream import Stage
from ..export._dense import FORMAT as DENSE
from ..export.base import Exporter, choose
from ..job import Job, units_of
from ..methods.qat._result import Trained
from ..methods.qat.base import enabled
from ..models.checkpoint import write_atomically
from ..models.select import Selection
from ..numerics.scheme import PRESETS, Scheme
from ..report.record import RunRecord
from ..teacher.live import Teacher, frozen_copy, open_teacher, own_masters
from ..teacher.objective import objective
from ..teacher.stored import StoredTeacher
from ..teacher.vocabulary import vocabulary_of
from ..train import StepRecord, TrainSettings, train, whole_weights
from ..train.batches import BatchAt
from ..work import tokenizer_of
from .data import Data, open_data
from .job import TrainingJob
from .progress import Progress
from .student import Outcome, TrainedCheckpoint, finish, open_student, undecayed

KEPT_STEPS = 400  # points of a curve in the record


def run(job: TrainingJob, out: Path, *, command: str = "", overwrite: bool = False) -> RunRecord:
    """Train and leave a complete model folder in `out`; returns its record."""
    out = out.resolve()
    place = out.with_name(out.name + ".training")
    if _is_finished(job, out, overwrite):
        return RunRecord.load(out)
    _open(place, job.fingerprint(), overwrite)
    started = time.perf_counter()
    outcome, training = _train(job, place)
    seconds = time.perf_counter() - started
    record = pipeline.run(
        _writing(job, outcome),
        out,
        command=command,
        overwrite=overwrite,
        training={**training, "fingerprint": job.fingerprint(), "seconds": round(seconds, 1)},
    )
    parallel.wait()
    if parallel.first():
        shutil.rmtree(place, ignore_errors=True)
    return record


def _is_finished(job: TrainingJob, out: Path, overwrite: bool) -> bool:
    """Say whether `out` holds this very result; refuse to replace anything else unasked."""
    if job.source.folder.resolve().is_relative_to(out):
        raise UserError(f"{out} is, or holds, the model itself.", fix="Choose another --out.")
    if overwrite or not out.exists() or not any(out.iterdir()):
        return False
    try:
        training = RunRecord.load(out).training
    except UserError:
        training = None
    if not training or training.get("fingerprint") != job.fingerprint():
        raise UserError(f"{out} already exists.", fix="Choose another --out, or pass --overwrite.")
    console.log.info("%s already holds this result; nothing to do.", out)
    return True


def _open(place: Path, fingerprint: str, overwrite: bool) -> None:
    """Make the folder of the training, or find the one that was begun; one of another recipe is refused."""
    marker = place / "job.json"
    if parallel.first():
        if marker.exists() and json.loads(marker.read_text("utf-8"))["fingerprint"] != fingerprint:
            if not overwrite:
                raise UserError(
                    f"{place} holds an unfinished training of another recipe, model or data.",
                    fix="Finish it with its own command, delete that folder, or pass --overwrite.",
                )
            shutil.rmtree(place)
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, json.dumps({"fingerprint": fingerprint}).encode())
    parallel.wait()


def _train(job: TrainingJob, place: Path) -> tuple[Outcome, dict[str, Any]]:
    """Train from where an earlier attempt stopped; return the merged result and the record of the training."""
    tokenizer = tokenizer_of(job.source.folder)
    if parallel.first():
        _data(job, tokenizer, place)
    parallel.wait()
    data = _data(job, tokenizer, place)
    settings = _settled(job, data)
    student = open_student(job)
    teacher, batch_at = _teacher(job, student, tokenizer, data, settings)
    loss = objective(teacher, job.lessons.loss, hidden_weight=job.lessons.hidden_weight)
    progress = Progress(student, data.dev, place, settings.steps)
    steps = train(
        student,
        batch_at,
        loss,
        settings,
        place,
        on_step=progress.before_step,
        undecayed=undecayed(student),
        device="cpu" if job.device.type == "cpu" else "auto",
        title=job.name,
    )
    progress.before_step(settings.steps, settings.steps)
    if settings.fsdp:
        state = whole_weights(student)
        student = open_student(job)
        student.load_state_dict(state)
    outcome = finish(student.cpu(), job)
    return outcome, _training_record(job, data, settings, steps, progress)


def _data(job: TrainingJob, tokenizer: Any, place: Path) -> Data:
    return open_data(
        tokenizer,
        job.config.dataset.data_path,
        place,
        rows=job.rows,
        length=job.length,
        seed=job.settings.seed,
    )


def _settled(job: TrainingJob, data: Data) -> TrainSettings:
    """Return the settings with the steps and the warm-up that follow from the data."""
    settings = job.settings
    per_step = job.rows * settings.accumulation * parallel.world()
    steps = settings.steps or max(round(data.rows.count * job.epochs / per_step), 1)
    return replace(settings, steps=steps, warmup=settings.warmup or round(job.warmup * steps))


def _teacher(
    job: TrainingJob, student: nn.Module, tokenizer: Any, data: Data, settings: TrainSettings
) -> tuple[Teacher | None, BatchAt]:
    """Return the teacher, and the batches that it knows."""
    lessons = job.lessons
    if lessons.loss.kind == "lm":
        return None, data.rows
    if lessons.stored:
        stored = StoredTeacher(
            Path(str(lessons.folder)), vocabulary_of(tokenizer, job.source.name), seed=settings.seed
        )
        return stored, stored.batch_at
    device = torch.device("cpu") if job.device.type == "cpu" else torch.device("cuda", parallel.local_rank())
    if not lessons.own:
        dtype = torch.bfloat16 if settings.bf16 and device.type == "cuda" else torch.float32
        assert lessons.folder is not None
        other = open_teacher(
            lessons.folder, tokenizer, student_name=job.source.name, device=device, dtype=dtype
        )
        return other, data.rows
    if job.trainable == "quant":

        def original() -> AbstractContextManager[None]:
            return enabled(student, False)

        return own_masters(student, original), data.rows
    frozen = open_student(replace(job, quantizer="", trainable="all"))
    return frozen_copy(frozen.to(device)), data.rows


def _writing(job: TrainingJob, outcome: Outcome) -> Job:
    """Return the job that writes the result: rounding that is done already."""
    schemes = {
        layer.name: Scheme(outcome.layers[str(layer.module)].quant, job.inputs) for layer in job.layers
    }
    shapes = {layer.name: layer.shape for layer in job.layers}
    fake = job.fake or not job.layers
    exporter: Exporter
    name, exporter = ("dense", DENSE) if fake else choose(schemes, job.format, shapes)
    layers = tuple(replace(layer, scheme=schemes[layer.name]) for layer in job.layers)
    common = Counter(schemes.values()).most_common(1)
    scheme = common[0][0] if common else Scheme(PRESETS["int8_dynamic"].weight)
    checkpoint = TrainedCheckpoint(job.source.checkpoint, outcome.tensors, torch.float32 if fake else None)
    edits = {"dtype": "float32"} if fake else {}
    return Job(
        resolved=job.resolved,
        config=job.config,
        source=replace(job.source, checkpoint=checkpoint, edits=edits),
        stage=Stage("qat", job.name, scheme, {}, ()),
        scheme=scheme,
        rewrites=(),
        transforms=(),
        method=Trained(outcome.layers, outcome.notes),
        selection=Selection(layers, job.skipped),
        format=name,
        exporter=exporter,
        device=torch.device("cpu"),
        units=units_of(job.source),
    )


def _training_record(
    job: TrainingJob, data: Data, settings: TrainSettings, steps: Sequence[StepRecord], progress: Progress
) -> dict[str, Any]:
    """Return what the report shows of the training."""
    stride = -(-len(steps) // KEPT_STEPS) or 1
    kept = [*steps[::stride], *([steps[-1]] if steps and (len(steps) - 1) % stride else [])]
    tokens = settings.steps * settings.accumulation * parallel.world() * job.rows * job.length
    return {
        "quantizer": job.quantizer or "none (full precision)",
        "options": dict(job.options),
        "loss": job.lessons.loss.kind,
        "teacher": _teacher_name(job),
        "trainable": job.trainable,
        "tokens": tokens,
        "tokens_once": data.rows.tokens,
        "settings": {**asdict(settings), "betas": list(settings.betas)},
        "steps": [asdict(step) for step in kept],
        "looks": [asdict(look) for look in progress.looks],
    }


def _teacher_name(job: TrainingJob) -> str:
    lessons = job.lessons
    if lessons.loss.kind == "lm":
        return "none"
    return "the original" if lessons.own else str(lessons.folder)
