"""Results of an earlier machine beside those of this one: what may be compared, and what need not be done again.

The model that everything starts from is trained anew in a fresh work folder, and a GPU does not sum twice in the same
order: its weights are others, its loss differs in the third digit. So every row carries the ``base`` it started from, a
hash of the weights, and figures are paired within one base alone: a method's loss minus that of the full-precision model
that was trained on *from the same base with the same batches*. Such differences of several bases are drawn together; the
losses themselves are not compared across bases. A seed of one method counts once for each base.

The choice of a learning rate is taken over: it was made with equal trials for each method, and is no score.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIRST = "first"  # the base of rows that were written before bases had names


def read(path: Path, setting: dict[str, Any], corpus: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the rows of a results file, and why they cannot be used when there are none.

    Another size, other step counts or another corpus make another study.
    """
    if not path.is_file():
        return {}, "there is no results file"
    raw = json.loads(path.read_text("utf-8"))["raw"]
    for key in ("size", "tokens_a_step", "steps", "model"):
        if raw["setting"][key] != setting[key]:
            return {}, f"its {key} is {raw['setting'][key]}"
    corpora = {row["corpus"] for row in raw["rows"].values()}
    if corpora - {corpus}:
        return {}, f"its corpus is {', '.join(sorted(corpora))}, this one's {corpus}"
    return {**{name: {"base": FIRST, **row} for name, row in raw["rows"].items()}, **raw.get("speed", {})}, ""


def plain_name(name: str) -> str:
    """Return a run's name without that of its base."""
    return name.partition("@")[0]


def together(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the rows of both; a run of a base that the old rows do not begin with has the base in its name."""
    found = dict(old)
    first = old["base"]["base"] if "base" in old else None
    for name, row in new.items():
        other = first is not None and row["kind"] != "speed" and row.get("base") not in (None, first)
        found[f"{name}@{row['base']}" if other else name] = row
    return found


def tried(old: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the trials of learning rates by run."""
    return {name: row for name, row in old.items() if row["kind"] == "trial" and "@" not in name}


def finished(old: dict[str, dict[str, Any]]) -> set[str]:
    """Return the runs that were done from some base, but those of full precision, which every base needs."""
    return {
        plain_name(name)
        for name, row in old.items()
        if row["kind"] not in ("base", "speed") and row["method"] != "fp"
    }
