"""Two processes train as one: with whole models (DDP) and with spread ones (FSDP2), over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from angelslim.base import parallel
from angelslim.base.errors import ConfigError
from angelslim.methods.base import QAT
from angelslim.methods.qat import _fused
from angelslim.methods.qat.base import attach, quantizers, set_progress
from angelslim.numerics.distillation import Distillation
from angelslim.teacher.live import own_masters
from angelslim.teacher.objective import objective
from angelslim.train import CHECKPOINT, TrainSettings, train, whole_weights
from angelslim.train.sharding import shard
from tiny import qwen3

STEPS, KINDS = 5, ("ddp", "fsdp", "fsdp_resumed", "fsdp_then_ddp")
QUANTIZED = ("ddp_quantized", "fsdp_quantized")
COMPILED = ("ddp_compiled", "fsdp_compiled")


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def batch_at(index: int) -> torch.Tensor:
    return torch.randint(272, (2, 12), generator=torch.Generator().manual_seed(index))


class Rounded(nn.Module):
    """Fake quantization with a learned scale for each row, a term that fades, and a switch."""

    on, fade = True, 1.0

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((rows, 1), 0.02))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not Rounded.on:
            return weight
        codes = weight / self.scale
        rounded = (codes + (codes.round() - codes).detach()) * self.scale
        return rounded + 0.1 * Rounded.fade * weight


@contextmanager
def unquantized() -> Iterator[None]:
    Rounded.on = False
    try:
        yield
    finally:
        Rounded.on = True


def fade(step: int, steps: int) -> None:
    Rounded.fade = 1 - step / steps


def taught_at(index: int) -> dict[str, torch.Tensor]:
    return {"input_ids": batch_at(index), "labels": batch_at(index)}


def go_quantized(folder: Path, accumulation: int, fsdp: bool) -> Any:
    """The same with parametrized weights, taught by the student's own full-precision ones."""
    model = qwen3(hidden_size=32, intermediate_size=48, head_dim=8)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.up_proj):
            nn.utils.parametrize.register_parametrization(linear, "weight", Rounded(len(linear.weight)))
    loss = objective(own_masters(model, unquantized), Distillation("cakld", lm_weight=0.5))
    settings = TrainSettings(
        STEPS, lr=1e-3, accumulation=accumulation, fsdp=fsdp, gradient_checkpointing=fsdp
    )
    records = train(model, taught_at, loss, settings, folder, on_step=fade, device="cpu")
    assert isinstance(next(model.parameters()), DTensor) == (fsdp and parallel.world() > 1)
    return [[r.loss, r.norm, r.metrics["kd"]] for r in records], whole_weights(model)


def go_compiled(folder: Path, accumulation: int, fsdp: bool, compiled: str) -> Any:
    """The same with quantizers, which compute several layers together where they are compiled and whole."""
    model = qwen3(hidden_size=32, intermediate_size=48, head_dim=8)
    chosen: dict[str, tuple[str, dict[str, Any]]] = {
        "q_proj": ("tequila", {"group_size": 16, "lambda": 0.05}),
        "up_proj": ("sherry", {"group_size": 16}),
        "down_proj": ("seq", {}),
    }
    for name, module in list(model.named_modules()):
        if found := chosen.get(name.rpartition(".")[2]):
            attach(module, QAT.get(found[0])({**found[1], "compile": compiled}), name)
    settings = TrainSettings(
        STEPS, lr=1e-3, accumulation=accumulation, fsdp=fsdp, gradient_checkpointing=fsdp
    )
    on_step = partial(set_progress, model)
    records = train(model, batch_at, loss_of, settings, folder, on_step=on_step, device="cpu")
    together = [call.ready for _, _, quantizer in quantizers(model) for call in quantizer.calls.values()]
    assert bool(together) == (compiled == "true")
    if compiled == "true" and not fsdp:
        assert sum(ready is not None for ready in together) >= 2 * len(model.model.layers)
    return [[r.loss, r.norm] for r in records], whole_weights(model)


def breaks(index: int) -> torch.Tensor:
    if index >= 12:  # in step 3, the first after the checkpoint
        raise InterruptedError
    return batch_at(index)


def go(
    folder: Path, accumulation: int, fsdp: bool = False, recompute: bool = False, cut: bool = False
) -> Any:
    """Train; return losses, norms and the whole weights."""
    settings = TrainSettings(
        STEPS, lr=1e-3, weight_decay=0.1, accumulation=accumulation, checkpoint_every=3,
        fsdp=fsdp, gradient_checkpointing=recompute,
    )  # fmt: skip
    model = qwen3(hidden_size=32, intermediate_size=48, head_dim=8)
    records = train(model, breaks if cut else batch_at, loss_of, settings, folder, device="cpu")
    assert isinstance(next(model.parameters()), DTensor) == (fsdp and parallel.world() > 1)
    return [[r.loss, r.norm] for r in records], whole_weights(model)


def worker(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    parallel.start()
    for kind in KINDS:
        fsdp = kind != "ddp"
        if kind in KINDS[2:]:
            with pytest.raises(InterruptedError):
                go(folder / kind, 2, fsdp=True, cut=True)
            fsdp = kind == "fsdp_resumed"
        keep(folder, kind, *go(folder / kind, 2, fsdp, recompute=kind == "fsdp"))
    for kind in QUANTIZED:
        keep(folder, kind, *go_quantized(folder / kind, 2, kind.startswith("fsdp")))
    _fused.compile_graph = lambda graph, _examples: graph
    for kind in COMPILED:
        keep(folder, kind, *go_compiled(folder / kind, 2, kind.startswith("fsdp"), "true"))


def keep(folder: Path, kind: str, records: Any, weights: dict[str, torch.Tensor]) -> None:
    if parallel.first():
        save_file({name: value.clone() for name, value in weights.items()}, folder / f"{kind}.safetensors")
        (folder / f"{kind}.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    here = str(Path(__file__).parent)
    script = folder / "worker.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[here, *sys.path]!r}\n"
        f"from pathlib import Path\nfrom test_sharding import worker\nworker(Path({str(folder)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return go(tmp_path_factory.mktemp("one"), accumulation=4)


@pytest.fixture(scope="module")
def one_quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return go_quantized(tmp_path_factory.mktemp("one"), accumulation=4, fsdp=False)


@pytest.fixture(scope="module")
def one_uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return go_compiled(tmp_path_factory.mktemp("one"), 4, False, "false")


@pytest.mark.parametrize("kind", [*KINDS, *QUANTIZED, *COMPILED])
def test_two_processes_equal_one(
    kind: str, one: Any, one_quantized: Any, one_uncompiled: Any, two: Path
) -> None:
    records, weights = {
        **dict.fromkeys(QUANTIZED, one_quantized),
        **dict.fromkeys(COMPILED, one_uncompiled),
    }.get(kind, one)
    found = json.loads((two / f"{kind}.json").read_text())
    assert torch.allclose(torch.tensor(found), torch.tensor(records), rtol=1e-5, atol=1e-5)
    stored = load_file(two / f"{kind}.safetensors")
    assert stored.keys() == weights.keys()
    for name, value in weights.items():
        assert (stored[name] - value).abs().max() < 1e-5, name


def test_checkpoints_of_spread_models_are_whole(one: Any, two: Path) -> None:
    weights = load_file(two / "fsdp" / CHECKPOINT)
    plain = load_file(two / "ddp" / CHECKPOINT)
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in plain.items()
    }


def test_a_spread_run_resumes_with_the_same_bits(two: Path) -> None:
    whole = load_file(two / "fsdp.safetensors")
    again = load_file(two / "fsdp_resumed.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_alone_fsdp_is_the_plain_loop(one: Any, tmp_path: Path) -> None:
    _, weights = go(tmp_path, accumulation=4, fsdp=True)
    assert all(torch.equal(value, one[1][name]) for name, value in weights.items())


def test_scalars_cannot_be_spread() -> None:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="scale is a scalar"):
        shard(model, torch.device("cpu"))
