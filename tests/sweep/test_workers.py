"""Several workers on one search: as many trials as the plan says, each trained once, whatever becomes of a worker."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import pytest

from angelslim.base.errors import ConfigError, MissingExtra
from angelslim.report.sweep import Sweep
from angelslim.sweep.run import run
from angelslim.sweep.space import Plan, plan_from
from angelslim.sweep.study import Budget, Objective
from angelslim.sweep.workers import Workers, _devices, work

PLAN = plan_from({"search": {"lr": {"uniform": [0.0, 1.0]}}, "trials": 7, "volumes": [0.5], "patience": 2})


@dataclass(frozen=True)
class Threads:
    """Workers as threads: the same study, opened by each."""

    make: Callable[[], Objective]
    count: int = 3

    def search(self, plan: Plan, folder: Path) -> None:
        with ThreadPoolExecutor(self.count) as pool:
            for done in [pool.submit(work, self.make, plan, folder) for _ in range(self.count)]:
                done.result()


class Bowl:
    """A loss that falls to (lr - 0.3)^2; the first trials of all workers run at the same time."""

    def __init__(self, together: int = 1) -> None:
        self.meet, self.folders, self.overrides = Barrier(together), [], []  # type: ignore[var-annotated]

    def __call__(self, overrides: dict[str, Any], budget: Budget) -> Iterator[tuple[int, float]]:
        self.folders.append(budget.folder)
        self.overrides.append(overrides["lr"])
        if len(self.folders) <= self.meet.parties:
            self.meet.wait(60)
        for step in (1, 2, 3):
            yield step, (overrides["lr"] - 0.3) ** 2 + 1 / step


def swept(folder: Path, bowl: Any, count: int = 3, plan: Plan = PLAN) -> Sweep:
    return run(plan, bowl, folder, workers=Threads(lambda: bowl, count))


def test_workers_share_the_trials_of_the_plan(tmp_path: Path) -> None:
    bowl = Bowl(together=3)
    found = swept(tmp_path, bowl)
    assert len(found.trials) == len(bowl.folders) == 7, "the search's smallest volume is the winner's run"
    assert len(set(bowl.folders)) == 7 and len(set(bowl.overrides)) == 7
    best = min((t for t in found.trials if t.outcome == "finished"), key=lambda trial: trial.loss)
    assert found.chosen == best.number
    states = {
        t.state.name
        for t in optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/study.db").trials
    }
    assert states <= {"COMPLETE", "PRUNED", "FAIL"}


def test_a_finished_search_starts_no_worker(tmp_path: Path) -> None:
    first = swept(tmp_path, Bowl())
    bowl = Bowl()
    again = swept(tmp_path, bowl)
    assert not bowl.folders and again.trials == first.trials
    more = swept(tmp_path, bowl, plan=replace(PLAN, trials=9))
    assert len(more.trials) == 9 and len(bowl.folders) == 2


def test_what_a_worker_leaves_is_trained_by_the_caller(tmp_path: Path) -> None:
    class Fragile(Bowl):
        def __call__(self, overrides: dict[str, Any], budget: Budget) -> Iterator[tuple[int, float]]:
            if len(self.folders) in (1, 3):
                self.folders.append(budget.folder)
                raise ConfigError("This worker has a bad day.")
            return super().__call__(overrides, budget)

    assert len(swept(tmp_path, Fragile(), count=2).trials) == 7


def test_an_error_of_all_is_one_error(tmp_path: Path) -> None:
    def hopeless(_overrides: Any, _budget: Budget) -> Any:
        raise ConfigError("No such model.")

    with pytest.raises(ConfigError, match="No such model"):
        swept(tmp_path, hopeless)


def test_workers_take_turns_on_the_gpus_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert _devices() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _devices() == []


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"angelslim\[ray\]"):
        run(PLAN, Bowl(), tmp_path, workers=Workers(2, Bowl, ray=True))


def test_tasks_of_a_cluster_are_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for Ray that carries a task out when its result is asked for; one task is lost."""
    lost = []

    class Cluster:
        class exceptions:
            class RayError(Exception):
                pass

        init = staticmethod(lambda **_options: None)
        shutdown = staticmethod(lambda: None)
        is_initialized = staticmethod(lambda: False)
        cluster_resources = staticmethod(lambda: {"CPU": 4.0})
        wait = staticmethod(lambda waiting: (waiting[:1], waiting[1:]))

        @staticmethod
        def remote(**options: Any) -> Any:
            assert options == {"num_gpus": 0}

            def task(function: Any) -> Any:
                function.remote = lambda *args: partial(function, *args)
                return function

            return task

        @staticmethod
        def get(tasks: list[Any]) -> None:
            if not lost:
                lost.append(tasks[0])
                raise Cluster.exceptions.RayError
            tasks[0]()

    monkeypatch.setitem(sys.modules, "ray", Cluster)
    bowl = Bowl()
    found = run(PLAN, bowl, tmp_path, workers=Workers(2, lambda: bowl, ray=True))
    assert len(found.trials) == 7 and len(lost) == 1
