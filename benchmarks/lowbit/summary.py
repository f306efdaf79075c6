"""From the rows of single runs to means, paired differences, bars, tables and a figure. Computes on any machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from common import bar

from .earlier import FIRST, plain_name
from .study import DENSE, METHODS, PARTS, POST, RATES, RECOVERY, TITLES, Study

Rows = Mapping[str, dict[str, Any]]
FITTED = ("seq2_fit", "seq2_fit_cakld", "seq2_fit_g128_cakld")


def mean_sd(values: list[float]) -> dict[str, Any]:
    """Return mean, standard deviation over seeds (None for one) and the values themselves."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "each": values}


Place = tuple[str, int]  # the base that a run began with, and its seed: what figures are paired by


def runs_by_place(rows: Rows, method: str) -> dict[Place, dict[str, Any]]:
    """Return the final runs of a method; of post-training methods, those of the models trained on."""
    untrained = method in METHODS and METHODS[method].family == "untrained"
    kind = "ptq" if method in POST else "plain" if untrained else "final"
    return {
        (str(row.get("base") or FIRST), row["seed"]): row
        for name, row in sorted(rows.items())
        if row["kind"] == kind and row["method"] == method and not plain_name(name).endswith("-base")
    }


def finals(rows: Rows, method: str, key: str = "test") -> dict[Place, float]:
    """Return (base, seed) -> a score of a method's final runs."""
    return {place: row[key] for place, row in runs_by_place(rows, method).items() if key in row}


def difference(one: Mapping[Any, float], other: Mapping[Any, float]) -> dict[str, Any] | None:
    """Return ``one - other`` paired by base and seed, None without a common pair."""
    common = sorted(one.keys() & other.keys())
    return mean_sd([one[seed] - other[seed] for seed in common]) if common else None


def best_of(rows: Rows, family: str) -> str | None:
    """Return a family's method with the lowest mean dev loss of the final runs: variants are not chosen on test."""
    scores = {
        name: statistics.fmean(found.values())
        for name, method in METHODS.items()
        if method.family == family and (found := finals(rows, name, "dev"))
    }
    return min(scores, key=lambda name: scores[name]) if scores else None


def method_row(rows: Rows, name: str) -> dict[str, Any] | None:
    """Return all that is known of one method."""
    test = finals(rows, name)
    if not test:
        return None
    found: dict[str, Any] = {"method": name, "title": TITLES[name], "test": mean_sd(list(test.values()))}
    for key in ("dev", "bits_per_byte"):
        found[key] = mean_sd(list(finals(rows, name, key).values()))
    gap = difference(test, finals(rows, "fp"))
    found["gap_to_full_precision"] = gap
    found["bases"] = sorted({base for base, _ in test})
    runs = runs_by_place(rows, name)
    first = next((runs[place] for place in test if "looks" in runs[place]), runs[next(iter(test))])
    found["bits"] = first["bits"]
    trials = {
        f"{row['rate']:g}": row.get("dev")
        for row in rows.values()
        if row["kind"] == "trial" and row["method"] == name
    }
    if trials:
        found |= {"rate": first["rate"], "trials_dev": trials}
    if looks := first.get("looks"):
        found["mechanism"] = {"first": looks[0], "last": looks[-1], **_means(looks[1:])}
    without = {place: runs[place]["without_bias"]["test"] for place in test if "without_bias" in runs[place]}
    if without:
        found["without_bias_minus_with"] = difference(without, test)
        found["bias_beside_output"] = first["bias"]
    return found


def _means(looks: list[dict[str, float]]) -> dict[str, float]:
    """Mean over the looks after the first, of what changes between two looks, and of the rank."""
    keys = ("escaped", "changed", "fours_moved", "rank")
    return {
        f"mean_{key}": statistics.fmean(look[key] for look in looks)
        for key in keys
        if looks and all(key in look for look in looks)
    }


def differences(rows: Rows) -> list[dict[str, Any]]:
    """Return the paired differences that the claims are about; below zero the first is better."""
    ternary = [name for name, m in METHODS.items() if m.family == "ternary"]
    tequila = [name for name, m in METHODS.items() if m.family == "tequila"]
    arenas = [name for name, m in METHODS.items() if m.family == "arenas"]
    pairs = [(one, other) for one in (*tequila, *arenas, "sherry_none") for other in ternary]
    pairs += [(one, "sherry_none") for one in arenas]
    pairs += [(one, "llmqat") for one in ternary if one != "llmqat"]
    two = ("seq2", "seq2_cakld", *FITTED, "lsq2")
    pairs += [(one, other) for one in two for other in ("fp", *POST, DENSE)]
    pairs += [("seq2_cakld", "seq2"), ("seq2", "lsq2")]
    pairs += [(one, "sherry_none") for one in ("sherry_phase",)]
    pairs += [("sherry_phase", "sherry_cosine"), ("sherry_early", "sherry_cosine")]
    pairs += [("twn_phase", "twn"), ("twn_cakld", "twn"), ("twn_phase_cakld", "twn_cakld")]
    pairs += [
        ("seq2_fit_cakld", "seq2_cakld"),
        ("seq2_fit", "seq2"),
        ("seq2_fit_g128_cakld", "seq2_fit_cakld"),
    ]
    pairs += [("seq2_phase_cakld", "seq2_cakld"), ("absmean_int8", "absmean_tensor")]
    found = []
    for one, other in pairs:
        gap = difference(finals(rows, one), finals(rows, other))
        if gap is not None:
            found.append({"method": one, "minus": other, **gap})
    return found


def recovery(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return, for each method, share of the steps -> test loss over the full-precision model with all steps."""
    found: dict[str, dict[str, Any]] = {}
    full = finals(rows, "fp")
    for name in RECOVERY:
        curve = {}
        for part in PARTS:
            losses = {
                (str(row.get("base") or FIRST), row["seed"]): row["test"]
                for run, row in rows.items()
                if run.startswith(f"part-{name}-{part}-") and "test" in row
            }
            if gap := difference(losses, full):
                curve[str(part)] = gap
        if gap := difference(finals(rows, name), full):
            curve["100"] = gap
        if curve:
            found[name] = curve
    return found


def bars_of(rows: Rows) -> list[dict[str, Any]]:
    """Return what is expected to hold, each with its figure: those whose runs are there."""
    found = [*_ternary_bars(rows), *_two_bit_bars(rows)]
    for name in ("speed", "speed-compiled"):
        how = " (compiled)" if name == "speed-compiled" else ""
        for method, row in rows.get(name, {}).get("methods", {}).items():
            if method != "fp":
                found += _speed_bars(method, row, how)
        for method, row in rows.get(name, {}).get("wide", {}).get("methods", {}).items():
            if method != "fp":
                found += _speed_bars(method, row, f"{how}, wide layers")
    return found


def _speed_bars(method: str, row: dict[str, Any], how: str) -> list[dict[str, Any]]:
    title = f"step time over plain training{how}: {TITLES[method]}"
    found = [bar(title, row["ratio"], 1.25, at_most=True)]
    if "memory_ratio" in row:
        title = f"peak memory over plain training{how}: {TITLES[method]}"
        found.append(bar(title, row["memory_ratio"], 1.15, at_most=True))
    return found


def _ternary_bars(rows: Rows) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    ternary = [name for name, m in METHODS.items() if m.family == "ternary"]
    tequila, arenas = best_of(rows, "tequila"), best_of(rows, "arenas")
    for one, said in ((tequila, "below"), (arenas, "at or below")):
        for other in ternary if one else ():
            _add(found, rows, one, other, said)
    if arenas:
        _add(found, rows, arenas, "sherry_none", "below")
    for name in ternary:
        if name != "llmqat":
            _add(found, rows, name, "llmqat", "below")
    return found


def _add(found: list[dict[str, Any]], rows: Rows, one: str, other: str, said: str) -> None:
    gap = difference(finals(rows, one), finals(rows, other))
    if gap is not None:
        name = f"test nats a token: {TITLES[one]} {said} {TITLES[other]}"
        found.append(bar(name, gap["mean"], 0.0, at_most=True))


def _two_bit_bars(rows: Rows) -> list[dict[str, Any]]:
    """Where 2 bits lie on the way from INT4 (0) to the small dense model (1)."""
    found = []
    full = finals(rows, "fp")
    four, dense = difference(finals(rows, "int4_gptq"), full), difference(finals(rows, DENSE), full)
    for name in ("seq2", "seq2_cakld", "seq2_phase_cakld", *FITTED):
        two = difference(finals(rows, name), full)
        if two and four and dense:
            place = (two["mean"] - four["mean"]) / (dense["mean"] - four["mean"])
            title = f"{TITLES[name]}: place between INT4 GPTQ (0) and the dense model of its bytes (1)"
            found.append(bar(title, place, 0.25, at_most=True))
    return found


def setting(study: Study, rows: Rows) -> dict[str, Any]:
    """Return the sizes of the study and of its models."""
    tokens = study.rows * study.length
    return {
        "size": study.size,
        "tokens_a_step": tokens,
        "steps": {"before": study.base_steps, "trial": study.trial_steps, "training": study.steps},
        "tokens": {"before": study.base_steps * tokens, "training": study.steps * tokens},
        "rates": list(RATES),
        "model": vars(study.shape),
        "dense_model": vars(study.dense),
        "bytes_at_2_bits": study.shape.bytes(2 + 16 / study.shape.hidden),
        "bytes_of_dense_model": study.dense.bytes(16),
        "parameters": rows.get("base", {}).get("parameters"),
        "base": {key: rows["base"][key] for key in ("dev", "test", "bits_per_byte")}
        if "base" in rows
        else None,
    }


TABLE_2 = (
    "fp",
    "llmqat",
    "absmean_tensor",
    "absmean_g128",
    "twn",
    "twn_g128",
    "seq_ternary",
    "seq_ternary_g128",
)
TABLE_2_END = (
    "tequila_1e-3",
    "tequila_1e-2",
    "tequila_1e-1",
    "sherry_none",
    "sherry_linear",
    "sherry_cosine",
    "sherry_exponential",
    "sherry_early",
    "absmean_int8",
    "twn_cakld",
    "sherry_phase",
    "twn_phase",
    "twn_phase_cakld",
)
TABLE_1 = ("fp", DENSE, "int4_rtn", "int4_gptq", "seq2", "seq2_cakld", "seq2_phase_cakld")
TABLE_1_END = (*FITTED, "lsq2", "rtn_2bit")


def tables(methods: list[dict[str, Any]]) -> str:
    """Return two Markdown tables in the order of the report's."""
    by_name = {row["method"]: row for row in methods}
    second = (*TABLE_2, *TABLE_2_END, "rtn_ternary")
    return "\n\n".join(
        f"{title}\n\n{_table([by_name[name] for name in names if name in by_name])}"
        for title, names in (
            ("Ternary (as Table 2)", second),
            ("Two bits (as Table 1)", TABLE_1 + TABLE_1_END),
        )
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | bits a weight | rate | test nats/token | bits/byte | over full precision |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        gap = row["gap_to_full_precision"]
        lines.append(
            f"| {row['title']} | {row['bits']:.2f} | {row.get('rate', 0) or '':} | {_said(row['test'])} "
            f"| {_said(row['bits_per_byte'])} | {_said(gap, '+') if gap else ''} |"
        )
    return "\n".join(lines)


def _said(found: Mapping[str, Any], sign: str = "") -> str:
    spread = "" if found["sd"] is None else f" ± {found['sd']:.4f}"
    return f"{found['mean']:{sign}.4f}{spread}"


def whole(study: Study, rows: Rows) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (raw, bars) of the results file."""
    names = [*METHODS, *POST, DENSE]
    methods = [row for name in names if (row := method_row(rows, name)) is not None]
    raw = {
        "setting": setting(study, rows),
        "chosen_on_dev": {family: best_of(rows, family) for family in ("tequila", "arenas")},
        "methods": methods,
        "differences": differences(rows),
        "recovery": recovery(rows),
        "diverged": sorted(name for name, row in rows.items() if "diverged" in row),
        "speed": {name: rows[name] for name in ("speed", "speed-compiled") if name in rows},
        "rows": {name: row for name, row in rows.items() if not name.startswith("speed")},
    }
    return raw, bars_of(rows)
