"""What a restart needs: trainable weights, buffers, the optimizer's moments, the number of finished steps.

One safetensors file, written under another name and renamed. It holds full tensors, also where processes share
the model, so a run that was spread can continue unspread and the other way round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base import console
from ..base.errors import ConfigError
from .sharding import collect, fill, like

CHECKPOINT = "checkpoint.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def held(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of the model: trainable parameters (tied ones once) and buffers."""
    trainable = {name: p.data for name, p in _trainable(model)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return {**trainable, **{name: value for name, value in buffers.items() if isinstance(value, Tensor)}}


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, value in held(model).items():
        yield f"model.{name}", value
    for name, parameter in _trainable(model):
        for key, value in optimizer.state[parameter].items():
            yield f"optimizer.{key}.{name}", torch.as_tensor(value)


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    done: int,
    *,
    write: bool,
) -> None:
    """Save the state after `done` steps; every process has to call this, one has to `write`."""
    tensors = collect(_everything(model, optimizer), write)
    if not write:
        return
    temporary = path.with_name(path.name + ".partial")
    save_file(tensors, temporary, {"steps_done": str(done), "settings": json.dumps(identity)})
    os.replace(temporary, path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> int:
    """Restore a checkpoint, when there is one, and return the number of finished steps."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        _same_run(path, json.loads(metadata["settings"]), identity)
        stored = set(file.keys())
        with torch.no_grad():
            for name, value in held(model).items():
                fill(value, _read(path, file, stored, f"model.{name}"))
        for name, parameter in _trainable(model):
            if f"optimizer.step.{name}" not in stored:
                continue  # a parameter that no loss has reached yet
            state = {key: file.get_tensor(f"optimizer.{key}.{name}") for key in _MOMENTS}
            fused = optimizer.param_groups[0]["fused"]
            moments = {key: like(parameter.data, state[key]) for key in _MOMENTS[1:]}
            step = state["step"].to(parameter.device) if fused else state["step"]
            optimizer.state[parameter] = {"step": step, **moments}
    done = int(metadata["steps_done"])
    console.log.info("Continuing after step %d (%s).", done, path)
    return done


def _read(path: Path, file: Any, stored: set[str], name: str) -> Tensor:
    if name not in stored:
        raise ConfigError(
            f"The checkpoint is of another model: it holds no {name.removeprefix('model.')}.",
            where=str(path),
            fix="Train into another folder.",
        )
    found: Tensor = file.get_tensor(name)
    return found


def _same_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ConfigError(
            f"The checkpoint is of a run with other settings ({', '.join(changed)}).",
            where=str(path),
            fix="Restore the settings, or train into another folder.",
        )
