"""The command that makes tiny-long leaves a whole folder, and goes on where it was stopped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from angelslim.base.errors import ConfigError
from angelslim.lab import tiny_long
from angelslim.lab.long.stages import LAST, WARM, Stage
from angelslim.lab.long.tokens import Tokens
from angelslim.lab.tiny_long import BASE, SMALL, build_model, train_tiny_long

QUICK = replace(
    SMALL,
    tokens=Tokens(512, 128, 128),
    hidden=32,
    intermediate=32,
    stages=(
        Stage(64, 8, 4, 1e-3, WARM, enough=0.0, least=2),
        Stage(128, 8, 3, 1e-3, LAST),
    ),
    lengths=(256,),
    examples=2,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_long.SIZES, "small", QUICK)
    monkeypatch.setattr(tiny_long, "ALL_TEXT", 40_000)
    monkeypatch.setattr(tiny_long, "LOOK_EVERY", 2)


def test_the_sizes() -> None:
    base = build_model(BASE, 0)
    count = sum(p.numel() for p in base.parameters())
    assert 2e6 <= count <= 6e6 and 2 * count <= 12e6  # bytes in bfloat16
    assert base.config.num_attention_heads > base.config.num_key_value_heads
    for size in (BASE, SMALL):
        assert size.stages[-1].length == size.lengths[-1] <= size.context
        assert size.lengths[-1] // size.block == 64


def test_training_leaves_a_whole_folder(tmp_path: Path) -> None:
    record = train_tiny_long(tmp_path / "out", seed=3, device="cpu", size="small")
    assert record == json.loads((tmp_path / "out" / "training.json").read_text("utf-8"))
    assert [stage["steps"] for stage in record["stages"]] == [2, 3]  # the first was enough early
    assert {result["family"] for result in record["results"]} >= {"needle", "middle", "text"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 512 and model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not (tmp_path / "out.partial").exists()
    assert train_tiny_long(tmp_path / "out", seed=3, device="cpu", size="small") == record
    with pytest.raises(ConfigError, match="exists already"):
        train_tiny_long(tmp_path / "out", seed=4, device="cpu", size="small")


def test_a_stopped_run_goes_on_and_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny_long(tmp_path / "whole", device="cpu", size="small")
    run_stage, calls = tiny_long._run_stage, []

    def stops(model, stage, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        return run_stage(model, stage, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_long, "_run_stage", stops)
        with pytest.raises(KeyboardInterrupt):
            train_tiny_long(tmp_path / "parts", device="cpu", size="small")
    real = tiny_long.stepwise

    def counted(*args, **named):
        calls.append(named["title"])
        return real(*args, **named)

    monkeypatch.setattr(tiny_long, "stepwise", counted)
    train_tiny_long(tmp_path / "parts", device="cpu", size="small")
    assert calls == ["128 tokens"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_minutes_set_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_long, "_seconds_a_step", lambda *_: 1.0)
    corpus = torch.zeros(10, dtype=torch.int32)
    stages = tiny_long._stages(tmp_path / "plan.json", SMALL, 0, 100.0, corpus, "cpu")
    assert sum(stage.steps for stage in stages) == pytest.approx(6000, abs=3)
    assert tiny_long._stages(tmp_path / "plan.json", SMALL, 0, 1.0, corpus, "cpu") == stages  # kept
    with pytest.raises(ConfigError, match="seed 0"):
        tiny_long._stages(tmp_path / "plan.json", SMALL, 1, None, corpus, "cpu")


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="small"):
        train_tiny_long(tmp_path / "out", size="smal")
