"""Mixtures and vision models in vLLM's own classes: every tensor that we write finds its place, and no place stays empty.

No kernel for quantized experts runs on a CPU without AMX, and the engine's environment has no torchvision, so these
folders cannot be started here; they are loaded by vLLM's loader, which is where names, shapes and types are decided.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import angelslim
from families import FAMILIES, random_model
from tiny import byte_tokenizer

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
TEXT = {"vocab_size": 272, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "eos_token_id": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}}


def vision(family: str, **changes: Any) -> dict[str, Any]:
    """A family's configuration at sizes that groups of 128 fit."""
    parts = FAMILIES[family]
    text = {**parts["text_config"], **TEXT, **MROPE, **changes}
    return {"text_config": text, "vision_config": {**parts["vision_config"], "out_hidden_size": 128}}


MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**TEXT, "moe_intermediate_size": 128},
    "llama4_text": {**TEXT, "intermediate_size": 128, "intermediate_size_mlp": 256},
    "qwen3_vl_moe": vision("qwen3_vl_moe", moe_intermediate_size=128, norm_topk_prob=True),
    "qwen2_5_vl": vision("qwen2_5_vl"),
    "qwen3_vl": vision("qwen3_vl"),
}
RECIPES = ("fp8_dynamic", "int4_rtn", "int8_dynamic")
EXPERTS = {
    "qwen3_moe": "model.layers.{}.mlp.experts",
    "llama4_text": "model.layers.{}.feed_forward.experts",
    "qwen3_vl_moe": "model.language_model.layers.{}.mlp.experts",
}


def test_vllm_finds_every_tensor_of_mixtures_and_vision_models(tmp_path: Path) -> None:
    assert PYTHON.exists(), "the vLLM environment is missing: run `make engines`"
    folders = {}
    for family, changes in MODELS.items():
        model = random_model(family, torch.bfloat16, **changes)
        model.save_pretrained(tmp_path / family)
        byte_tokenizer().save_pretrained(tmp_path / family)
        for recipe in RECIPES:
            folders[family, recipe] = tmp_path / f"{family}-{recipe}"
            angelslim.compress(
                tmp_path / family, recipe, out=folders[family, recipe], evaluation__enabled=False
            )
    (tmp_path / "folders.json").write_text(json.dumps([str(folder) for folder in folders.values()]))
    done = subprocess.run(
        [PYTHON, HERE / "vllm_loads.py", tmp_path / "folders.json", tmp_path],
        env={**os.environ, "PYTHONPATH": str(HERE / "stubs")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    empty = json.loads((tmp_path / "loaded.json").read_text())
    for index, (family, recipe) in enumerate(folders):
        left = [
            name for name in empty[index] if ".attn." not in name
        ]  # scales of a cache that is not quantized
        assert left == [], (family, recipe)
        if family in EXPERTS:
            held = load_file(tmp_path / f"{index}.safetensors")
            ours = load_file(folders[family, recipe] / "model.safetensors")
            assert_experts_hold(held, ours, EXPERTS[family].format(1), recipe)


def assert_experts_hold(
    held: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], path: str, recipe: str
) -> None:
    """vLLM's stack of a layer is gate above up, and down, of each expert as we wrote them."""
    leaf = "weight_packed" if recipe == "int4_rtn" else "weight"
    inside = path.removeprefix("model.language_model.")
    for leaf_name in (leaf, "weight_scale"):
        for stack, parts in {"w13": ("gate", "up"), "w2": ("down",)}.items():
            (name,) = [key for key in held if inside in key and key.endswith(f".{stack}_{leaf_name}")]
            for expert in range(4):
                written = [ours[f"{path}.{expert}.{part}_proj.{leaf_name}"] for part in parts]
                joined = torch.cat([each.view(torch.uint8) for each in written])
                assert torch.equal(held[name][expert].contiguous().view(torch.uint8), joined), (name, expert)
