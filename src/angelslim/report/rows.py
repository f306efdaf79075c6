"""The before/after comparison as data: one row for each original model, one for each run.

The terminal table, the markdown table, the page and its charts all read these rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluate.base import Score
from . import words
from .record import RunRecord

SPEED_UNITS = ("tokens/s", "ms")
SIZE_METRICS = ("size", "parameters", "bits/parameter")


@dataclass(frozen=True)
class Row:
    """One model as measured: the original, or what a run made of it."""

    name: str
    baseline: bool
    stored: int  # bytes of the weights
    bits: float  # per weight: of the quantized layers, or of the whole original
    ratio: float  # original bytes / stored bytes
    scores: dict[str, Score]


def labels(records: Sequence[RunRecord]) -> list[str]:
    """Name each run by its method, with as much more as it takes to tell the runs apart."""
    names = [record.method for record in records]
    for more in ("scheme", "model"):
        seen = Counter(names)
        names = [
            f"{name} ({getattr(record, more)})" if seen[name] > 1 else name
            for name, record in zip(names, records, strict=True)
        ]
    seen, used = Counter(names), Counter[str]()
    for index, name in enumerate(names):
        used[name] += 1
        names[index] = f"{name} #{used[name]}" if seen[name] > 1 else name
    return names


def rows(records: Sequence[RunRecord]) -> list[Row]:
    """Return the originals, each once and followed by its runs."""
    result: list[Row] = []
    names = labels(records)
    models = list(dict.fromkeys(record.model for record in records))
    for model in models:
        runs = [(name, record) for name, record in zip(names, records, strict=True) if record.model == model]
        result.append(_original(model, [record for _, record in runs], alone=len(models) == 1))
        result += [_run(name, record) for name, record in runs]
    return result


def _original(model: str, runs: list[RunRecord], alone: bool) -> Row:
    record = next((run for run in runs if run.before), runs[0])
    bits = 8 * record.bytes_before / record.parameters if record.parameters else 0.0
    name = "original" if alone else f"original {model}"
    return Row(name, True, record.bytes_before, bits, 1.0, _by_metric(record.before))


def _run(name: str, record: RunRecord) -> Row:
    ratio = record.bytes_before / record.bytes_after if record.bytes_after else 0.0
    return Row(name, False, record.bytes_after, record.bits_per_weight, ratio, _by_metric(record.after))


def _by_metric(scores: Sequence[Score]) -> dict[str, Score]:
    return {score.metric: score for score in scores}


def metrics(table: Sequence[Row]) -> dict[str, Score]:
    """Return every metric of the rows in order of appearance, each with one score that knows its unit."""
    found: dict[str, Score] = {}
    for row in table:
        for metric, score in row.scores.items():
            found.setdefault(metric, score)
    return found


def quality_metrics(table: Sequence[Row]) -> dict[str, Score]:
    """Return the metrics of what the model can do, perplexity first."""
    found = {
        metric: score
        for metric, score in metrics(table).items()
        if score.unit not in SPEED_UNITS and metric not in SIZE_METRICS
    }
    return dict(sorted(found.items(), key=lambda item: item[0] != "perplexity"))


def speed_metrics(table: Sequence[Row]) -> dict[str, Score]:
    """Return the metrics of how fast the model runs."""
    return {metric: score for metric, score in metrics(table).items() if score.unit in SPEED_UNITS}


def disagreements(records: Sequence[RunRecord]) -> list[str]:
    """Say where runs on one model measured different originals: such runs are not comparable."""
    found = []
    for model in dict.fromkeys(record.model for record in records):
        seen: dict[str, Score] = {}
        for record in (record for record in records if record.model == model):
            for score in record.before:
                first = seen.setdefault(score.metric, score)
                if score.unit not in SPEED_UNITS and (first.value, first.samples) != (
                    score.value,
                    score.samples,
                ):
                    found.append(
                        f"The runs on {model} measured the original differently: {score.metric} "
                        f"{words.number(first.value, first.unit)} on {first.samples} samples and "
                        f"{words.number(score.value, score.unit)} on {score.samples}."
                    )
    return list(dict.fromkeys(found))
