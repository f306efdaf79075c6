"""What is watched while a model trains: the loss on held-back rows, and how its weights spread over the levels."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base import parallel
from ..methods.qat.base import master_weight, quantizers, set_progress
from ..models.checkpoint import write_atomically
from ..numerics.distillation import Distillation, distillation_loss

LOOKS = 10  # times that a run is looked at, its beginning and end beside
BINS = 48
REACH = 3.0  # the histograms' range, in standard deviations of the first look
WATCHED = 3  # layers whose weights are drawn
ROWS = 8  # held-back rows that are computed together


@dataclass(frozen=True)
class Look:
    """What was seen before a step; histograms are shares of a layer's master weights in `BINS` bins."""

    step: int
    dev_loss: float  # cross entropy on the held-back rows, nats a token
    histograms: dict[str, list[float]]
    edges: dict[str, float]  # layer -> half of its histogram's range


class Progress:
    """Called before each step; looks `LOOKS` times and keeps what it saw in ``looks.json``."""

    def __init__(self, model: nn.Module, dev: dict[str, Tensor], folder: Path, steps: int) -> None:
        self.model, self.dev, self.file = model, dev, folder / "looks.json"
        self.every = max(steps // LOOKS, 1)
        self.looks: list[Look] = []
        if self.file.exists():
            self.looks = [Look(**each) for each in json.loads(self.file.read_text("utf-8"))]
        names = [name for name, _, _ in quantizers(model)]
        self.watched = (
            {names[round(at * (len(names) - 1) / max(WATCHED - 1, 1))] for at in range(WATCHED)}
            if names
            else set()
        )

    def before_step(self, step: int, steps: int) -> None:
        """Tell the quantizers how far the run is; look at it from time to time."""
        set_progress(self.model, step, steps)
        if step % self.every == 0 or step == steps:
            self.look(step)

    def look(self, step: int) -> None:
        """Measure and write; what an earlier attempt saw from here on is forgotten."""
        self.looks = [each for each in self.looks if each.step < step]
        edges = dict(self.looks[0].edges) if self.looks else {}
        histograms = {}
        for name, linear, _ in quantizers(self.model):
            if name in self.watched:
                weight = master_weight(linear).detach().float()
                edge = edges.setdefault(name, float(weight.std()) * REACH)
                counts = torch.histc(weight.clamp(-edge, edge), BINS, -edge, edge)
                histograms[name] = [round(float(share), 6) for share in counts / weight.numel()]
        self.looks.append(Look(step, self._dev_loss(), histograms, edges))
        if parallel.first():
            write_atomically(self.file, json.dumps([asdict(each) for each in self.looks]).encode())

    def _dev_loss(self) -> float:
        training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        total = count = 0.0
        with torch.no_grad():
            for start in range(0, len(self.dev["labels"]), ROWS):
                ids, labels = (
                    self.dev[key][start : start + ROWS].to(device) for key in ("input_ids", "labels")
                )
                learnt = float((labels[:, 1:] >= 0).sum())
                if learnt:
                    logits = self.model(input_ids=ids, use_cache=False).logits
                    total += (
                        distillation_loss(logits, labels, None, Distillation(kind="lm"))["loss"].item()
                        * learnt
                    )
                    count += learnt
        self.model.train(training)
        return total / max(count, 1.0)
