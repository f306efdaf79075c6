"""A whole sweep: search, data volumes, the chosen recipe and the page. The same call continues a killed one.

The folder afterwards::

    chosen.yaml     the recipe: the best overrides, and the share of the data that is enough
    sweep.json      every trial and every run, with their curves
    sweep.html      the page
    study.db, plan.json, volumes.json, trials/, volumes/     the state
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..base import console
from ..base.errors import ConfigError, Diverged
from ..config.files import write_yaml
from ..models.checkpoint import write_atomically
from ..report.sweep import Sweep, Trial, VolumeRun, sweep_html
from .space import Plan
from .study import Budget, Objective, Workers, best, search

CHOSEN, RESULT, PAGE = "chosen.yaml", "sweep.json", "sweep.html"


def run(
    plan: Plan,
    objective: Objective,
    folder: Path,
    *,
    base: str | None = None,
    share_key: str | None = None,
    merged: Callable[[dict[str, Any]], str] | None = None,
    of: str = "",
    title: str = "sweep",
    workers: Workers | None = None,
) -> Sweep:
    """Search, try the volumes and write the results.

    `base` is the recipe that the overrides change, `share_key` the override that sets the share of the data; both
    go into ``chosen.yaml``. `merged` makes the text of that file from all overrides where extending `base` is not
    enough. `workers` search in several processes; the volumes are tried in this one. `of` identifies what is trained: a folder that was begun with another, or with another search, is a
    `ConfigError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_plan({**plan.identity(), **({"of": of} if of else {})}, folder / "plan.json")
    trials = search(plan, objective, folder, workers)
    winner = best(trials)
    runs = _volumes(plan, winner, objective, folder)
    share, why = _enough(plan, runs)
    console.chose(f"{share:.0%} of the data", why)
    knobs = {name: knob.kind for name, knob in plan.search.items()}
    found = Sweep(title, knobs, trials, runs, winner.number, share, why)
    write_atomically(folder / RESULT, json.dumps(asdict(found), indent=1).encode())
    write_atomically(folder / CHOSEN, chosen_recipe(found, base, share_key, merged).encode())
    write_atomically(folder / PAGE, sweep_html(found).encode())
    return found


def _same_plan(identity: dict[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(identity))
    if not path.is_file():
        write_atomically(path, json.dumps(now, indent=1).encode())
    elif json.loads(path.read_text("utf-8")) != now:
        raise ConfigError(
            "The folder holds a sweep of another plan, recipe, model or data.",
            where=str(path.parent),
            fix="Name another folder or remove it.",
        )


def _volumes(plan: Plan, winner: Trial, objective: Objective, folder: Path) -> list[VolumeRun]:
    """Train the winner on every share of the data with every seed; finished runs are kept in ``volumes.json``.

    The smallest share with the first seed is what the search trained: that run is taken as it is.
    """
    path = folder / "volumes.json"
    kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    searched = json.dumps([winner.overrides, min(plan.volumes), plan.seed], sort_keys=True)
    kept.setdefault(searched, list(winner.curve.items()))
    found = []
    for share in plan.volumes:
        for seed in range(plan.seed, plan.seed + plan.seeds):
            name = json.dumps([winner.overrides, share, seed], sort_keys=True)
            if name not in kept:
                number = f"{len(kept):03d}"
                budget = Budget(share, seed, folder / "volumes" / number)
                kept[name] = _losses(objective(winner.overrides, budget))
                write_atomically(path, json.dumps(kept, indent=1).encode())
            found.append(VolumeRun(share, seed, {int(step): loss for step, loss in kept[name]}))
    return found


def _losses(pairs: Any) -> list[tuple[int, float]]:
    """Return a training's dev losses; none when it diverged."""
    found: list[tuple[int, float]] = []
    try:
        for step, loss in pairs:
            if not math.isfinite(loss):
                return []
            found.append((step, float(loss)))
    except Diverged:
        return []
    return found


def _enough(plan: Plan, runs: list[VolumeRun]) -> tuple[float, str]:
    """Choose the smallest share whose mean dev loss is within the tolerance of the best one."""
    means = {}
    for share in plan.volumes:
        losses = [run.loss for run in runs if run.share == share]
        if all(loss is not None for loss in losses):
            means[share] = sum(loss for loss in losses if loss is not None) / len(losses)
    if not means:
        raise ConfigError(
            "The best trial diverged at every volume.", fix="Lower the learning rates of the search."
        )
    lowest = min(means.values())
    share = min(s for s, mean in means.items() if mean <= lowest + plan.tolerance * abs(lowest))
    return share, f"its dev loss {means[share]:.4f} is within {plan.tolerance:.1%} of the best, {lowest:.4f}"


def chosen_recipe(
    found: Sweep,
    base: str | None,
    share_key: str | None,
    merged: Callable[[dict[str, Any]], str] | None = None,
) -> str:
    """Write the chosen overrides as a recipe."""
    head = f"# Trial {found.chosen} of {len(found.trials)}; {found.share:.0%} of the data: {found.why}.\n"
    overrides = dict(found.trials[found.chosen].overrides)
    if share_key is not None:
        overrides[share_key] = found.share
    if merged is not None:
        return head + merged(overrides)
    recipe: dict[str, Any] = {} if base is None else {"extends": base}
    for path, value in overrides.items():
        *sections, key = path.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return head + write_yaml(recipe)
