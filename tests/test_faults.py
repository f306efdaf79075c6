"""Degenerate but valid models through whole runs: dead channels, experts that the router never chooses.

Other faults have tests where they arise: NaN, truncated shards, empty data and groups that do not divide in
`test_bad_inputs`; full disks and SIGKILL in `test_pipeline`; singular Hessians in `methods/test_gptq`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import angelslim
from families import random_model
from tiny import byte_tokenizer, qwen3

SMALL = {"dataset__num_samples": 4, "dataset__max_seq_length": 32, "evaluation__enabled": False}
RECIPES = (
    "fp8_static",
    "fp8_lepto",
    "int8_smooth_gptq",
    "int4_rtn_asym",
    "int4_awq",
    "int4_gptq",
    "int4_gptaq",
    "int4_best",
    "w4a8_fp8",
    "nvfp4",
)
BLOCK = "model.layers.1"


def with_dead_channels(folder: Path) -> Path:
    """Block 1: a channel that its norms mute, a row of zeros, a column of zeros, and a whole matrix of zeros."""
    model = qwen3(2)
    block = model.model.layers[1]
    block.input_layernorm.weight.data[5] = 0
    block.post_attention_layernorm.weight.data[5] = 0
    block.mlp.up_proj.weight.data[7] = 0
    block.mlp.gate_proj.weight.data[:, 9] = 0
    block.self_attn.v_proj.weight.data.zero_()
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_dead_channels_stay_dead_and_everything_stays_finite(recipe, tmp_path):
    model = with_dead_channels(tmp_path / "model")
    result = angelslim.compress(model, recipe, out=tmp_path / "out", **SMALL)
    assert len(result.report.layers) == 14
    written = dict(angelslim.load(tmp_path / "out").named_parameters())
    assert all(value.isfinite().all() for value in written.values())
    assert not written[f"{BLOCK}.self_attn.v_proj.weight"].any()
    assert not written[f"{BLOCK}.mlp.up_proj.weight"][7].any()
    others = written[f"{BLOCK}.mlp.gate_proj.weight"]
    assert others.any(dim=1).all()  # the dead ones took nobody along


@pytest.mark.parametrize("recipe", ["fp8_static", "int8_smooth", "int4_awq", "int4_gptq", "int4_gptaq"])
def test_an_expert_that_is_never_chosen_is_rounded_well_and_named(recipe, tmp_path):
    sizes = {"vocab_size": 272, "hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
    model = random_model("qwen3_moe", torch.bfloat16, **sizes)
    first = model.model.layers[0]
    first.post_attention_layernorm.weight.data.fill_(1.0)
    model.model.embed_tokens.weight.data[:, 0] = 40.0  # every token is far out in this direction,
    for projection in (first.self_attn.v_proj, first.self_attn.o_proj):
        projection.weight.data.mul_(0.01)
    first.mlp.gate.weight.data[:3, 0], first.mlp.gate.weight.data[3, 0] = (
        1.0,
        -9.0,
    )  # and expert 3 dislikes it
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    result = angelslim.compress(tmp_path / "model", recipe, out=tmp_path / "out", **SMALL)
    uses = [use for use in result.report.experts if use.module == "model.layers.0.mlp.experts"]
    assert [use.tokens > 0 for use in uses] == [True, True, True, False]
    assert "statistics also use 128 of others" in uses[3].note and uses[3].of == 128
    mine = [layer for layer in result.report.layers if "layers.0.mlp.experts.3." in layer.name]
    assert len(mine) == 3 and all(layer.sqnr_db > 10 for layer in mine)
    assert all(value.isfinite().all() for value in angelslim.load(tmp_path / "out").parameters())
