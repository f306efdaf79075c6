"""A search by tasks of a real Ray cluster of this machine, two workers on one study."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from angelslim.sweep.run import run
from angelslim.sweep.space import plan_from
from angelslim.sweep.study import Budget, Objective
from angelslim.sweep.workers import Workers

ray = pytest.importorskip("ray")
PLAN = plan_from({"search": {"lr": {"uniform": [0.0, 1.0]}}, "trials": 4, "volumes": [0.5], "patience": 4})


def test_two_tasks_share_the_trials_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def make() -> Objective:  # pickled by value: a worker need not find this file
        def bowl(overrides: dict[str, Any], budget: Budget) -> Iterator[tuple[int, float]]:
            budget.folder.mkdir(parents=True, exist_ok=True)
            (budget.folder / f"by-{os.getpid()}").touch()
            for step in (1, 2, 3):
                yield step, (overrides["lr"] - 0.3) ** 2 + 1 / step

        return bowl

    found = run(PLAN, make(), tmp_path, workers=Workers(2, make, ray=True))
    assert len(found.trials) == 4 and not ray.is_initialized(), "the cluster that it started is gone"

    trained = {path.name for path in tmp_path.rglob("by-*")}
    assert trained and f"by-{os.getpid()}" not in trained, "the tasks trained, not their caller"
