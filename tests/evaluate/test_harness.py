from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from angelslim.base.errors import DataError, MissingExtra
from angelslim.data.builtin import examples
from angelslim.evaluate.base import Score
from angelslim.evaluate.harness import run_harness, to_scores, write_builtin_task
from angelslim.evaluate.tasks import exact_match
from angelslim.models.builtin import builtin_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    write_builtin_task(path, samples=4)
    return path


def test_the_official_harness_scores_the_generated_task(model, tokenizer, folder):
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    scores = run_harness(model, tokenizer, ["angelslim_addition"], include_path=folder, limit=4)
    assert scores == [Score("angelslim_addition/exact_match/answer", 0.0, samples=4, stderr=0.0)]
    assert before == datasets.config.HF_HUB_OFFLINE


def test_harness_and_own_evaluation_send_the_same_prompt_and_agree(model, tokenizer, folder, monkeypatch):
    """A model that is right on two of four questions is 50 % for both; both feed it the same tokens."""
    items = examples("addition", "evaluation", 4, thinking=False)
    right = {item.messages[0]["content"]: item.answer for item in items[:2]}
    prompts: dict[str, set[tuple[int, ...]]] = {"own": set(), "harness": set()}
    who = "own"

    def oracle(input_ids, attention_mask, **_):
        rows = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            ids = row[mask.bool()].tolist()
            prompts[who].add(tuple(ids))
            answer = next((a for q, a in right.items() if q in tokenizer.decode(ids)), "nothing")
            rows.append((tokenizer(answer)["input_ids"] + [2] * 10)[:10])
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", oracle)
    own = exact_match(model, tokenizer, items)
    who = "harness"
    (score,) = run_harness(model, tokenizer, ["angelslim_addition"], include_path=folder)
    assert own.value == 100 * score.value == 50.0
    assert prompts["own"] == prompts["harness"]


def test_the_written_task(folder):
    task = yaml.safe_load((folder / "addition.yaml").read_text())
    rows = [json.loads(line) for line in (folder / "addition.jsonl").read_text().splitlines()]
    assert task["task"] == "angelslim_addition"
    assert [row["answer"] for row in rows] == [
        item.answer for item in examples("addition", "evaluation", 4, thinking=False)
    ]


def test_scores_from_the_harness_table():
    output = {
        "results": {
            "t": {
                "alias": "t",
                "ppl,none": 3.5,
                "ppl_stderr,none": "N/A",
                "acc,none": 0.25,
                "acc_stderr,none": 0.1,
            }
        },
        "n-samples": {"t": {"original": 9, "effective": 8}},
        "higher_is_better": {"t": {"ppl": False, "acc": True}},
    }
    expected = Score("t/ppl", 3.5, better="lower", samples=8)
    assert to_scores(output) == [
        expected,
        replace(expected, metric="t/acc", value=0.25, better="higher", stderr=0.1),
    ]


def test_unknown_task_and_missing_package(model, tokenizer, folder, monkeypatch):
    with pytest.raises(DataError, match="angelslim_addition"):
        run_harness(model, tokenizer, ["angelslim_adition"], include_path=folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'angelslim\[eval\]'"):
        run_harness(model, tokenizer, ["angelslim_addition"], include_path=folder)


@pytest.mark.parametrize("thinking", [False, True])
def test_the_builtin_model_scores_alike_in_both(tmp_path, thinking):
    folder = builtin_model("tiny-lm")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = write_builtin_task(tmp_path, samples=6, thinking=thinking)
    (score,) = run_harness(model, tokenizer, [task], include_path=tmp_path, limit=4, thinking=thinking)
    own = exact_match(model, tokenizer, examples("addition", "evaluation", 4, thinking=thinking))
    assert score.samples == 4
    assert 100 * score.value == own.value >= 50
