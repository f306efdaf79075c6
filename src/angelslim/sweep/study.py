"""The search of hyper-parameters: optuna's tree of Parzen estimators, and trials behind the median stop early.

The objective yields dev losses while it trains; a trial whose loss is worse than the median of the earlier trials at the
same step is stopped there (median pruning, the rule of Google Vizier). A trial counts with its *last* dev loss, not its
best: that is what training with these settings ends with.

The study lives in ``study.db`` (SQLite) in the folder. Trial number n samples with a seed of its own, so a killed
study, which repeats the trial it was in, goes on as if nothing had happened. The objective gets the same folder
again, and resumes its training there if it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import console
from ..base.errors import ConfigError, Diverged, MissingExtra
from ..report.sweep import Trial
from .space import Plan


@dataclass(frozen=True)
class Budget:
    """What one training may use: a share of the data, and a folder of its own."""

    share: float
    seed: int
    folder: Path


# Overrides and budget in, (step, dev loss) out while it trains; it may be dropped at any step.
Objective = Callable[[dict[str, Any], Budget], Iterable[tuple[int, float]]]


def search(plan: Plan, objective: Objective, folder: Path) -> list[Trial]:
    """Run what is missing of the plan's trials and return all of them."""
    optuna = _optuna()
    states = optuna.trial.TrialState
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="search",
        storage=f"sqlite:///{(folder / 'study.db').resolve()}",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=plan.patience),
        load_if_exists=True,
    )
    for left in study.get_trials(states=(states.RUNNING,)):
        study.tell(left.number, state=states.FAIL)  # a killed run was in it
    done = len(study.get_trials(states=(states.COMPLETE, states.PRUNED)))
    with console.bar("trials", max(plan.trials - done, 0)) as bar:
        for place in range(done, plan.trials):
            study.sampler = optuna.samplers.TPESampler(seed=plan.seed * 1_000_003 + place)
            trial = study.ask()
            overrides = {name: knob.suggest(trial, name) for name, knob in plan.search.items()}
            budget = Budget(min(plan.volumes), plan.seed, folder / "trials" / f"{place:03d}")
            outcome = _run(trial, objective(overrides, budget))
            trial.set_user_attr("outcome", outcome)
            study.tell(
                trial,
                state=states.PRUNED if outcome != "finished" else None,
                values=_last(study, trial, outcome),
            )
            bar.advance(outcome)
    finished = study.get_trials(states=(states.COMPLETE, states.PRUNED))
    return [_record(place, trial) for place, trial in enumerate(finished)]


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MissingExtra("optuna", "sweep", "A sweep") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _run(trial: Any, losses: Iterable[tuple[int, float]]) -> str:
    """Follow one training; return how it ended."""
    steps = iter(losses)
    seen = 0
    try:
        for step, loss in steps:
            if not math.isfinite(loss):
                return "diverged"
            trial.report(float(loss), step)
            seen += 1
            if trial.should_prune():
                return "stopped early"
    except Diverged:
        return "diverged"
    finally:
        if hasattr(steps, "close"):
            steps.close()
    if not seen:
        raise ConfigError("The training gave no dev loss.", fix="Evaluate at least once, at its end.")
    return "finished"


def _last(study: Any, trial: Any, outcome: str) -> float | None:
    if outcome != "finished":
        return None
    curve = next(t for t in study.get_trials(deepcopy=False) if t.number == trial.number).intermediate_values
    return float(curve[max(curve)])


def _record(place: int, trial: Any) -> Trial:
    return Trial(
        place,
        dict(trial.params),
        trial.user_attrs["outcome"],
        dict(sorted(trial.intermediate_values.items())),
    )


def best(trials: list[Trial]) -> Trial:
    """Return the finished trial with the lowest dev loss."""
    finished = [trial for trial in trials if trial.outcome == "finished"]
    if not finished:
        raise ConfigError(
            f"None of {len(trials)} trials came to its end.",
            fix="Narrow the ranges, or lower the learning rates.",
        )
    return min(finished, key=lambda trial: trial.loss)
