"""Event files for TensorBoard, read back with its own reader."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from angelslim.base.errors import MissingExtra
from angelslim.train import TrainSettings, train


def loss_of(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = model(batch).square().mean()
    return {"loss": loss, "twice": 2 * loss}


def go(folder: Path, stop_at: int = 99) -> list[float]:
    def batch_at(index: int) -> torch.Tensor:
        if index == stop_at:
            raise InterruptedError
        return torch.ones(2, 4) * (index + 1)

    torch.manual_seed(0)
    settings = TrainSettings(steps=6, checkpoint_every=2, tensorboard=True)
    records = train(nn.Linear(4, 2), batch_at, loss_of, settings, folder, device="cpu")
    return [record.loss for record in records]


def test_curves_are_those_of_the_record_also_after_a_restart(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        go(tmp_path, stop_at=5)
    losses = go(tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "gradient norm", "twice"}
    points = {event.step: event.value for event in events.Scalars("loss")}
    assert points == pytest.approx(dict(enumerate(losses)))
    assert [event.step for event in events.Scalars("lr")] == list(range(6))


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"angelslim\[train\]"):
        go(tmp_path)
