"""A training that can be followed: it hands over what it sees of itself while it runs.

A run waits for its end, a sweep drops it as soon as the held-back loss says that it is hopeless.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base import console, parallel
from ..data.packing import Rows
from ..methods.qat.base import enabled
from ..teacher.live import Teacher, frozen_copy, open_teacher, own_masters
from ..teacher.objective import objective
from ..teacher.stored import StoredTeacher, read_manifest
from ..teacher.vocabulary import vocabulary_of
from ..train import StepRecord, TrainSettings, stepwise, whole_weights
from ..train.batches import BatchAt
from ..work import tokenizer_of
from .data import Data, open_data
from .job import TrainingJob
from .progress import Look, Progress
from .student import open_student, undecayed

KEPT_STEPS = 400  # points of a curve in the record


class Training:
    """One training in `place`, from where an earlier attempt stopped; the packed data may lie elsewhere."""

    def __init__(self, job: TrainingJob, place: Path, data_folder: Path | None = None) -> None:
        self.job, self.place = job, place
        self.data = packed(job, data_folder or place)
        self.settings = settled(job, self.data)
        self.model = open_student(job)
        self.progress = Progress(self.model, self.data.dev, place, self.settings.steps)
        self.steps: Sequence[StepRecord] = ()

    def looks(self) -> Generator[Look, None, None]:
        """Train, and yield each look at the student as soon as the step after it is done."""
        seen = -1
        with closing(self._steps()) as steps:
            for done in steps:
                yield from [look for look in self.progress.looks if seen < look.step < done]
                seen = done - 1
        self.progress.before_step(self.settings.steps, self.settings.steps)
        yield from [look for look in self.progress.looks if look.step > seen]

    def _steps(self) -> Generator[int, None, None]:
        job = self.job
        teacher, batch_at = _teacher(job, self.model, self.data, self.settings)
        self.steps = yield from stepwise(
            self.model,
            batch_at,
            objective(teacher, job.lessons.loss, hidden_weight=job.lessons.hidden_weight),
            self.settings,
            self.place,
            on_step=self.progress.before_step,
            undecayed=undecayed(self.model),
            device="cpu" if job.device.type == "cpu" else "auto",
            title=job.name,
        )

    def student(self) -> nn.Module:
        """Return the trained student, whole and on the CPU."""
        model = self.model
        if self.settings.fsdp:
            state = whole_weights(model)
            model = open_student(self.job)
            model.load_state_dict(state)
        return model.cpu()

    def record(self) -> dict[str, Any]:
        """Return what the report shows of the training."""
        job, steps = self.job, self.steps
        stride = -(-len(steps) // KEPT_STEPS) or 1
        kept = [*steps[::stride], *([steps[-1]] if steps and (len(steps) - 1) % stride else [])]
        return {
            "quantizer": job.quantizer or "none (full precision)",
            "options": dict(job.options),
            "loss": _loss_name(job),
            "teacher": _teacher_name(job),
            "trainable": job.trainable,
            "tokens": tokens_of(job, self.settings),
            "tokens_once": rows_once(job, self.data) * job.length,
            "settings": {**asdict(self.settings), "betas": list(self.settings.betas)},
            "steps": [asdict(step) for step in kept],
            "looks": [asdict(look) for look in self.progress.looks],
        }


def packed(job: TrainingJob, folder: Path) -> Data:
    """Open the job's data in `folder`; the first process packs it if it is not there."""

    def opened() -> Data:
        return open_data(
            tokenizer_of(job.source.folder),
            job.config.dataset.data_path,
            folder,
            rows=job.rows,
            length=job.length,
            seed=job.settings.seed,
            share=job.config.dataset.share,
        )

    data = opened() if parallel.first() else None
    parallel.wait()
    return data or opened()


def rows_once(job: TrainingJob, data: Data) -> int:
    """Return how many rows one pass over the data has, or over the stored logits that take its place."""
    if not job.lessons.stored:
        return data.rows.count
    manifest = read_manifest(Path(str(job.lessons.folder)))
    return max(int(manifest.batches * job.config.dataset.share + 1e-9), 1) * manifest.rows


def settled(job: TrainingJob, data: Data) -> TrainSettings:
    """Return the settings with the steps and the warm-up that follow from the data."""
    settings = job.settings
    per_step = job.rows * settings.accumulation * parallel.world()
    steps = settings.steps or max(round(rows_once(job, data) * job.epochs / per_step), 1)
    return replace(settings, steps=steps, warmup=settings.warmup or round(job.warmup * steps))


def tokens_of(job: TrainingJob, settings: TrainSettings) -> int:
    """Return how many tokens a training reads, those read again included."""
    return settings.steps * settings.accumulation * parallel.world() * job.rows * job.length


def _teacher(
    job: TrainingJob, student: nn.Module, data: Data, settings: TrainSettings
) -> tuple[Teacher | None, BatchAt]:
    """Return the teacher, and the batches that it knows."""
    lessons = job.lessons
    if lessons.loss.kind == "lm":
        return None, data.rows
    tokenizer = tokenizer_of(job.source.folder)
    if lessons.stored:
        stored = StoredTeacher(
            Path(str(lessons.folder)),
            vocabulary_of(tokenizer, job.source.name),
            seed=settings.seed,
            share=job.config.dataset.share,
        )
        _compare(stored, data)
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


def _compare(stored: StoredTeacher, data: Data) -> None:
    """Say it when held-back rows may be among those that the teacher stored."""
    manifest = stored.manifest
    if Rows(data.rows.stream, manifest.rows, manifest.length).fingerprint != manifest.data:
        console.log.warning(
            "The logits were stored for other data than dataset.data_path names: the held-back loss is of rows that "
            "may be trained on."
        )


def _loss_name(job: TrainingJob) -> str:
    """Say which losses are added up, those of weight 1 without it."""
    loss = job.lessons.loss
    if loss.kind == "lm":
        return "cross entropy"
    parts = (
        (loss.kd_weight, loss.kind),
        (loss.lm_weight, "cross entropy"),
        (job.lessons.hidden_weight, "hidden states"),
    )
    return " + ".join(name if weight == 1 else f"{weight:g} x {name}" for weight, name in parts if weight)


def _teacher_name(job: TrainingJob) -> str:
    lessons = job.lessons
    if lessons.loss.kind == "lm":
        return "none"
    return "the original" if lessons.own else str(lessons.folder)
