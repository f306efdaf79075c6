"""What a suite refuses before any work, and how lengths are written."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from angelslim.base.errors import ConfigError, MissingExtra
from angelslim.evaluate.suites.base import tokens_of
from angelslim.evaluate.suites.suite import Suite, lengths, run_suite, samples_of


def test_lengths_are_tokens_or_thousands() -> None:
    assert lengths("4k, 512,1K") == (4096, 512, 1024)
    assert lengths("1k,1024") == (1024,)
    for wrong in ("4m", "-1", "0"):
        with pytest.raises(ConfigError, match="no length"):
            lengths(wrong)


def test_a_suite_is_checked_when_it_is_named() -> None:
    with pytest.raises(ConfigError, match="'ruler'"):
        Suite("rular", (4096,))
    with pytest.raises(ConfigError, match="--lengths"):
        Suite("ruler", ())
    with pytest.raises(ConfigError, match="--data"):
        Suite("longbench", (4096,))
    with pytest.raises(ConfigError, match="'fwe'"):
        Suite("ruler", (4096,), ["fwx"])


def test_ruler_hides_needles_in_the_given_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "hay.txt").write_text("Only this one sentence stands here. " * 5)
    suite = Suite("ruler", (1500,), ["niah_text_single_2"], count=2, text=tmp_path / "hay.txt")
    ((task, found),) = samples_of(suite, tokenizer, 1500)
    assert task.name == "niah_text_single_2" and len(found) == 2
    assert all("Only this one sentence stands here." in sample.prompt for sample in found)


def test_chinese_answers_are_refused_before_work_without_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hotpotqa", "vcsum"):
        (tmp_path / f"{name}.jsonl").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="jieba"):
        Suite("longbench", (4096,), data=tmp_path)
    assert Suite("longbench", (4096,), ["hotpotqa"], data=tmp_path).tasks == ["hotpotqa"]


def test_longbench_is_measured_from_its_files(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    row = {"input": "Who?", "context": "word " * 300, "answers": ["I"], "all_classes": None}
    for name in ("hotpotqa", "lcc"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    figures = SimpleNamespace(density=None, fallbacks={}, selector_ms=0.0, kernel_ms=0.0)
    suite = Suite("longbench", (400,), count=3, data=tmp_path)
    found = run_suite(model, tokenizer, suite, ["dense"], lambda _: nullcontext(figures))
    assert [(row["task"], row["family"]) for row in found["rows"]] == [
        ("hotpotqa", "multi-document QA"),
        ("lcc", "code"),
    ]
    assert [row["family"] for row in found["families"]] == ["multi-document QA", "code", "mean over families"]
    assert found["averages"][0]["density"] is None and len(found["rows"][0]["scores"]) == 1
    for task, samples in samples_of(suite, tokenizer, 400):
        assert len(tokens_of(tokenizer, samples[0], task.chat)) + task.new_tokens in (399, 400)


def test_prompts_beyond_the_last_position_are_said(
    model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"input": "Who?", "context": "word", "answers": ["I"], "all_classes": None}
    (tmp_path / "lcc.jsonl").write_text(json.dumps(row) + "\n")
    figures = SimpleNamespace(density=None, fallbacks={}, selector_ms=0.0, kernel_ms=0.0)
    positions = model.config.max_position_embeddings
    for length in (positions, positions + 1):
        suite = Suite("longbench", (length,), data=tmp_path)
        run_suite(model, tokenizer, suite, ["dense"], lambda _: nullcontext(figures))
        assert ("has positions for" in caplog.text) == (length > positions)
