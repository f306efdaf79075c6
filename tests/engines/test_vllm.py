"""Stock vLLM on the CPU is the judge: it must load what we write and agree with us.

Perplexity comes from the engine's own prompt log-probabilities, on the same windows of the same text; greedy
continuations come from its own decoding. What this build cannot run (static FP8, FP8 blocks) is checked bit for
bit against compressed-tensors in ``tests/export``.
"""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

import angelslim
from angelslim.data.builtin import examples
from angelslim.evaluate.perplexity import nll_per_token
from angelslim.evaluate.suite import evaluation_text
from angelslim.evaluate.tasks import chat_prompt
from angelslim.work import tokenizer_of
from tiny import greedy

pytestmark = pytest.mark.engine
PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
RECIPES = {
    "fp8_dynamic": ("fp8_dynamic", {}),
    "int8_dynamic": ("int8_dynamic", {}),
    "int4_rtn": ("int4_rtn", {}),
    "int4_rtn_asym": ("int4_rtn_asym", {}),
    "int4_gptq": ("int4_gptq", {"dataset__num_samples": 32, "dataset__max_seq_length": 256}),
    "int4_best": ("int4_best", {"dataset__num_samples": 32, "dataset__max_seq_length": 256}),
    "gptq layout": ("int4_rtn", {"compression__quantization__format": "gptq"}),
    "awq layout": ("int4_rtn_asym", {"compression__quantization__format": "awq"}),
}
NEW_TOKENS = 48


@pytest.mark.parametrize("name", RECIPES)
def test_vllm_agrees_on_perplexity_and_greedy_tokens(name: str, tmp_path: Path):
    assert PYTHON.exists(), "the vLLM environment is missing: run `make engines`"
    recipe, overrides = RECIPES[name]
    folder = tmp_path / name
    angelslim.compress("tiny-lm", recipe, out=folder, evaluation__enabled=False, **overrides)
    model, tokenizer = angelslim.load(folder), tokenizer_of(folder)

    ours = nll_per_token(model, tokenizer, evaluation_text(), window=512, stride=512, max_tokens=4096)
    windows = [ours.ids[w.begin : w.end + 1] for w in ours.windows]
    asked = examples("addition", "evaluation", 8, thinking=True) + examples(
        "recall", "evaluation", 8, thinking=False
    )
    prompts = [tokenizer(chat_prompt(tokenizer, item), add_special_tokens=False).input_ids for item in asked]

    answer = ask_vllm(
        folder,
        {"windows": [list(map(int, ids)) for ids in windows], "prompts": prompts, "new_tokens": NEW_TOKENS},
        tmp_path,
    )

    theirs = [
        value for scored, w in zip(answer["nll"], ours.windows, strict=True) for value in scored[-w.scored :]
    ]
    assert len(theirs) == len(ours.nll)
    ratio = math.exp(sum(theirs) / len(theirs) - float(ours.mean))
    print(f"{name}: vLLM's perplexity is {ratio:.5f} of ours")
    assert abs(ratio - 1) <= 0.01
    for prompt, tokens in zip(prompts, answer["tokens"], strict=True):
        assert tokens == greedy(model, prompt, tokenizer.eos_token_id, NEW_TOKENS)


def ask_vllm(folder: Path, request: dict, work: Path) -> dict:
    """Run the probe in the engine's own environment."""
    question, answer = work / "request.json", work / "answer.json"
    question.write_text(json.dumps(request))
    probe = Path(__file__).with_name("vllm_probe.py")
    done = subprocess.run(
        [PYTHON, probe, folder, question, answer], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text())
