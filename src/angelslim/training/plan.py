"""What a training run will do and cost, before it starts."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import torch

from ..base import parallel
from .job import TrainingJob

LIBRARIES = 600_000_000  # resident before the model is there
MOMENTS = 16  # bytes of a trained weight: itself, its gradient, two moments, all float32


@dataclass(frozen=True)
class TrainingPlan:
    """Sizes in bytes; `tokens` is 0 where passes over data that is not packed yet decide."""

    model: str
    method: str
    quantized: int  # layers
    kept: int
    trainable: str
    loss: str
    teacher: str
    steps: int
    batch: str
    tokens: int
    weights: int  # parameters
    peak_memory: int
    disk: int
    seconds: float | None

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(asdict(self), indent=1)

    def rows(self) -> list[tuple[str, str]]:
        """Return what the terminal shows."""
        time_ = (
            "known once the data is packed"
            if self.seconds is None
            else f"about {self.seconds / 60:.1f} minutes"
        )
        return [
            ("model", f"{self.model} ({self.weights / 1e6:,.1f} M parameters)"),
            ("method", self.method),
            ("quantized layers", f"{self.quantized}, {self.kept} kept"),
            ("trained", self.trainable),
            ("loss", f"{self.loss}, teacher: {self.teacher}"),
            ("steps", f"{self.steps:,}" if self.steps else "from the data"),
            ("batch", self.batch),
            ("tokens", f"{self.tokens:,}" if self.tokens else "from the data"),
            ("peak memory", f"about {self.peak_memory / 1e9:.2f} GB"),
            ("disk while running", f"about {self.disk / 1e6:,.0f} MB"),
            ("time", f"{time_} without evaluation"),
        ]


def estimate(job: TrainingJob) -> TrainingPlan:
    """Predict the cost from shapes and a measurement of this machine of about a tenth of a second."""
    count = job.source.checkpoint.parameters
    scales = job.trainable == "quant"
    batch = job.rows * job.settings.accumulation * parallel.world()
    tokens = job.settings.steps * batch * job.length
    config = job.source.config.get_text_config()
    logits = 4 * job.rows * job.length * config.vocab_size
    states = 16 * 4 * job.rows * job.length * config.hidden_size * len(job.source.structure.blocks)
    states //= len(job.source.structure.blocks) if job.settings.gradient_checkpointing else 1
    teacher = 4 * count if job.lessons.own and not scales else 0
    trained = 4 * count if scales else MOMENTS * count
    lessons = job.lessons
    return TrainingPlan(
        model=job.source.name,
        method=job.name,
        quantized=len(job.layers),
        kept=len(job.skipped),
        trainable={"quant": "scales alone", "norm": "norms alone"}.get(
            job.trainable, "all weights and scales"
        ),
        loss=lessons.loss.kind,
        teacher="none"
        if lessons.loss.kind == "lm"
        else "the original"
        if lessons.own
        else str(lessons.folder),
        steps=job.settings.steps,
        batch=f"{batch} rows of {job.length} tokens",
        tokens=tokens,
        weights=count,
        peak_memory=LIBRARIES + trained + teacher + 3 * logits + states,
        disk=(4 if scales else 12) * count + 2 * count + 5 * tokens,
        seconds=seconds(job, count, tokens) if tokens else None,
    )


def seconds(job: TrainingJob, count: int, tokens: int) -> float:
    """Scale a timed product to the products of all forward and backward passes, the teacher's too."""
    side = 1024
    dtype = torch.bfloat16 if job.settings.bf16 else torch.float32
    matrix = torch.randn(side, side, device=job.device, dtype=dtype)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(4):
        product = matrix @ matrix
    product.sum().item()
    each = (time.perf_counter() - start) / 4
    passes = 3 + (0 if job.lessons.loss.kind == "lm" or job.lessons.stored else 1)
    passes += 1 if job.settings.gradient_checkpointing else 0
    return 10 + 2 * passes * count * tokens / (2 * side**3) * each / parallel.world()
