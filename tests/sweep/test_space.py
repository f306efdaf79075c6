"""Plans as YAML: what they may hold, and one clear error for what they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from angelslim.base.errors import ConfigError
from angelslim.sweep.space import Knob, Plan, plan_from, read_plan

TEXT = """
search:
  a.lr: {log: [1e-4, 1e-2]}
  a.decay: {uniform: [0, 0.5]}
  a.warmup: {int: [0, 100]}
  a.schedule: [cosine, wsd]
trials: 5
volumes: [0.7, 0.3]
"""


def test_a_plan_is_read(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(TEXT)
    plan = read_plan(tmp_path / "plan.yaml")
    knobs = {
        "a.lr": Knob("log", (1e-4, 1e-2)),
        "a.decay": Knob("uniform", (0, 0.5)),
        "a.warmup": Knob("int", (0, 100)),
        "a.schedule": Knob("choice", ("cosine", "wsd")),
    }
    assert plan == Plan(knobs, trials=5, volumes=(0.3, 0.7))


def test_values_lie_in_their_ranges() -> None:
    import optuna

    plan = plan_from({"search": {"lr": {"log": [1e-4, 1e-2]}, "n": {"int": [2, 4]}, "c": ["x", True, 3]}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(60):
        trial = study.ask()
        drawn.append({name: knob.suggest(trial, name) for name, knob in plan.search.items()})
        study.tell(trial, 0.0)
    assert all(1e-4 <= row["lr"] <= 1e-2 for row in drawn)
    assert 15 < sum(row["lr"] < 1e-3 for row in drawn) < 45, "half of a log-uniform range"
    assert {row["n"] for row in drawn} == {2, 3, 4} and {row["c"] for row in drawn} == {"x", True, 3}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "search is missing"),
        ({"search": {"a": [1]}, "trails": 3}, "'trails'. Did you mean 'trials'"),
        ({"search": {"a": {"lgo": [1, 2]}}}, "search.a: .* is no range"),
        ({"search": {"a": {"log": [0, 2]}}}, "leaves the positive numbers"),
        ({"search": {"a": {"int": [1, 2.5]}}}, "no two ends of kind int"),
        ({"search": {"a": {"uniform": [3, 2]}}}, "from 3 to 2 is empty"),
        ({"search": {"a": []}}, "is no list"),
        ({"search": {"a": [[1]]}}, "a choice must be"),
        ({"search": {"a": [1]}, "volumes": [30, 50]}, "shares above 0 and up to 1"),
        ({"search": {"a": [1]}, "trials": 0}, "trials is 0. Give a whole number of at least 1"),
        ({"search": {"a": [1]}, "tolerance": "x"}, "tolerance is 'x'"),
    ],
)
def test_what_is_wrong_is_named(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_from(data, "plan.yaml")
