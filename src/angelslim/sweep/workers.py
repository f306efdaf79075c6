"""Several processes on one search: each asks the study of the folder for a trial, trains it, tells how it ended.

The study is the only thing that they share. Its database numbers trials one by one, so a worker knows from the number of
its trial whether the plan still has room for it. What the others have running counts as bad as it stands (optuna's
"constant liar"), so that workers do not try the same place twice. A search with several workers depends on who was first
and is not repeated exactly; with one worker it is.

Workers are processes of this machine, by turns on its GPUs, or with `ray` tasks of a Ray cluster (extra `ray`), whose
machines must see the folder under the same path. A worker that fails leaves its trial to the caller, who trains what is missing
after all workers have ended and meets the same error.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from ..base import console
from ..base.errors import MissingExtra, UserError
from .space import Plan
from .study import Objective, open_study, take_trial


@dataclass(frozen=True)
class Workers:
    """How many, and what makes the objective in each of them; `make` is picklable."""

    count: int
    make: Callable[[], Objective]
    ray: bool = False

    def search(self, plan: Plan, folder: Path) -> None:
        """Run the plan's trials that are missing; those that fail stay missing."""
        if self.ray:
            _on_ray(self, plan, folder)
        else:
            _on_this_machine(self, plan, folder)


def work(make: Callable[[], Objective], plan: Plan, folder: Path) -> int:
    """Be a worker: take trials until the plan has no room; return how many were trained."""
    study, objective, trained = open_study(plan, folder), make(), 0
    try:
        while take_trial(study, plan, objective, folder):
            trained += 1
    except UserError as error:
        console.log.debug("a worker stopped: %s", error)  # the caller trains that trial again and says it
    return trained


def _local(place: int, count: int, make: Callable[[], Objective], plan: Plan, folder: Path) -> None:
    if devices := _devices():
        # Before CUDA is used for the first time in this process.
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    torch.set_num_threads(max(torch.get_num_threads() // count, 1))
    work(make, plan, folder)


def _devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]


def _on_this_machine(workers: Workers, plan: Plan, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    started: list[SpawnProcess] = []
    try:
        for place in range(workers.count):
            process = context.Process(
                target=_local, args=(place, workers.count, workers.make, plan, folder), daemon=False
            )
            process.start()
            started.append(process)
        for process in started:
            process.join()
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join()


def require_ray() -> Any:
    """Import Ray."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtra("ray", "ray", "A sweep on a Ray cluster") from error
    return ray


def _on_ray(workers: Workers, plan: Plan, folder: Path) -> None:
    ray = require_ray()
    started_here = not ray.is_initialized()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of its own tells nobody
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address=os.environ.get("RAY_ADDRESS"), ignore_reinit_error=True, **quiet)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        task = ray.remote(num_gpus=gpus)(work)
        waiting = [task.remote(workers.make, plan, folder.resolve()) for _ in range(workers.count)]
        while waiting:
            done, waiting = ray.wait(waiting)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                console.log.debug("a worker was lost: %s", error)
    finally:
        if started_here:
            ray.shutdown()
