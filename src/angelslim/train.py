"""Layer 5: the only training loop of the package: quantization-aware training, distillation, drafts and tiny models.

A run is a pure function of its arguments. Batches come from ``batch_at(index)``, the learning rate from
`rate_at`, and the random state of a step from its number, so a checkpoint needs no iterator and no random
state: it holds the weights, the optimizer's moments and the number of finished steps. The same call after
``kill -9`` continues from the last checkpoint and ends with the very weights of an uninterrupted run
(bit-equal on one CPU; a GPU's own sums may differ in the last bit). Ctrl-C saves first and stops then.

Several processes (``torchrun``) share the batches: of the indices of one step each takes its own.
Only the trainable parameters and the buffers of `model` are saved, so a frozen teacher or target belongs in
the closure of `loss_of`, not in `model`.

Parameters are trained in their own dtype: load them in float32; `bf16` then computes in bfloat16 by autocast
and keeps float32 masters.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .base import console
from .base.errors import ConfigError

Batch = Any  # what `batch_at` returns: a mapping or tuple of tensors, moved to the device by the loop
Loss = Tensor | Mapping[str, Tensor]  # a scalar, or {"loss": scalar, "accuracy": scalar, ...}
BatchAt = Callable[[int], Batch]

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "steps.jsonl"
_FLUSH = 20  # steps between two readings of the loss, which make a GPU wait


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the fields down to `seed` decide the result and may not change between restarts."""

    steps: int
    lr: float = 1e-3
    warmup: int = 0  # steps of linear rise
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warm-up, stable, decay
    decay: float = 0.2  # share of the steps in which wsd falls linearly
    lowest: float = 0.0  # where cosine and wsd end, as a share of lr
    weight_decay: float = 0.0  # on matrices only, never on norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # gradient norm; 0 turns clipping off
    bf16: bool = False
    accumulation: int = 1  # batches a step
    seed: int = 0
    checkpoint_every: int = 500
    workers: int = 0  # processes that prepare batches ahead
    compile: bool = False  # torch.compile; worth its minute on long runs only

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result."""
        free = ("checkpoint_every", "workers", "compile")
        kept = {name: value for name, value in asdict(self).items() if name not in free}
        return {**kept, "betas": list(self.betas)}


@dataclass(frozen=True)
class StepRecord:
    """What one step measured; `seconds` is the time since the step before."""

    step: int
    loss: float
    lr: float
    norm: float  # of the gradient, before clipping
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


def rate_at(step: int, settings: TrainSettings) -> float:
    """Return the learning rate of a 0-based step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "wsd":
        start = max(settings.warmup, round(settings.steps * (1 - settings.decay)))
        fall = max(step - start, 0) / max(settings.steps - start, 1)
    else:
        passed = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
        fall = (1 - math.cos(math.pi * passed)) / 2
    return settings.lr * (1 - (1 - settings.lowest) * fall)


def train(
    model: nn.Module,
    batch_at: BatchAt,
    loss_of: Callable[[nn.Module, Batch], Loss],
    settings: TrainSettings,
    folder: Path,
    *,
    lr_of: Callable[[str], float] | None = None,
    device: str = "auto",
    title: str = "training",
) -> list[StepRecord]:
    """Train `model` in place for `settings.steps` steps and return the record of every step.

    `batch_at(index)` gives batch number `index`; a step takes `accumulation` batches a process. It must be a
    pure function, and picklable where `workers` is not 0 and processes are spawned. `lr_of` scales the
    learning rate by a parameter's name (0 freezes it). `folder` holds the checkpoint and ``steps.jsonl``.
    A loss that is no longer finite is a `ConfigError`, as is a checkpoint made with other settings.
    """
    accelerator = Accelerator(cpu=device == "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    if settings.compile:
        loss_of = torch.compile(loss_of, dynamic=False)
    model.train()
    optimizer = _optimizer(model, settings, lr_of, fused=accelerator.device.type == "cuda")
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    world = accelerator.num_processes
    identity = {**settings.identity(), "processes": world}
    done = _load(folder / CHECKPOINT, bare, optimizer, identity)
    history = _History(folder / HISTORY, done, write=accelerator.is_main_process)
    loop = _Step(accelerator, model, optimizer, loss_of, settings)
    # a step's batches are consecutive: accumulation x processes; this process takes every world-th of them
    indices = range(
        done * settings.accumulation * world + accelerator.process_index, _last(settings, world), world
    )
    batches = iter(_ahead(batch_at, indices, settings.workers))
    with _stop_requests() as stop, console.bar(title, settings.steps - done) as bar:
        for step in range(done, settings.steps):
            history.add(step, *loop.run(step, batches))
            bar.advance(history.note)
            stopped = _any(accelerator, stop.is_set())
            finished = step + 1 == settings.steps
            if stopped or finished or (step + 1) % settings.checkpoint_every == 0:
                history.flush()
                if accelerator.is_main_process:
                    _save(folder / CHECKPOINT, bare, optimizer, identity, step + 1)
            if stopped and not finished:
                console.log.warning("Stopped after step %d; the same command continues from here.", step + 1)
                raise KeyboardInterrupt
    return history.records


def _last(settings: TrainSettings, world: int) -> int:
    return settings.steps * settings.accumulation * world


def _any(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())


def _optimizer(
    model: nn.Module, settings: TrainSettings, lr_of: Callable[[str], float] | None, fused: bool
) -> torch.optim.Optimizer:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = 1.0 if lr_of is None else lr_of(name)
        parameter.requires_grad_(parameter.requires_grad and scale != 0)
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    assert groups, "nothing to train"
    listed = [
        {"params": kept, "scale": scale, "weight_decay": decay} for (scale, decay), kept in groups.items()
    ]
    return torch.optim.AdamW(listed, lr=settings.lr, betas=settings.betas, fused=fused)


class _Step:
    """One optimizer step; its loss and norm stay on the device until the history reads them."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[[nn.Module, Batch], Loss],
        settings: TrainSettings,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.loss_of, self.settings = loss_of, settings
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def run(self, step: int, batches: Iterator[Batch]) -> tuple[float, dict[str, Tensor]]:
        """Take the next batches, step, and return the learning rate and what was measured."""
        torch.manual_seed((self.settings.seed * 1_000_003 + step) * 4096 + self.accelerator.process_index)
        measured: dict[str, Tensor] = {}
        count = self.settings.accumulation
        for part in range(count):
            batch = send_to_device(next(batches), self.accelerator.device, non_blocking=True)
            last = part == count - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                for name, value in self._backward(batch, count).items():
                    measured[name] = measured.get(name, 0) + value.detach().float() / count
        rate = rate_at(step, self.settings)
        measured["norm"] = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf).detach()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.num_processes > 1:
            measured = self.accelerator.reduce(measured, reduction="mean")
        return rate, measured

    def _backward(self, batch: Batch, count: int) -> dict[str, Tensor]:
        kind = self.accelerator.device.type
        with torch.autocast(kind, torch.bfloat16) if self.settings.bf16 else nullcontext():
            found = self.loss_of(self.model, batch)
        measured = dict(found) if isinstance(found, Mapping) else {"loss": found}
        self.accelerator.backward(measured["loss"] / count)
        return measured


class _History:
    """The record of every step, in memory and in ``steps.jsonl``, cut back to the checkpoint on a restart."""

    def __init__(self, path: Path, done: int, write: bool) -> None:
        self.path, self.write, self.note = path, write, ""
        self.records: list[StepRecord] = []
        self._waiting: list[tuple[int, float, dict[str, Tensor], float]] = []
        self._clock = time.perf_counter()
        if done and path.is_file():
            rows = (json.loads(line) for line in path.read_text("utf-8").splitlines()[:done])
            self.records = [StepRecord(**row) for row in rows]
        if write:
            lines = "".join(json.dumps(asdict(record)) + "\n" for record in self.records)
            temporary = path.with_name(path.name + ".partial")
            temporary.write_text(lines, "utf-8")
            os.replace(temporary, path)

    def add(self, step: int, rate: float, measured: dict[str, Tensor]) -> None:
        now = time.perf_counter()
        self._waiting.append((step, rate, measured, now - self._clock))
        self._clock = now
        if len(self._waiting) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        fresh = [_record(*row) for row in self._waiting]
        self._waiting = []
        for record in fresh:
            if not math.isfinite(record.loss):
                raise ConfigError(
                    f"The loss is {record.loss} at step {record.step}.",
                    where=str(self.path),
                    fix="Lower the learning rate, lengthen the warm-up or clip the gradient, and start anew.",
                )
        self.records += fresh
        if fresh:
            self.note = f"loss {sum(record.loss for record in fresh) / len(fresh):.3f}"
        if self.write:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(record)) + "\n" for record in fresh)


def _record(step: int, rate: float, measured: dict[str, Tensor], seconds: float) -> StepRecord:
    values = {name: float(value) for name, value in measured.items()}
    loss, norm = values.pop("loss"), values.pop("norm")
    return StepRecord(step, loss, rate, norm, round(seconds, 4), values)


class _Indexed(torch.utils.data.Dataset[Batch]):
    def __init__(self, batch_at: BatchAt) -> None:
        self.batch_at = batch_at

    def __getitem__(self, index: int) -> Batch:
        return self.batch_at(index)


def _leave_interrupts_to_the_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _ahead(batch_at: BatchAt, indices: range, workers: int) -> Iterable[Batch]:
    if not workers:
        return map(batch_at, indices)
    return torch.utils.data.DataLoader(
        _Indexed(batch_at),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=4,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts_to_the_parent,
    )


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C (or SIGTERM) into a request that the loop reads; a second one acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of the model: trainable parameters (tied ones once) and buffers."""
    trainable = {name: p.data for name, p in _trainable(model)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return {**trainable, **{name: value for name, value in buffers.items() if isinstance(value, Tensor)}}


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any], done: int
) -> None:
    tensors = {f"model.{name}": value for name, value in _held(model).items()}
    for name, parameter in _trainable(model):
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    temporary = path.with_name(path.name + ".partial")
    metadata = {"steps_done": str(done), "settings": json.dumps(identity)}
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> int:
    """Restore a checkpoint, when there is one, and return the number of finished steps."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        _same_run(path, json.loads(metadata["settings"]), identity)
        with torch.no_grad():
            for name, value in _held(model).items():
                value.copy_(file.get_tensor(f"model.{name}"))
        for name, parameter in _trainable(model):
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {key: file.get_tensor(f"optimizer.{key}.{name}") for key in keys}
            moved = {key: value.to(parameter.device) for key, value in state.items() if key != "step"}
            fused = optimizer.param_groups[0]["fused"]
            step = state["step"].to(parameter.device) if fused else state["step"]
            optimizer.state[parameter] = {"step": step, **moved}
    done = int(metadata["steps_done"])
    console.log.info("Continuing after step %d (%s).", done, path)
    return done


def _same_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ConfigError(
            f"The checkpoint is of a run with other settings ({', '.join(changed)}).",
            where=str(path),
            fix="Restore the settings, or train into another folder.",
        )
