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
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


WAIT = 120  # seconds for another process's lock on the database


class Workers(Protocol):
    """Other processes that carry out trials of the folder's study (`workers`)."""

    def search(self, plan: Plan, folder: Path) -> None:
        """Run the trials that are missing."""


# Overrides and budget in, (step, dev loss) out while it trains; it may be dropped at any step.
Objective = Callable[[dict[str, Any], Budget], Iterable[tuple[int, float]]]


def search(plan: Plan, objective: Objective, folder: Path, workers: Workers | None = None) -> list[Trial]:
    """Run what is missing of the plan's trials and return all of them; first by `workers`, where there are some."""
    study = open_study(plan, folder)
    states = _optuna().trial.TrialState
    for left in study.get_trials(states=(states.RUNNING,)):
        study.tell(left.number, state=states.FAIL)  # a killed run was in it
    ended = (states.COMPLETE, states.PRUNED)
    if workers is not None and len(study.get_trials(states=ended)) < plan.trials:
        shutil.rmtree(
            folder / "trials", ignore_errors=True
        )  # of killed trials, which others take the place of
        workers.search(plan, folder)
        for left in study.get_trials(states=(states.RUNNING,)):
            study.tell(left.number, state=states.FAIL)
    done = len(study.get_trials(states=ended))
    with console.bar("trials", max(plan.trials - done, 0)) as bar:
        for place in range(done, plan.trials):
            study.sampler = _sampler(plan, place)
            bar.advance(_carry_out(study, study.ask(), plan, objective, folder / "trials" / f"{place:03d}"))
    return [_record(place, trial) for place, trial in enumerate(study.get_trials(states=ended))]


def open_study(plan: Plan, folder: Path) -> Any:
    """Open the folder's study, or begin it."""
    optuna = _optuna()
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{(folder / 'study.db').resolve()}",
        engine_kwargs={"connect_args": {"timeout": WAIT}},
    )
    return optuna.create_study(
        study_name="search",
        storage=storage,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=plan.patience),
        load_if_exists=True,
    )


def take_trial(study: Any, plan: Plan, objective: Objective, folder: Path) -> bool:
    """Train one trial beside other processes; False if the plan has no room for another one."""
    states = _optuna().trial.TrialState
    trial = study.ask()
    study.sampler = _sampler(plan, trial.number, others=True)  # by its number: no two draw the same values
    before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
    if sum(t.state != states.FAIL for t in before) >= plan.trials:
        study.tell(trial, state=states.FAIL)
        return False
    try:
        _carry_out(study, trial, plan, objective, folder / "trials" / f"{trial.number:03d}")
    except BaseException:
        study.tell(trial, state=states.FAIL, skip_if_finished=True)
        raise
    return True


def _sampler(plan: Plan, place: int, others: bool = False) -> Any:
    seed = plan.seed * 1_000_003 + place
    return _optuna().samplers.TPESampler(seed=seed, constant_liar=others)


def _carry_out(study: Any, trial: Any, plan: Plan, objective: Objective, folder: Path) -> str:
    """Train one trial and tell the study how it ended."""
    overrides = {name: knob.suggest(trial, name) for name, knob in plan.search.items()}
    outcome = _run(trial, objective(overrides, Budget(min(plan.volumes), plan.seed, folder)))
    trial.set_user_attr("outcome", outcome)
    study.tell(
        trial,
        state=_optuna().trial.TrialState.PRUNED if outcome != "finished" else None,
        values=_last(study, trial, outcome),
    )
    return outcome


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
