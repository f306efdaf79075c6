"""What has to hold: each bar is one ratio between ours and the best of the others, from rows of the same run."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from common import bar

Row = dict[str, Any]
OURS = "angelslim"
SAME = 1.005  # the same arithmetic on both sides: within half a percent is equal

# our recipe, the recipe it is compared with, and the goal for the ratio of the mean KLs
QUALITY = (
    ("rtn_w4", "rtn_w4", SAME),
    ("gptq_w4", "gptq_w4", 1.0),
    ("gptq_w4_plain", "gptq_w4", 1.0),  # neither searches ranges
    ("gptq_w4", "gptq_w4_mse", 1.0),  # both do
    ("gptaq_w4", "gptaq_w4", 1.0),
    ("gptaq_w4_plain", "gptaq_w4", 1.0),
    ("gptaq_w4", "gptaq_w4_mse", 1.0),
    ("awq_w4", "awq_w4", 1.0),
    ("autoround_w4", "autoround_w4", 1.0),
    ("best_w4", "autoround_w4", 1.0),
    ("best_asym_w4", "autoround_w4", 1.0),
    ("smooth_gptq_w8a8", "smooth_gptq_w8a8", 1.0),
    ("fp8_static", "fp8_static", SAME),
    ("fp8_dynamic", "fp8_dynamic", SAME),
)
# our recipe, the other's, the tool (None: whichever is faster), the figure, the goal for the ratio. Our call is a whole
# run, reading and writing included; where that would decide, the others' loading and saving count as well ("work").
SPEED = (
    ("gptq_w4", "gptq_w4", "llmcompressor", "call", 0.5),
    ("awq_w4", "awq_w4", "llmcompressor", "call", 0.2),
    ("smooth_gptq_w8a8", "smooth_gptq_w8a8", "llmcompressor", "call", 0.5),
    ("best_w4", "autoround_w4", "llmcompressor", "call", 0.3),
    ("fp8_static", "fp8_static", None, "work", 1.0),
    ("fp8_dynamic", "fp8_dynamic", None, "process", 0.6),
    ("fp8_dynamic_first", "fp8_dynamic", None, "process", 0.6),
)
FIGURES = {
    "call": (("call_seconds", "wall"), ("call_cpu_seconds", "CPU")),
    "work": (("work_seconds", "wall"), ("work_cpu_seconds", "CPU")),
    "process": (("seconds", "wall"), ("cpu_seconds", "CPU"), ("peak_bytes", "peak memory")),
}
COSTS = (
    "call_seconds", "call_cpu_seconds", "work_seconds", "work_cpu_seconds", "import_seconds", "seconds", "cpu_seconds",
    "peak_bytes", "bytes",
)  # fmt: skip
# on the model with outliers, on calibration data: the first never worse than the second
NEVER_WORSE = (
    ("int8_smooth", "int8_dynamic"),
    ("fp8_lepto", "fp8_static"),
    ("fp8_lepto_extended", "fp8_static"),
)


def all_bars(rows: list[Row]) -> list[Row]:
    """Return every bar whose figures are there."""
    good = [row for row in rows if "error" not in row]
    found = []
    for model in dict.fromkeys(row["model"] for row in good):
        mine = [row for row in good if row["model"] == model]
        if model == "outliers":
            found += _never_worse(mine)
            continue
        found += _quality(model, mine)
        if model.startswith("bench-lm"):
            found += _speed(model, [row for row in mine if row["timed"]])
    return found


def _quality(model: str, rows: list[Row]) -> list[Row]:
    found = []
    for ours, theirs, goal in QUALITY:
        own = _figures(rows, ours, "kl", OURS)
        others = {tool: _figures(rows, theirs, "kl", tool) for tool in _tools(rows)}
        means = {tool: statistics.fmean(kl.values()) for tool, kl in others.items() if kl}
        if own and means:
            best = min(means, key=lambda tool: means[tool])
            seeds = own.keys() & others[best].keys()
            if not seeds:
                continue
            name = f"{model}, {ours}: KL over the best other's ({best}, {theirs})"
            ratio = sum(own[seed] for seed in seeds) / sum(others[best][seed] for seed in seeds)
            found.append(bar(name, ratio, goal, at_most=True))
    return found


def _speed(model: str, rows: list[Row]) -> list[Row]:
    found = []
    for ours, theirs, named, kind, goal in SPEED:
        for figure, word in FIGURES[kind]:
            own = _figures(rows, ours, figure, OURS)
            others = [
                _figures(rows, theirs, figure, tool) for tool in _tools(rows) if tool in (named or tool)
            ]
            if theirs == "fp8_dynamic":
                others.append(_figures(rows, "fp8_dynamic_model_free", figure, "llmcompressor"))
            best = {seed: min(part[seed] for part in others if seed in part) for seed in set().union(*others)}
            ratios = [own[seed] / best[seed] for seed in own if seed in best]
            if ratios:
                name = f"{model}, {ours}: {word} of the {kind} over {named or 'the best other'}'s {theirs}"
                found.append(bar(name, statistics.median(ratios), goal, at_most=True))
    return found


def gains(rows: list[Row]) -> list[Row]:
    """Return what each method gains over the plain one on the model with outliers: ratios of the KLs.

    Methods choose by the error of layers and blocks, not by this KL, so a single seed may go either way.
    """
    mine = [row for row in rows if row["model"] == "outliers" and "error" not in row]
    found = []
    for better, plain in NEVER_WORSE:
        line: Row = {"recipe": better, "over": plain}
        for figure, name in (("calibration_kl", "calibration"), ("kl", "held_out")):
            first, second = _figures(mine, better, figure, OURS), _figures(mine, plain, figure, OURS)
            ratios = [first[seed] / second[seed] for seed in first if seed in second]
            if ratios:
                line |= {f"{name}_mean": statistics.fmean(ratios), f"{name}_worst": max(ratios)}
        if "calibration_mean" in line:
            found.append(line)
    return found


def _never_worse(rows: list[Row]) -> list[Row]:
    return [
        bar(f"outliers, {line['recipe']}: KL on calibration data over {line['over']}'s, mean of the seeds",
            line["calibration_mean"], 1.0, at_most=True)
        for line in gains(rows)
    ]  # fmt: skip


def _tools(rows: list[Row]) -> list[str]:
    return sorted({row["tool"] for row in rows} - {OURS})


def _figures(rows: list[Row], recipe: str, figure: str, tool: str) -> dict[int, float]:
    return {row["seed"]: row[figure] for row in rows if row["recipe"] == recipe and row["tool"] == tool}


def summary(rows: list[Row]) -> list[Row]:
    """Return means over seeds of the quality figures, with the KL's spread, and medians of the costs."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if "error" not in row:
            groups[row["model"], row["recipe"], row["tool"]].append(row)
    return [_line(key, part) for key, part in groups.items()]


def _line(key: tuple[str, str, str], rows: list[Row]) -> Row:
    found: Row = dict(zip(("model", "recipe", "tool"), key, strict=True))
    found["seeds"] = len(rows)
    for figure in ("kl", "calibration_kl", "top1", "perplexity", "addition", "recall"):
        values = [row[figure] for row in rows if figure in row]
        if values:
            found[figure] = statistics.fmean(values)
    kls = [row["kl"] for row in rows]
    found["kl_spread"] = statistics.stdev(kls) if len(kls) > 1 else None
    timed = [row for row in rows if row["timed"]]
    for figure in COSTS if timed else ():
        found[figure] = statistics.median(row[figure] for row in timed)
    return found
