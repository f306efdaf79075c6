"""The rows that ``angelslim inspect`` prints."""

from __future__ import annotations

import json

from angelslim.models.loading import open_model
from angelslim.models.summary import summarize
from families import save_random


def test_equal_blocks_are_one_row_and_different_ones_two(tmp_path):
    save_random("deepseek_v3", tmp_path)
    summary = summarize(open_model(tmp_path))
    rows = {(row["source"], row["linears"]): row["blocks"] for row in summary["groups"]}
    assert rows["input_layernorm", "self_attn.q_a_proj, self_attn.kv_a_proj_with_mqa"] == "0-1"
    assert rows["post_attention_layernorm", "mlp.gate_proj, mlp.up_proj"] == "0"
    assert rows["post_attention_layernorm", "mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj"] == "1"
    assert summary["experts"][0]["experts"] == 4
    assert summary["architecture"] == "DeepseekV3ForCausalLM"
    json.dumps(summary)


def test_towers_and_counts(tmp_path):
    model = save_random("llava", tmp_path)
    summary = summarize(open_model(tmp_path))
    assert summary["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert {row["modality"] for row in summary["towers"]} == {"vision", "projector"}
    assert summary["head"] == "lm_head"
