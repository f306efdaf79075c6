"""Carry out a training job: train, merge, and hand over to the pipeline, which writes, checks, measures and reports.

Everything of the training lies in ``OUT.training`` until `OUT` is complete: the packed data, the checkpoint of the loop, the
record of its steps. The same command continues after a kill, in whichever part it was; on a CPU the weights come out
byte for byte the same.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import pipeline
from ..base import console, parallel
from ..base.errors import UserError
from ..base.place import open_place
from ..config.upstream import Stage
from ..export._dense import FORMAT as DENSE
from ..export.base import Exporter, choose
from ..job import Job, units_of
from ..methods.qat._result import Trained
from ..models.select import Selection
from ..numerics.scheme import PRESETS, Scheme
from ..report.record import RunRecord
from ..train.checkpoint import CHECKPOINT
from ..train.history import CURVES, HISTORY
from .follow import Training
from .job import TrainingJob
from .student import Outcome, TrainedCheckpoint, finish


def run(job: TrainingJob, out: Path, *, command: str = "", overwrite: bool = False) -> RunRecord:
    """Train and leave a complete model folder in `out`; returns its record."""
    out = out.resolve()
    place = out.with_name(out.name + ".training")
    if _is_finished(job, out, overwrite):
        return RunRecord.load(out)
    open_training(place, job.fingerprint(), overwrite)
    started = time.perf_counter()
    try:
        outcome, training = _train(job, place)
    except UserError:
        _forget_unbegun(place)
        raise
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
        if (place / CURVES).exists():
            shutil.copytree(place / CURVES, out / CURVES, dirs_exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
    return record


def _forget_unbegun(place: Path) -> None:
    """Remove the folder of a training that was refused before its first step, or the corrected command finds it."""
    steps = place / HISTORY
    begun = (place / CHECKPOINT).exists() or (steps.exists() and steps.stat().st_size > 0)
    if parallel.first() and not begun:
        shutil.rmtree(place, ignore_errors=True)


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


def open_training(place: Path, fingerprint: str, overwrite: bool) -> None:
    """Make the folder of the training, or find the one that was begun; one of another recipe is refused."""
    open_place(
        place,
        fingerprint,
        "an unfinished training of another recipe, model or data",
        fix="Finish it with its own command, delete that folder, or pass --overwrite.",
        overwrite=overwrite,
    )


def _train(job: TrainingJob, place: Path) -> tuple[Outcome, dict[str, Any]]:
    """Train from where an earlier attempt stopped; return the merged result and the record of the training."""
    training = Training(job, place)
    for _ in training.looks():
        pass
    return finish(training.student(), job), training.record()


def _writing(job: TrainingJob, outcome: Outcome) -> Job:
    """Return the job that writes the result: rounding that is done already."""
    rounded = [layer for layer in job.layers if str(layer.module) in outcome.layers]
    schemes = {layer.name: Scheme(outcome.layers[str(layer.module)].quant, job.inputs) for layer in rounded}
    shapes = {layer.name: layer.shape for layer in rounded}
    fake = job.fake or not rounded
    exporter: Exporter
    name, exporter = ("dense", DENSE) if fake else choose(schemes, job.format, shapes)
    layers = tuple(replace(layer, scheme=schemes[layer.name]) for layer in rounded)
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
