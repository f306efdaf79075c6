"""The table of sparse quality compares what is equal and counts what dense attention can do."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from angelslim.lab.long.score import FAMILIES, TEXT, Result


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module("sparse_quality")


def row(study: Any, name: str, budget: str, right: float) -> Any:
    values = tuple([1.0] * round(10 * right) + [0.0] * round(10 - 10 * right))
    results = {family: Result(family, 64, values) for family in (*FAMILIES, TEXT)}
    return study.Row(name, budget, 0.1, 1.0, results)


def test_every_selector_meets_every_budget(study: Any) -> None:
    made = list(study.configurations((0.1, 0.2), ["stem", "union"]))
    assert [(name, budget) for name, budget, _, _ in made][:3] == [
        ("stem", "0.10"),
        ("stem", "0.20"),
        ("stem", study.NATIVE),
    ]
    assert len(made) == 2 * 3 + 2 * 2
    assert made[-1] == ("stem without OAM", "0.20", "stem", {"density": 0.2, "oam": False})


def test_differences_are_of_paired_rows_at_equal_density(study: Any) -> None:
    rows = [
        row(study, name, budget, right)
        for name, right in (("stem", 0.6), ("uniform", 0.4), ("union", 0.9), ("oracle", 1.0))
        for budget in ("0.10", "0.20")
    ]
    found = study.compare(rows, (0.1, 0.2), ["needle", "middle"])
    assert set(found) == {"stem - uniform", "union - stem", "union - uniform"}
    apart = found["union - stem"]["all"]
    assert apart["points"] == pytest.approx(30.0) and apart["low"] < 30 < apart["high"]
    assert found["stem - uniform"]["0.10"]["points"] == pytest.approx(20.0)
    same = study.difference(rows[:2], rows[:2], ["needle"])
    assert same == (0.0, 0.0, 0.0)


def test_the_table_marks_what_does_not_count(study: Any) -> None:
    table = study.markdown([row(study, "dense", "–", 0.5)], ["needle"])
    assert "(copy)" in table and "(needle)" not in table and "| dense | – | 0.100 |" in table
