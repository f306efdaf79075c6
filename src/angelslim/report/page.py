"""What the page shows, as plain values: the template only lays it out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..numerics.error import LayerRecord
from . import experts, plots, training, words
from .heat import share
from .layers import worst
from .record import RunRecord
from .rows import Row, disagreements, labels, quality_metrics, rows, speed_metrics
from .summary import cells, mixed

WORST, HISTOGRAMS = 5, 6
NONE = "–"


def context(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the template's variables for one run or several."""
    table, names = rows(records), labels(records)
    headings, lines = cells(records)
    models = ", ".join(dict.fromkeys(record.model for record in records))
    single = records[0] if len(records) == 1 else None
    charts, whiskers = _charts(table)
    return {
        "title": f"{models}: {single.method}" if single else f"{models}: {len(records)} runs compared",
        "subtitle": _summary(single) if single else f"{', '.join(names)}.",
        "warnings": [
            *disagreements(records),
            *(
                warning if single else f"{name}: {warning}"
                for name, record in zip(names, records, strict=True)
                for warning in record.warnings
            ),
        ],
        "tiles": _tiles(single, table) if single else [],
        "headings": headings,
        "lines": lines,
        "charts": charts,
        "charts_note": "Lines at the ends of the bars span one standard error to each side."
        if whiskers
        else "",
        "overview": plots.runs_grid(dict(zip(names, records, strict=True))) if not single else "",
        "runs": [_run(name, record) for name, record in zip(names, records, strict=True)],
    }


def _summary(record: RunRecord) -> str:
    return (
        f"{record.scheme}. Saved as {record.format}. {words.parameters(record.parameters)} parameters "
        f"({record.model_type}), {words.duration(record.seconds)}."
    )


def _tiles(record: RunRecord, table: Sequence[Row]) -> list[dict[str, str]]:
    original, result = table
    size, _, unit = words.megabytes(record.bytes_after).partition(" ")
    tiles = [
        {
            "name": "Size of the weights",
            "value": size,
            "unit": unit,
            "note": f"{words.factor(result.ratio)} than {words.megabytes(record.bytes_before)}",
        },
        {
            "name": "Bits per weight",
            "value": f"{record.bits_per_weight:.2f}",
            "unit": "bits",
            "note": f"{'scales included, ' if record.layers else ''}from {original.bits:.2f}",
        },
    ]
    measured = quality_metrics(table) | {k: s for k, s in speed_metrics(table).items() if k == "decode"}
    for metric in list(measured)[:4]:
        before, after = original.scores.get(metric), result.scores.get(metric)
        if after is None:
            continue
        tile = {
            "name": f"{words.metric_name(metric)} {words.arrow(after)}",
            "value": words.number(after.value, after.unit),
            "unit": after.unit,
            "note": words.NOT_EVALUATED + " before",
        }
        if before is not None:
            kind, start = words.verdict(before, after), words.number(before.value, before.unit)
            moved = f"{words.change(before, after)} from" if kind != "same" else "within the noise of"
            tile["note"] = f"{moved} {start}"
            tile["verdict"] = "" if kind == "same" else kind
        tiles.append(tile)
    if not quality_metrics(table):
        tiles.append({"name": "Quality", "value": NONE, "unit": "", "note": words.NOT_EVALUATED})
    return tiles


def _charts(table: Sequence[Row]) -> tuple[list[dict[str, str]], bool]:
    """Return the charts of the comparison, and whether any shows standard errors."""
    charts = [{"title": "Size of the weights ↓", "svg": plots.size_bars(table)}]
    quality = quality_metrics(table)
    for metric, score in {**quality, **speed_metrics(table)}.items():
        unit = f" ({score.unit})" if score.unit else ""
        title = f"{words.metric_name(metric)}{unit} {words.arrow(score)}"
        charts.append({"title": title, "svg": plots.score_bars(table, metric, score)})
    for metric, score in list(quality.items())[:2]:
        title = f"{words.metric_name(metric)} against size"
        charts.append({"title": title, "svg": plots.quality_against_size(table, metric, score)})
    whiskers = any(words.spread(score) for row in table for score in row.scores.values())
    return [chart for chart in charts if chart["svg"]], whiskers


def _run(name: str, record: RunRecord) -> dict[str, Any]:
    bad = worst(record.layers, WORST)
    facts = [
        ("Model", f"{record.model} ({record.model_type}, {words.parameters(record.parameters)} parameters)"),
        ("Method", record.method),
        ("Scheme", record.scheme),
        ("Format", record.format),
        ("Input scales", words.trial(record.trial)),
        ("Time", words.duration(record.seconds)),
        ("Peak memory", words.megabytes(record.peak_memory_bytes)),
        ("Seed", str(record.seed)),
        ("Versions", ", ".join(f"{key} {value}" for key, value in sorted(record.versions.items()))),
    ]
    return {
        "name": name,
        "summary": _summary(record),
        "grid": plots.error_grid(record.layers),
        "outputs": plots.output_grid(record.layers),
        "worst": [_layer(layer) for layer in bad],
        "worst_title": f"Worst {len(bad)} of {len(record.layers)} layers",
        "histograms": [c for layer in worst(record.layers, HISTOGRAMS) for c in _histograms(layer)][
            :HISTOGRAMS
        ],
        "mixed": mixed(record),
        "scaled": any(layer.input_scale is not None for layer in record.layers),
        "reached": any(layer.output_error is not None for layer in record.layers),
        "noted": any(layer.note or layer.choice for layer in record.layers),
        "experts": experts.section(record.experts),
        "training": training.section(record.training),
        "layers": [_layer(layer) for layer in record.layers],
        "skipped": sorted(record.skipped.items()),
        "command": record.command or "The command was not recorded.",
        "facts": [(key, value) for key, value in facts if value],
        "config": [(k, v, record.provenance.get(k, NONE)) for k, v in flatten(record.config)],
        "hashes": sorted(record.hashes.items()),
    }


def _histograms(layer: LayerRecord) -> Iterator[dict[str, str]]:
    for what, data in (("weights", layer.weights), ("inputs", layer.activations)):
        if data is not None and any(data.before):
            note = f"{what}, {words.decibels(layer.sqnr_db)} dB" if what == "weights" else what
            yield {"title": layer.name, "svg": plots.histogram(data, what), "note": note}


def _layer(layer: LayerRecord) -> dict[str, str]:
    out, into = layer.shape
    return {
        "name": layer.name,
        "block": NONE if layer.block is None else str(layer.block),
        "block_key": str(-1 if layer.block is None else layer.block),
        "scheme": layer.scheme,
        "shape": f"{out} × {into}",
        "elements": str(out * into),
        "bits": f"{layer.bits_per_weight:.2f}",
        "sqnr": words.decibels(layer.sqnr_db),
        "sqnr_key": repr(min(layer.sqnr_db, 1e9)),
        "error": words.percent(layer.relative_error),
        "error_key": repr(layer.relative_error),
        "output": NONE if layer.output_error is None else share(layer.output_error),
        "output_key": "-1" if layer.output_error is None else repr(layer.output_error),
        "note": "; ".join(filter(None, (layer.note, layer.choice))),
        "scale": NONE if layer.input_scale is None else f"{layer.input_scale:.4g}",
        "scale_key": "-1" if layer.input_scale is None else repr(layer.input_scale),
    }


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a nested configuration as dotted keys and written values."""
    for key, value in sorted(config.items()):
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
            yield f"{prefix}{key}", text
