"""The training loop: exact resume, graceful stop, schedules, and what a checkpoint may not be mixed with."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from angelslim.base.errors import ConfigError
from angelslim.train import CHECKPOINT, HISTORY, StepRecord, TrainSettings, train
from tiny import qwen3

SETTINGS = TrainSettings(steps=12, lr=1e-2, warmup=2, weight_decay=0.1, checkpoint_every=4)


class Toy(nn.Module):
    """Tied weights, dropout, buffers that training changes, a term that fades: what a careless checkpoint would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.fade = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
        noise = self.fade * torch.sin(self.steps + x)
        return self.last(self.drop(self.norm(self.first(x)))) + noise

    def on_step(self, step: int, steps: int) -> None:
        self.fade = 1 - step / steps


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def batch_at(index: int) -> dict[str, torch.Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(index))
    return {"x": x, "y": x.roll(1, dims=1)}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    error = model(batch["x"]) - batch["y"]
    return {"loss": error.square().mean(), "largest": error.abs().max()}


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def run(
    folder: Path, settings: TrainSettings = SETTINGS, batches: Any = batch_at
) -> tuple[str, list[StepRecord]]:
    model = toy()
    records = train(model, batches, loss_of, settings, folder, on_step=model.on_step, device="cpu")
    return fingerprint(model), records


def without_times(records: list[StepRecord]) -> list[tuple[Any, ...]]:
    return [(r.step, r.loss, r.lr, r.norm, r.metrics) for r in records]


def test_training_learns_and_records_every_step(tmp_path: Path) -> None:
    _, records = run(tmp_path, TrainSettings(steps=150, lr=1e-2))
    assert [record.step for record in records] == list(range(150))
    assert records[-1].loss < 0.6 * records[0].loss
    assert records[0].metrics["largest"] > 0
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [StepRecord(**line) for line in lines] == records


def test_a_run_cut_anywhere_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, records = run(tmp_path / "whole")

    class PowerCut(Exception):
        pass

    def fails_at_10(index: int) -> Any:
        if index == 10:
            raise PowerCut
        return batch_at(index)

    with pytest.raises(PowerCut):
        run(tmp_path / "cut", batches=fails_at_10)
    read: list[int] = []
    resumed, again = run(tmp_path / "cut", batches=lambda index: read.append(index) or batch_at(index))
    assert resumed == whole
    assert read == [8, 9, 10, 11], "continued from the checkpoint after step 8"
    assert without_times(again) == without_times(records)


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_loop as t

def slow(index):
    time.sleep(0.05)
    return t.batch_at(index)

print(t.run(Path({folder!r}), batches=slow)[0])
"""


def test_sigkill_and_the_same_command_again(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    script = KILLED.format(paths=[str(Path(__file__).parent), *sys.path], folder=str(tmp_path / "killed"))
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / CHECKPOINT).is_file():
        assert process.poll() is None, "ended before its first checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.split()[-1] == whole


def test_ctrl_c_saves_and_the_run_continues(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)

    def interrupted(index: int) -> Any:
        if index == 5:
            signal.raise_signal(signal.SIGINT)
        return batch_at(index)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", batches=interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    read: list[int] = []
    resumed, _ = run(tmp_path / "stopped", batches=lambda index: read.append(index) or batch_at(index))
    assert read[0] == 6 and resumed == whole


def test_a_finished_run_is_loaded_not_repeated(tmp_path: Path) -> None:
    whole, records = run(tmp_path)
    again, loaded = run(tmp_path, batches=lambda index: pytest.fail("read a batch"))
    assert again == whole and loaded == records


def test_accumulation_sees_the_batches_of_a_larger_step(tmp_path: Path) -> None:
    read: list[int] = []
    settings = TrainSettings(steps=3, accumulation=4)
    run(tmp_path, settings, batches=lambda index: read.append(index) or batch_at(index))
    assert read == list(range(12))


def test_workers_give_the_same_run(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain")
    ahead, _ = run(
        tmp_path / "ahead", TrainSettings(**{**SETTINGS.identity(), "betas": (0.9, 0.95), "workers": 2})
    )
    assert ahead == plain


def test_frozen_parameters_and_scaled_rates(tmp_path: Path) -> None:
    model = toy()
    before = {name: value.clone() for name, value in model.named_parameters()}
    rates = {"first.bias": 0.0, "last.bias": 0.1}
    train(
        model, batch_at, loss_of, TrainSettings(steps=1, lr=1e-2), tmp_path,
        lr_of=lambda name: rates.get(name, 1.0), device="cpu",
    )  # fmt: skip
    moved = {name: (value - before[name]).abs().max().item() for name, value in model.named_parameters()}
    assert moved["first.bias"] == 0
    assert moved["first.weight"] == pytest.approx(1e-2, rel=0.01)  # AdamW's first step is the rate itself
    assert moved["last.bias"] == pytest.approx(1e-3, rel=0.01)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"lr 0\.01 -> 0\.02"):
        run(tmp_path, TrainSettings(**{**SETTINGS.identity(), "betas": (0.9, 0.95), "lr": 2e-2}))


def test_a_diverging_run_is_stopped_and_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The loss is nan at step 2"):
        run(
            tmp_path,
            batches=lambda index: {**batch_at(index), "y": torch.tensor(torch.nan if index == 2 else 0.0)},
        )
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_hook_gets_optimizer_steps_before_their_forward_pass(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    settings = TrainSettings(steps=3, accumulation=2, checkpoint_every=1)

    def note(step: int, steps: int) -> None:
        assert steps == 3
        seen.append(("step", step))

    def go(batches: Any) -> None:
        train(toy(), batches, loss_of, settings, tmp_path, on_step=note, device="cpu")

    with pytest.raises(ZeroDivisionError):
        go(lambda index: seen.append(("batch", index)) or (1 / (4 - index) and batch_at(index)))
    go(lambda index: seen.append(("batch", index)) or batch_at(index))
    steps = [[("step", step), ("batch", 2 * step), ("batch", 2 * step + 1)] for step in range(3)]
    assert seen == [*steps[0], *steps[1], *steps[2][:2], *steps[2]]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(nn.Linear(8, 8), batch_at, loss_of_linear, SETTINGS, tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"holds no first\.weight"):
        run(tmp_path)


def loss_of_linear(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def test_a_parameter_that_no_loss_reaches_does_not_stop_a_restart(tmp_path: Path) -> None:
    def idle() -> nn.Module:
        model = nn.Linear(8, 8)
        model.register_parameter("spare", nn.Parameter(torch.ones(3)))
        return model

    train(idle(), batch_at, loss_of_linear, SETTINGS, tmp_path, device="cpu")
    model = idle()
    assert len(train(model, batch_at, loss_of_linear, SETTINGS, tmp_path, device="cpu")) == SETTINGS.steps
    assert model.spare.tolist() == [1, 1, 1]


def language_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def words_at(index: int) -> torch.Tensor:
    return torch.randint(272, (2, 12), generator=torch.Generator().manual_seed(index))


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        model, calls = qwen3(), []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        settings = TrainSettings(steps=2, gradient_checkpointing=on)
        train(model, words_at, language_loss, settings, tmp_path / str(on), device="cpu")
        found.append((fingerprint(model), len(calls)))
    assert found[0][0] == found[1][0]
    assert (found[0][1], found[1][1]) == (2, 4), "each block runs a second time"


def test_gradient_checkpointing_needs_a_model_that_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="A Toy has no gradient checkpointing"):
        run(tmp_path, TrainSettings(steps=2, gradient_checkpointing=True))
