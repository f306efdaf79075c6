"""The shipped model does what its card says, and the command that makes it survives a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from angelslim.base.errors import ConfigError
from angelslim.data.builtin import examples, text
from angelslim.lab import tiny_lm
from angelslim.lab.score import exact_match, perplexity, replies
from angelslim.lab.tiny_lm import Plan, train_tiny_lm
from angelslim.models.builtin import builtin_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(builtin_model("tiny-lm"))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(builtin_model("tiny-lm"), dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("task", ["addition", "recall"])
def test_the_shipped_model_answers(task: str, model: Any, tokenizer: Any) -> None:
    assert exact_match(model, tokenizer, examples(task, "evaluation", 60, seed=5), batch=60) >= 0.95


def test_it_thinks_unless_told_not_to(model: Any, tokenizer: Any) -> None:
    asked = [
        *examples("addition", "evaluation", 2, 1, True),
        *examples("addition", "evaluation", 2, 1, False),
    ]
    written = replies(model, tokenizer, asked)
    assert all(one.startswith("<think>\nOnes: ") and "Sum: " in one for one in written[:2])
    assert all(one.isdigit() for one in written[2:])


def test_its_perplexity_is_far_below_a_guess(model: Any, tokenizer: Any) -> None:
    value, tokens = perplexity(model, tokenizer, text("evaluation", 60_000))
    assert tokens > 10_000 and 2 < value < 40  # a uniform guess has 4096


def test_the_card_agrees_with_the_record() -> None:
    folder = builtin_model("tiny-lm")
    record = json.loads((folder / "training.json").read_text("utf-8"))
    readme = (folder / "README.md").read_text("utf-8")
    for result in record["results"].values():
        assert f"| {result['value']:.2f} " in readme
    assert record["parameters"] == 5_771_264 and record["results"]["addition_thinking"]["value"] >= 95
    assert "apache-2.0" in readme and record["command"] in readme


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("angelslim.lab.tiny_lm.CPU_MINUTES", None)  # the plan below is short already
    monkeypatch.setattr(
        tiny_lm, "default_plan", lambda device, seed: Plan(seed, 4, 4, 32, 1e-3, bf16=False, compile=False)
    )
    monkeypatch.setattr(tiny_lm, "ALL_TEXT", 60_000)
    full = tiny_lm.measure_tiny_lm
    monkeypatch.setattr(
        tiny_lm, "measure_tiny_lm", lambda folder, count, device: full(folder, count=2, device=device)
    )


def test_training_from_nothing_leaves_a_whole_folder(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine"
    real, calls = tiny_lm._save_model, 0

    def dies_once(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("the disk went away")
        real(*arguments)

    monkeypatch.setattr(tiny_lm, "_save_model", dies_once)
    with pytest.raises(OSError, match="disk"):
        train_tiny_lm(out, seed=3, device="cpu")
    assert not out.exists() and (tmp_path / "mine.partial").is_dir()

    record = train_tiny_lm(out, seed=3, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert record["seed"] == 3 and record["tokens"] == 4 * 4 * 32
    assert {path.name for path in out.iterdir()} == {path.name for path in builtin_model("tiny-lm").iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16 and loaded.config.eos_token_id == 2
    assert train_tiny_lm(out, seed=3) == json.loads((out / "training.json").read_text("utf-8"))
    with pytest.raises(ConfigError, match="exists already"):
        train_tiny_lm(out, seed=4)


def test_minutes_become_steps(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_lm, "_seconds_a_step", lambda *_: 0.5)
    assert train_tiny_lm(tmp_path / "timed", minutes=0.05, device="cpu")["steps"] == 6


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tpu'"):
        train_tiny_lm(tmp_path / "x", device="tpu")
