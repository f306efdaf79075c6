"""A recipe that trains as the objective of a sweep: each trial is a real training with the trial's overrides.

A trial trains on its share of the data and yields the loss on the held-back rows as it goes, so that `sweep.study` can
drop it early. The held-back rows are the same for every trial. Nothing but the trial's own folder is written, which
holds the checkpoint of its training; it goes when the trial has ended, and stays when the sweep is killed or stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base import parallel
from ..base.errors import ConfigError, Diverged
from ..config.recipe import load
from ..config.schema import Config
from ..sweep.space import Plan
from ..sweep.study import Budget
from .data import Data
from .follow import Training, packed, settled, tokens_of
from .job import TrainingJob, prepare_training
from .plan import seconds
from .run import open_training

SHARE = "dataset.share"


class Trials:
    """Trains a recipe with a trial's overrides in `folder`; call it as a sweep's objective."""

    def __init__(
        self, recipe: str, model: str | None, words: Sequence[str], plan: Plan, folder: Path
    ) -> None:
        """Refuse a recipe that does not train, and overrides of the plan that the recipe cannot have."""
        parallel.start()
        if parallel.world() > 1:
            raise ConfigError("A sweep runs in one process.", fix="Start it without torchrun.")
        resolved = load(recipe, words)
        config = resolved.config
        if not isinstance(config, Config) or not any(stage.trains for stage in config.compression):
            raise ConfigError(
                f"The recipe {recipe} trains nothing.", fix="Name one that does, such as seq_2bit."
            )
        if SHARE in plan.search:
            raise ConfigError(f"The plan searches {SHARE}.", fix="Leave it out; volumes lists the shares.")
        self.recipe, self.model, self.words = recipe, model, list(words)
        self.plan, self.folder = plan, folder
        self.base = prepare_training(resolved, model)
        for ends in (0, -1):
            self._job({name: knob.values[ends] for name, knob in plan.search.items()}, 1.0, 0)

    @property
    def identity(self) -> str:
        """Identify what is trained, whatever the plan."""
        return self.base.fingerprint()

    def __call__(self, overrides: Mapping[str, Any], budget: Budget) -> Iterator[tuple[int, float]]:
        """Train and yield (step, loss on the held-back rows); the first step is not worth a word."""
        job = self._job(overrides, budget.share, budget.seed)
        open_training(budget.folder, job.fingerprint(), overwrite=True)
        try:
            with closing(Training(job, budget.folder, self._data_folder(job)).looks()) as looks:
                for look in looks:
                    if look.step:
                        yield look.step, look.dev_loss
        except (GeneratorExit, Diverged):
            shutil.rmtree(budget.folder)
            raise
        shutil.rmtree(budget.folder)

    def _job(self, overrides: Mapping[str, Any], share: float, seed: int) -> TrainingJob:
        job = prepare_training(load(self.recipe, self._said({**overrides, SHARE: share})), self.model)
        return replace(job, settings=replace(job.settings, seed=seed))

    def _said(self, overrides: Mapping[str, Any]) -> list[str]:
        return [*self.words, *(f"{key}={json.dumps(value)}" for key, value in overrides.items())]

    def _data_folder(self, job: TrainingJob) -> Path:
        """Trials share what was packed, as long as they name one file."""
        named = f"{job.config.dataset.data_path} {self.base.settings.seed}"
        return self.folder / "data" / hashlib.sha256(named.encode()).hexdigest()[:8]

    def chosen(self, overrides: Mapping[str, Any]) -> str:
        """Return the whole recipe with the overrides, as YAML."""
        return load(self.recipe, self._said(overrides)).to_yaml()

    def announced(self) -> list[tuple[str, str]]:
        """Return what the sweep will do, as rows; packs the data."""
        plan, base = self.plan, self.base
        data = packed(base, self._data_folder(base))
        low = self._at(data, min(plan.volumes))
        volumes = [self._at(data, share) for share in plan.volumes]
        steps = [plan.trials * low[0], *(plan.seeds * each[0] for each in volumes)]
        tokens = plan.trials * low[1] + plan.seeds * sum(each[1] for each in volumes)
        count = base.source.checkpoint.parameters
        return [
            ("model", base.source.name),
            ("method", base.name),
            (
                "data",
                f"{data.rows.tokens:,} tokens, {len(data.dev['labels'])} rows of {base.length} held back",
            ),
            ("search", f"{plan.trials} trainings of {low[0]:,} steps on {min(plan.volumes):.0%} of the data"),
            *(
                (f"winner on {share:.0%}", f"{plan.seeds} x {each[0]:,} steps")
                for share, each in zip(plan.volumes, volumes, strict=True)
            ),
            ("all together", f"at most {sum(steps):,} steps, {tokens:,} tokens; hopeless trials stop early"),
            ("time", f"at most about {seconds(base, count, tokens) / 60:.1f} minutes"),
        ]

    def _at(self, data: Data, share: float) -> tuple[int, int]:
        """Return the steps and tokens of a training on a share of the data."""
        config = self.base.config
        dataset = config.dataset.model_copy(update={"share": share})
        job = replace(self.base, config=config.model_copy(update={"dataset": dataset}))
        settings = settled(job, replace(data, rows=replace(data.rows, share=share)))
        return settings.steps, tokens_of(job, settings)
