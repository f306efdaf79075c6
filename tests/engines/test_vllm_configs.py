"""Schemes that this machine cannot run: vLLM's own code reads our config and says what it would run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from angelslim.config.schemes import EXTRA
from angelslim.export.compressed_tensors import FORMAT
from angelslim.numerics.scheme import PRESETS

pytestmark = pytest.mark.engine
PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
EXPECTED = {
    "fp8_static": "W8A8Fp8",
    "fp8_static_channel": "W8A8Fp8",
    "fp8_dynamic": "W8A8Fp8",
    "fp8_dynamic_tensor": "W8A8Fp8",
    "fp8_block": "W8A8Fp8",
    "fp8_weight_only": "W8A16Fp8",
    "int8_dynamic": "W8A8Int8",
    "int8_static": "W8A8Int8",
    "int8_weight_only": "WNA16",
    "int4": "WNA16",
    "int4_g32": "WNA16",
    "int4_asym": "WNA16",
    "w4a8_int8": "WNA8Int",
    "w4a8_fp8": "W4A8Fp8",
    "nvfp4": "W4A4Fp4",
    "nvfp4_weight_only": "W4A4Fp4",
    "mxfp4": "W4A4Mxfp4",
    "mxfp4_weight_only": "W4A4Mxfp4",
    "mxfp8": "W8A8Mxfp8",
}


def test_vllm_recognises_every_scheme_that_we_write(tmp_path: Path):
    assert PYTHON.exists(), "the vLLM environment is missing: run `make engines`"
    layer = "model.layers.0.mlp.down_proj"
    asked = {
        name: {
            "config": FORMAT.config({layer: {**PRESETS, **EXTRA}[name]}, ["lm_head"]),
            "layers": {layer: "RowParallelLinear"},
        }
        for name in EXPECTED
    }
    rest, experts = PRESETS["fp8_block"], PRESETS["w4a8_fp8"]
    blocks = [f"model.layers.{index}" for index in range(3)]
    mixture = {f"{block}.self_attn.{name}_proj": rest for block in blocks for name in "qkvo"}
    mixture |= {
        f"{block}.mlp.experts.{expert}.{name}_proj": experts
        for block in blocks
        for expert in range(8)
        for name in ("gate", "up", "down")
    }
    asked["mixture"] = {
        "config": FORMAT.config(mixture, ["lm_head", "model.layers.0.mlp.gate"]),
        "layers": {
            "model.layers.1.self_attn.qkv_proj": "QKVParallelLinear",
            "language_model.model.layers.1.self_attn.o_proj": "RowParallelLinear",
            "model.layers.2.mlp.experts.7.up_proj": "RoutedExperts",
        },
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("vllm_configs.py")
    subprocess.run([PYTHON, script, tmp_path / "asked.json", tmp_path / "answers.json"], check=True)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert list(answers.pop("mixture").values()) == [
        f"CompressedTensors{name}" for name in ("W8A8Fp8", "W8A8Fp8", "W4A8Fp8")
    ]
    assert {
        name: answer[layer].removeprefix("CompressedTensors") for name, answer in answers.items()
    } == EXPECTED
