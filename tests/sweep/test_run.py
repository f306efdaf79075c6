"""A whole sweep over a small real regression: early stops, kills, data volumes, the files it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from angelslim.base.errors import ConfigError, Diverged, MissingExtra
from angelslim.config.files import read_yaml
from angelslim.report.sweep import Sweep
from angelslim.sweep.run import CHOSEN, PAGE, RESULT, run
from angelslim.sweep.space import Plan, plan_from
from angelslim.sweep.study import Budget
from tiny import Killed

PLAN = plan_from(
    {
        "search": {
            "train.lr": {"log": [1e-3, 30.0]},
            "train.momentum": [0.0, 0.5],
            "train.batch": {"int": [4, 16]},
        },
        "trials": 8,
        "volumes": [0.3, 0.5, 0.7],
        "patience": 3,
    }
)
ROWS, STEPS, EVERY = 200, 60, 10
Overrides = dict[str, Any]


class Regression:
    """Linear regression by stochastic gradient descent; a large rate blows up, a small one is slow."""

    def __init__(self) -> None:
        make = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 6, generator=make)
        self.y = self.x @ torch.arange(6.0) + 0.5 * torch.randn(ROWS, generator=make)
        self.calls: list[tuple[Overrides, Budget]] = []
        self.evaluations = 0

    def __call__(self, overrides: Overrides, budget: Budget) -> Iterator[tuple[int, float]]:
        self.calls.append((overrides, budget))
        train, dev = self.x[:150][: int(150 * budget.share)], slice(150, ROWS)
        weight = torch.zeros(6, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=overrides["train.lr"], momentum=overrides["train.momentum"])
        draw = torch.Generator().manual_seed(budget.seed)
        for step in range(STEPS):
            chosen = torch.randint(len(train), (overrides["train.batch"],), generator=draw)
            loss = (self.x[chosen] @ weight - self.y[chosen]).square().mean()
            if not loss.isfinite():
                raise Diverged("The loss is nan.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % EVERY == 0:
                self.evaluations += 1
                yield step + 1, (self.x[dev] @ weight - self.y[dev]).square().mean().item()


def facts(found: Sweep) -> Any:
    return found.trials, found.volumes, found.chosen, found.share


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path, Regression]:
    folder, objective = tmp_path_factory.mktemp("sweep"), Regression()
    return run(PLAN, objective, folder, base="qat", share_key="dataset.share"), folder, objective


def test_the_best_trial_is_the_lowest_last_loss_and_near_the_noise(swept: Any) -> None:
    found, _, objective = swept
    assert len(found.trials) == 8
    finished = [trial.loss for trial in found.trials if trial.outcome == "finished"]
    assert found.trials[found.chosen].loss == min(finished) < 0.5  # noise alone is 0.25
    assert all(budget.share == 0.3 for _, budget in objective.calls[:8])


def test_hopeless_trials_stop_early_or_count_as_diverged(swept: Any) -> None:
    found, _, objective = swept
    outcomes = [trial.outcome for trial in found.trials]
    assert {"finished", "stopped early"} <= set(outcomes)
    early = [trial for trial in found.trials if trial.outcome == "stopped early"]
    assert all(max(trial.curve) < STEPS for trial in early)
    assert objective.evaluations < (8 + 3) * STEPS // EVERY


def test_the_winner_runs_at_every_volume_and_the_smallest_that_is_enough_wins(swept: Any) -> None:
    found, _, objective = swept
    winner = found.trials[found.chosen].overrides
    assert [(overrides, budget.share) for overrides, budget in objective.calls[8:]] == [
        (winner, share) for share in (0.5, 0.7)
    ], "the search has trained the smallest already"
    assert found.volumes[0].curve == found.trials[found.chosen].curve
    losses = {run.share: run.loss for run in found.volumes}
    good = [share for share, loss in losses.items() if loss <= 1.01 * min(losses.values())]
    assert found.share == min(good)


def test_the_files(swept: Any) -> None:
    found, folder, _ = swept
    recipe = read_yaml(folder / CHOSEN)
    winner = found.trials[found.chosen].overrides
    assert recipe == {
        "extends": "qat",
        "train": {name.removeprefix("train."): value for name, value in winner.items()},
        "dataset": {"share": found.share},
    }
    assert len(json.loads((folder / RESULT).read_text())["trials"]) == 8
    page = (folder / PAGE).read_text()
    assert page.count("<svg") == 5 and "stopped early" in page and "http" not in page


def test_a_finished_sweep_trains_nothing_and_more_trials_go_on(swept: Any) -> None:
    found, folder, _ = swept
    again = Regression()
    assert facts(run(PLAN, again, folder)) == facts(found) and not again.calls
    more = run(replace(PLAN, trials=9), again, folder)
    assert more.trials[:8] == found.trials and len(more.trials) == 9


def test_a_killed_sweep_ends_as_if_it_had_not_been(swept: Any, tmp_path: Path) -> None:
    dying = Regression()

    def objective(overrides: Overrides, budget: Budget) -> Iterator[tuple[int, float]]:
        for pair in dying(overrides, budget):
            if dying.evaluations == 27:
                dying.evaluations += 1
                raise Killed
            yield pair

    with pytest.raises(Killed):
        run(PLAN, objective, tmp_path)
    last = dying.calls[-1]
    found = run(PLAN, objective, tmp_path)
    assert facts(found) == facts(swept[0])
    following = dying.calls[len(dying.calls) - dying.calls[::-1].index(last) - 1]
    assert following[1].folder == last[1].folder, "the same folder, to resume in"
    assert sum(call == last for call in dying.calls) == 2


def test_another_plan_in_the_same_folder_is_refused(swept: Any) -> None:
    with pytest.raises(ConfigError, match="another plan"):
        run(replace(PLAN, seed=1), Regression(), swept[1])


def constant(loss: float) -> Any:
    return lambda overrides, budget: [(1, loss)]


SMALL = Plan(PLAN.search, trials=2, volumes=(0.5, 1.0))


def test_a_list_of_losses_is_fine_and_ties_take_the_least_data(tmp_path: Path) -> None:
    assert run(SMALL, constant(1.0), tmp_path).share == 0.5


def test_nothing_that_comes_to_its_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="None of 2 trials"):
        run(SMALL, constant(float("nan")), tmp_path / "nan")
    with pytest.raises(ConfigError, match="no dev loss"):
        run(SMALL, lambda *_: [], tmp_path / "none")
    with pytest.raises(ConfigError, match="diverged at every volume"):
        run(
            replace(SMALL, seeds=2),  # the search has the first at the smallest volume
            lambda o, b: [(1, 1.0 if "trials" in b.folder.parts else float("inf"))],
            tmp_path / "volumes",
        )


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"angelslim\[sweep\]"):
        run(SMALL, constant(1.0), tmp_path)
