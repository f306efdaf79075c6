"""Sparse prefill inside stock vLLM on the CPU: at density 1 its greedy tokens, below it the density that was asked for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from angelslim.data.builtin import examples
from angelslim.evaluate.tasks import chat_prompt
from angelslim.models.builtin import builtin_model
from angelslim.work import tokenizer_of

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def test_density_one_is_stock_and_less_is_less(tmp_path: Path) -> None:
    assert PYTHON.exists(), "the vLLM environment is missing: run `make engines`"
    model = builtin_model("tiny-lm")
    tokenizer = tokenizer_of(model)
    asked = examples("recall", "evaluation", 6, seed=3)
    texts = [chat_prompt(tokenizer, item) for item in asked]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    prompts.append([token for ids in prompts for token in ids][:600])
    prompts.append(prompts[0][:20])
    request = {"prompts": prompts, "new_tokens": 12}
    (stock,) = ask(model, {**request, "stages": []}, tmp_path)
    same, less = ask(
        model, {**request, "stages": [["stem", {"density": 1.0}], ["union", {"density": 0.4}]]}, tmp_path
    )
    assert same["tokens"] == stock["tokens"]
    layers, long = 6, sum(len(ids) >= 64 for ids in prompts)
    assert same["calls"] == less["calls"] == layers * long and long >= 6
    assert set(same["densities"]) == {1.0}
    assert all(density < 0.75 for density in less["densities"])
    assert same["fallbacks"]["below the crossover length"] == layers and same["fallbacks"]["decode"] > 0
    assert less["tokens"] != stock["tokens"], "and it matters"


def ask(folder: Path, request: dict, work: Path) -> list[dict]:
    """Run the probe in the engine's own environment, with this package beside it."""
    question, answer = work / "request.json", work / "answer.json"
    question.write_text(json.dumps(request))
    probe = Path(__file__).with_name("vllm_sparse_probe.py")
    done = subprocess.run(
        [PYTHON, probe, folder, question, answer],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text())
