"""The loop, and what it promises.

A run is a pure function of its arguments. Batches come from ``batch_at(index)``, the learning rate from
`rate_at`, and the random state of a step from its number, so a checkpoint needs no iterator and no random
state: it holds the weights, the optimizer's moments and the number of finished steps. The same call after
``kill -9`` continues from the last checkpoint and ends with the very weights of an uninterrupted run
(bit-equal on one CPU; a GPU's own sums may differ in the last bit). Ctrl-C saves first and stops then.

Several processes (``torchrun``) share the batches: of the indices of one step each takes its own. Each holds the
whole model, or with `fsdp` a slice of it (see `sharding`). Only the trainable parameters and the buffers of `model` are
saved, so a frozen teacher or target belongs in the closure of `loss_of`, not in `model`.

What follows the progress of the training, such as a term that fades out, follows `on_step`: it is called before the
forward pass of every optimizer step with that step's number, also after a restart, and so needs no state of its own.
(Counting in ``forward`` would go wrong: accumulation and gradient checkpointing call it more than once a step.)

Parameters are trained in their own dtype: load them in float32; `bf16` then computes in bfloat16 by autocast
and keeps float32 masters.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..base import console
from ..base.errors import ConfigError
from . import checkpoint
from .batches import Batch, BatchAt, ahead
from .history import HISTORY, History, StepRecord
from .settings import TrainSettings, rate_at
from .sharding import exchange, shard, whole

Loss = Tensor | Mapping[str, Tensor]  # a scalar, or {"loss": scalar, "accuracy": scalar, ...}
LossOf = Callable[[nn.Module, Batch], Loss]
OnStep = Callable[[int, int], None]  # (0-based optimizer step, steps)


def train(
    model: nn.Module,
    batch_at: BatchAt,
    loss_of: LossOf,
    settings: TrainSettings,
    folder: Path,
    *,
    lr_of: Callable[[str], float] | None = None,
    on_step: OnStep | None = None,
    undecayed: Collection[str] = (),
    device: str = "auto",
    title: str = "training",
) -> list[StepRecord]:
    """Train `model` in place for `settings.steps` steps and return the record of every step.

    `batch_at(index)` gives batch number `index`; a step takes `accumulation` batches a process. It must be a
    pure function, and picklable where `workers` is not 0 and processes are spawned. `lr_of` scales the
    learning rate by a parameter's name (0 freezes it); parameters named in `undecayed` have no weight decay.
    `on_step(step, steps)` is called in every process before each step. `folder` holds the checkpoint and ``steps.jsonl``. With `fsdp` the model stays spread at the end;
    `whole_weights` gathers it. A loss that is no longer finite is `Diverged`, a checkpoint made with other
    settings a `ConfigError`.
    """
    running = stepwise(
        model,
        batch_at,
        loss_of,
        settings,
        folder,
        lr_of=lr_of,
        on_step=on_step,
        undecayed=undecayed,
        device=device,
        title=title,
    )
    while True:
        try:
            next(running)
        except StopIteration as end:
            records: list[StepRecord] = end.value
            return records


def stepwise(
    model: nn.Module,
    batch_at: BatchAt,
    loss_of: LossOf,
    settings: TrainSettings,
    folder: Path,
    *,
    lr_of: Callable[[str], float] | None = None,
    on_step: OnStep | None = None,
    undecayed: Collection[str] = (),
    device: str = "auto",
    title: str = "training",
) -> Generator[int, None, list[StepRecord]]:
    """Train as `train` does and yield the number of finished steps after each; return the records.

    Closing the generator ends the training where it is; the folder keeps the last checkpoint.
    """
    accelerator = Accelerator(cpu=device == "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    if settings.compile:
        loss_of = torch.compile(loss_of, dynamic=False)
    model.train()
    model, bare, optimizer = _prepare(accelerator, model, settings, lr_of, undecayed)
    main, world = accelerator.is_main_process, accelerator.num_processes
    identity = {**settings.identity(), "processes": world}
    saved = folder / checkpoint.CHECKPOINT
    done = checkpoint.load(saved, bare, optimizer, identity)
    history = History(folder / HISTORY, done, write=main, tensorboard=settings.tensorboard)
    loop = _Step(accelerator, model, optimizer, loss_of, settings)
    # a step's batches are consecutive: accumulation x processes; this process takes every world-th of them
    per_step = settings.accumulation * world
    indices = range(done * per_step + accelerator.process_index, settings.steps * per_step, world)
    batches = iter(ahead(batch_at, indices, settings.workers))
    with closing(history), _stop_requests() as stop, console.bar(title, settings.steps - done) as bar:
        for step in range(done, settings.steps):
            if on_step is not None:
                on_step(step, settings.steps)
            history.add(step, *loop.run(step, batches))
            bar.advance(history.note)
            stopped = _any(accelerator, stop.is_set())
            finished = step + 1 == settings.steps
            if stopped or finished or (step + 1) % settings.checkpoint_every == 0:
                history.flush()
                checkpoint.save(saved, bare, optimizer, identity, step + 1, write=main)
            if stopped and not finished:
                console.log.warning("Stopped after step %d; the same command continues from here.", step + 1)
                raise KeyboardInterrupt
            yield step + 1
    return history.records


def _prepare(
    accelerator: Accelerator,
    model: nn.Module,
    settings: TrainSettings,
    lr_of: Callable[[str], float] | None,
    undecayed: Collection[str],
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Return what losses call, the same without a wrapper, and the optimizer, all on the device."""
    if settings.gradient_checkpointing:
        _recompute(model)
    scales = _scales(model, lr_of)
    fused = accelerator.device.type == "cuda"
    if settings.fsdp and accelerator.num_processes > 1:
        shard(model, accelerator.device)
        return model, model, _optimizer(model, settings, scales, undecayed, fused)
    if settings.fsdp:
        console.chose("the whole model in one process", "fsdp needs several, started by torchrun")
    prepared, optimizer = accelerator.prepare(model, _optimizer(model, settings, scales, undecayed, fused))
    return prepared, accelerator.unwrap_model(prepared), optimizer


def _recompute(model: nn.Module) -> None:
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the newer name first
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is None:
        raise ConfigError(
            f"A {type(model).__name__} has no gradient checkpointing.",
            fix="Use a transformers model, or leave the setting gradient_checkpointing off.",
        )
    enable({"use_reentrant": False})


def _any(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())


def _scales(model: nn.Module, lr_of: Callable[[str], float] | None) -> dict[str, float]:
    """Return the factor of each parameter's learning rate; those with 0 are frozen."""
    scales = {name: 1.0 if lr_of is None else lr_of(name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and scales[name] != 0)
    return scales


def _optimizer(
    model: nn.Module,
    settings: TrainSettings,
    scales: dict[str, float],
    undecayed: Collection[str],
    fused: bool,
) -> torch.optim.Optimizer:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and name not in undecayed
            decay = settings.weight_decay if decays else 0.0
            groups.setdefault((scales[name], decay), []).append(parameter)
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
        loss_of: LossOf,
        settings: TrainSettings,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.loss_of, self.settings = loss_of, settings
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sharded = settings.fsdp and accelerator.num_processes > 1

    def run(self, step: int, batches: Iterator[Batch]) -> tuple[float, dict[str, Tensor]]:
        """Take the next batches, step, and return the learning rate and what was measured."""
        torch.manual_seed((self.settings.seed * 1_000_003 + step) * 4096 + self.accelerator.process_index)
        measured: dict[str, Tensor] = {}
        count = self.settings.accumulation
        for part in range(count):
            batch = send_to_device(next(batches), self.accelerator.device, non_blocking=True)
            with self._exchange(part == count - 1):
                for name, value in self._backward(batch, count).items():
                    measured[name] = measured.get(name, 0) + value.detach().float() / count
        rate = rate_at(step, self.settings)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf).detach()
        measured["norm"] = whole(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.num_processes > 1:
            measured = self.accelerator.reduce(measured, reduction="mean")
        return rate, measured

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Let the processes add up their gradients after the last batch of the step only."""
        if self.sharded:
            return exchange(self.model, last)
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _backward(self, batch: Batch, count: int) -> dict[str, Tensor]:
        kind = self.accelerator.device.type
        with torch.autocast(kind, torch.bfloat16) if self.settings.bf16 else nullcontext():
            found = self.loss_of(self.model, batch)
        measured = dict(found) if isinstance(found, Mapping) else {"loss": found}
        self.accelerator.backward(measured["loss"] / count)
        return measured


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
