"""What a run of sparse attention will do, before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

from ..kernels.attention.base import Case
from ..kernels.attention.choose import choose
from ..models.loading import torch_dtype
from .job import PrefillJob
from .run import describe

KEPT = 4  # maps of a block of queries that are in memory at once while heads are compared


@dataclass(frozen=True)
class PrefillPlan:
    """Sizes in bytes; lengths in tokens."""

    model: str
    method: str
    rules: list[str]
    block: int
    kernel: str
    crossover: int | str
    lengths: list[int]
    heads_length: int
    searches_heads: bool
    weights: int
    peak_memory: int
    forwards: int  # prefills at most, over all lengths

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(asdict(self), indent=1)

    def rows(self) -> list[tuple[str, str]]:
        """Return what the terminal shows."""
        found = [
            ("model", f"{self.model} ({self.weights / 1e6:,.1f} MB of weights, unchanged)"),
            ("method", self.method),
        ]
        found += [("rule", rule) for rule in self.rules]
        found += [
            ("kernel", f"{self.kernel}, blocks of {self.block} tokens"),
            ("sparse from", "measured" if self.crossover == "auto" else f"{self.crossover:,} tokens"),
            (
                "measured",
                ", ".join(f"{length:,}" for length in self.lengths) + " tokens"
                if self.lengths
                else "nothing",
            ),
        ]
        if self.lengths:
            found.append(("prefills", f"at most {self.forwards}"))
            found.append(("heads compared", f"on {self.heads_length:,} tokens"))
        if self.searches_heads:
            found.append(("calibration", "a search of each head's pattern"))
        return [*found, ("peak memory", f"about {self.peak_memory / 1e9:.2f} GB")]


def estimate(job: PrefillJob) -> PrefillPlan:
    """Predict from shapes; nothing runs."""
    shape, measure, block = job.shape, job.measure, job.metadata.block
    case = Case(job.device, torch_dtype(job.source.config), shape.width, shape.value_width, block, block)
    kernel, _ = choose(case, job.metadata.kernel)
    lengths = list(job.lengths) if measure.enabled else []
    tokens = min(measure.heads_length, max(job.lengths))
    weights = job.source.checkpoint.nbytes
    dtype: torch.dtype = torch_dtype(job.source.config)
    cache = 2 * shape.layers * shape.kv_heads * shape.width * max(job.lengths) * dtype.itemsize
    compared = KEPT * 4 * shape.heads * block * tokens
    rounds = measure.repeats + measure.warmups + 1
    return PrefillPlan(
        model=job.source.name,
        method=job.name,
        rules=describe(job.metadata),
        block=block,
        kernel=kernel.name,
        crossover=job.metadata.crossover,
        lengths=lengths,
        heads_length=tokens,
        searches_heads=job.search_heads,
        weights=weights,
        peak_memory=600_000_000 + weights + cache + compared,
        forwards=2 * rounds * len(lengths),
    )
