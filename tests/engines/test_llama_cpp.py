"""Stock llama.cpp on the CPU is the judge of our GGUF files: same tokens, same perplexity, same continuations.

llama.cpp rounds activations to eight bits wherever weights are quantized (32 or 256 values share a scale), so its
logits are never exactly ours. What is asserted of quantized models: perplexity on the same windows within 1 % of
ours in float32, and, for the recipes, greedy continuations that are equal to the last token for most prompts.
Models in full precision have no such rounding; there every token's likelihood is compared.
"""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import angelslim
from angelslim.config.recipe import load as load_recipe
from angelslim.convert import convert
from angelslim.data.builtin import examples
from angelslim.engine import carry_out, prepare_any
from angelslim.evaluate.perplexity import TokenNll, nll_per_token
from angelslim.evaluate.suite import evaluation_text
from angelslim.evaluate.tasks import chat_prompt
from angelslim.export._checkpoint import open_any
from angelslim.export.files._gguf_lowbit import pack
from angelslim.export.files._gguf_read import read_header
from angelslim.export.files._gguf_vocab import SPLITS
from angelslim.export.files.gguf import Blocks, write_model
from angelslim.models.builtin import builtin_model
from angelslim.work import tokenizer_of
from families import TEXT
from tiny import byte_tokenizer, greedy

pytestmark = pytest.mark.engine
PYTHON = Path(__file__).parents[2] / ".venv-llama" / "bin" / "python"
NEW_TOKENS = 48
CHARACTERS = 2000  # that both tokenize


def ask_llama_cpp(
    file: Path, scored: TokenNll, prompts: list[list[int]], end: int, text: str = ""
) -> dict[str, Any]:
    """Run the probe in the engine's own environment."""
    assert PYTHON.exists(), "the llama.cpp environment is missing: run `make engines`"
    question, answer = file.with_name("request.json"), file.with_name("answer.json")
    request = {
        "windows": [scored.ids[w.begin : w.end + 1].tolist() for w in scored.windows],
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "end": end,
        "text": text,
    }
    question.write_text(json.dumps(request))
    probe = Path(__file__).with_name("llama_cpp_probe.py")
    done = subprocess.run(
        [PYTHON, probe, file, question, answer], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text())


def likelihoods(answer: dict[str, Any], ours: TokenNll) -> Tensor:
    """The engine's values for the targets that we scored, in our order."""
    kept = [
        value for scored, w in zip(answer["nll"], ours.windows, strict=True) for value in scored[-w.scored :]
    ]
    assert len(kept) == ours.nll.numel()
    return torch.tensor(kept)


def assert_same_perplexity(label: str, answer: dict[str, Any], ours: TokenNll) -> None:
    ratio = math.exp(float(likelihoods(answer, ours).double().mean()) - ours.mean)
    print(f"{label}: llama.cpp's perplexity is {ratio:.5f} of ours ({math.exp(ours.mean):.2f})")
    assert abs(ratio - 1) <= 0.01


@pytest.mark.parametrize(
    "recipe, kind",
    [
        ("gguf_q4_0", "Q4_0"),
        ("gguf_q4_0_best", "Q4_0"),
        ("gguf_q8_0", "Q8_0"),
        ("mxfp4_weight_only", "MXFP4"),
        ("int4_best_asym", "Q4_K"),
    ],
)
def test_llama_cpp_agrees_on_tokens_perplexity_and_continuations(recipe: str, kind: str, tmp_path: Path):
    folder, file = tmp_path / recipe, tmp_path / "model.gguf"
    given: dict[str, Any] = {"dataset__num_samples": 16, "dataset__max_seq_length": 256}
    if kind == "Q4_K":
        given["compression__quantization__quant_method__group_size"] = 256
    angelslim.compress("tiny-lm", recipe, out=folder, evaluation__enabled=False, **given)
    convert(folder, "gguf", file)
    assert {tensor.kind for tensor in read_header(file).tensors} == {kind, "BF16", "F32"}
    model, tokenizer = angelslim.load(folder).float(), tokenizer_of(folder)
    asked = examples("addition", "evaluation", 8, thinking=True) + examples(
        "recall", "evaluation", 8, thinking=False
    )
    prompts = [tokenizer(chat_prompt(tokenizer, item), add_special_tokens=False).input_ids for item in asked]
    ours = nll_per_token(model, tokenizer, evaluation_text(), window=512, stride=512, max_tokens=4096)
    end, text = tokenizer.eos_token_id, evaluation_text()[:CHARACTERS]

    answer = ask_llama_cpp(file, ours, prompts, end, text)

    assert answer["text"] == tokenizer(text, add_special_tokens=False).input_ids
    assert_same_perplexity(recipe, answer, ours)
    same = [
        greedy(model, ids, end, NEW_TOKENS) == theirs
        for ids, theirs in zip(prompts, answer["tokens"], strict=True)
    ]
    print(f"{recipe}: {sum(same)} of {len(same)} continuations are equal")
    assert sum(same) >= 0.75 * len(same)


def to_seq(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``[out, in]`` to the levels -1.5, -0.5, 0.5, 1.5: codes, float16 scales, the rounded weight."""
    tiles = weight.unflatten(1, (-1, group))
    scale = tiles.abs().mean(-1).half().float()
    codes = (tiles / scale[..., None] + 1.5).round().clamp(0, 3)
    return codes.flatten(1).to(torch.int8), scale, ((codes - 1.5) * scale[..., None]).flatten(1)


def to_ternary(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``[out, in]`` to -1, 0, 1 times the mean of what is not 0 (ternary weight networks, arXiv 1605.04711)."""
    tiles = weight.unflatten(1, (-1, group))
    codes = torch.where(tiles.abs() >= 0.75 * tiles.abs().mean(-1, keepdim=True), tiles.sign(), 0.0)
    scale = ((tiles * codes).sum(-1) / codes.abs().sum(-1)).half().float()
    return codes.flatten(1).to(torch.int8), scale, (codes * scale[..., None]).flatten(1)


ROUND = {"seq": to_seq, "ternary": to_ternary}


@pytest.mark.parametrize(
    "kind, name, group",
    [
        ("seq", "Q2_K", 0),
        ("seq", "Q4_0", 32),
        ("ternary", "TQ1_0", 0),
        ("ternary", "TQ2_0", 256),
        ("ternary", "Q2_0", 64),
        ("ternary", "Q4_0", 0),
    ],
)
def test_llama_cpp_computes_with_our_low_bit_weights(kind: str, name: str, group: int, tmp_path: Path):
    """tiny-lm rounded without any training: the numbers are what is compared, not how good they are."""
    from transformers import AutoModelForCausalLM

    folder = builtin_model("tiny-lm")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer_of(folder)
    weights = {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and path.startswith("model.layers"):
            codes, scale, rounded = ROUND[kind](layer.weight.data, group or layer.in_features)
            layer.weight.data = rounded
            weights[path] = Blocks(name, pack(kind, name, codes, scale))
    write_model(open_any("tiny-lm"), tmp_path / "model.gguf", weights)
    ours = nll_per_token(model, tokenizer, evaluation_text(), window=512, stride=512, max_tokens=2048)

    answer = ask_llama_cpp(tmp_path / "model.gguf", ours, [], tokenizer.eos_token_id)

    assert len(weights) == 42
    assert_same_perplexity(f"{kind} as {name}, groups of {group}", answer, ours)


TRAINED = {  # recipe, words, GGUF type
    "seq": ("seq_2bit", (), "Q2_K"),
    "ternary rows, small": ("ternary_absmean", (), "TQ1_0"),
    "ternary rows": ("ternary_absmean", (), "TQ2_0"),
    "ternary groups": ("ternary_tequila", (), "Q2_0"),
    "sherry": ("sherry", (), "Q4_0"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_llama_cpp_runs_what_training_leaves(name: str, tmp_path: Path):
    """A few steps of training, exported by the command that users have."""
    recipe, words, kind = TRAINED[name]
    short = ("dataset.max_seq_length=128", "compression.QAT.hf_args.max_steps=8", "evaluation.enabled=false")
    carry_out(prepare_any(load_recipe(recipe, [*short, *words]), "tiny-lm"), tmp_path / "out")
    convert(tmp_path / "out", f"gguf:{kind.lower()}", tmp_path / "model.gguf")
    model, tokenizer = angelslim.load(tmp_path / "out").float(), tokenizer_of(tmp_path / "out")
    ours = nll_per_token(model, tokenizer, evaluation_text(), window=512, stride=512, max_tokens=2048)

    answer = ask_llama_cpp(tmp_path / "model.gguf", ours, [], tokenizer.eos_token_id)

    assert_same_perplexity(f"{recipe} as {kind}", answer, ours)


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3.1 rotary": ("llama", {"rope_parameters": LLAMA_3}),
    "linear rotary": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, with biases": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("label", GRAPHS)
def test_llama_cpp_computes_what_transformers_does(label: str, tmp_path: Path):
    """A random model in float32 whose attention and predictions are far from flat, token by token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = GRAPHS[label]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TEXT, "vocab_size": 300, **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.dim() == 1 else 0.2)
    model.save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    write_model(open_any(tmp_path / "model"), tmp_path / "model.gguf", {})
    ours = nll_per_token(model, tokenizer, evaluation_text(), window=192, stride=192, max_tokens=600)

    answer = ask_llama_cpp(tmp_path / "model.gguf", ours, [], tokenizer.eos_token_id)

    worst = float((likelihoods(answer, ours) - ours.nll).abs().max())
    print(f"{label}: likelihoods {ours.nll.min():.2f} to {ours.nll.max():.2f}, differ by at most {worst:.5f}")
    assert float(ours.nll.std()) > 1 and worst < 0.05


TRICKY = (
    "It's 3 o'clock, they'LL pay 1234567.89 EUR;  two  spaces\n\n\tdef f(x):\r\n    return x**2  # Gr\u00f6\u00dfe \u00bd\n"
    "<|im_start|>user\nna\u00efve caf\u00e9 \u4f60\u597d\uff0c\u4e16\u754c \U0001f642 \u0939\u093f\u0928\u094d\u0926\u0940<|im_end|>\n   "
)


@pytest.mark.parametrize("split", ["qwen2", "llama-bpe"])
def test_llama_cpp_splits_text_as_the_tokenizer_does(split: str, tmp_path: Path):
    """Contractions, runs of digits and spaces, line ends, other scripts, special tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    AutoTokenizer.from_pretrained(builtin_model("tiny-lm")).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    pattern = {name: pattern for pattern, name in SPLITS.items()}[split]
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    content["model"]["ignore_merges"] = split == "llama-bpe"
    file.write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**TEXT, "vocab_size": len(tokenizer)})
    ).eval()
    model.save_pretrained(folder)
    write_model(open_any(folder), tmp_path / "model.gguf", {})
    ours = nll_per_token(model, tokenizer, TRICKY, window=64, stride=64, max_tokens=20)

    answer = ask_llama_cpp(tmp_path / "model.gguf", ours, [], tokenizer.eos_token_id, TRICKY)

    assert answer["text"] == tokenizer(TRICKY, add_special_tokens=False).input_ids
