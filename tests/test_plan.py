"""Choices made before any work, and what they will cost."""

from __future__ import annotations

import json

import pytest
import torch

from angelslim import plan
from angelslim.base.errors import ConfigError, ResourceError, SchemeError
from angelslim.models import loading
from angelslim.plan import (
    LIBRARIES,
    WITHOUT_NETWORK,
    activation_bytes,
    check_disk,
    disk_needed,
    estimate,
    peak_memory,
)
from families import FAMILIES, random_model
from tiny import job_for, save_qwen3


def test_units_cover_every_tensor_once(deep_folder):
    job = job_for(deep_folder, "fp8_dynamic")
    names = [name for unit in job.units for name in unit.tensors]
    assert sorted(names) == sorted(job.source.checkpoint.tensors)
    assert [unit.name for unit in job.units if unit.block is not None] == [f"block-{i:05d}" for i in range(6)]


def test_a_run_is_called_by_its_recipe_else_by_the_methods_public_name(tiny_folder):
    assert job_for(tiny_folder, "int4_rtn_asym").name == "int4_rtn_asym"
    public = {"compression": {"quantization": {"name": "int4_rtn"}}}
    assert job_for(tiny_folder, public).name == "int4_rtn"
    explicit = {"compression": {"quantization": {"scheme": "int8_dynamic"}}}
    assert job_for(tiny_folder, explicit).name == "rtn"


def test_several_blocks_of_work_are_refused(tiny_folder):
    stage = {"quantization": {"name": "fp8_dynamic"}}
    with pytest.raises(ConfigError, match="asks for 2 quantizations"):
        job_for(tiny_folder, {"compression": [stage, stage]})


@pytest.mark.parametrize("name", ["daq"])
def test_known_names_that_are_not_built(tiny_folder, name):
    with pytest.raises(ConfigError, match=r"Understood, but not built yet: ptq method"):
        job_for(tiny_folder, {"compression": {"quantization": {"name": name}}})


def test_a_static_head_is_refused_and_a_dynamic_one_is_not(tmp_path):
    folder = save_qwen3(tmp_path / "model", tie_word_embeddings=False)
    head = "compression.quantization.quantize_lm_head=true"
    with pytest.raises(SchemeError, match="'lm_head' lies outside the blocks"):
        job_for(folder, "fp8_static", head)
    assert [layer.name for layer in job_for(folder, "fp8_dynamic", head).selection.in_block(None)] == [
        "lm_head"
    ]


def test_the_estimate_is_plain_data(tiny_folder):
    plan = estimate(job_for(tiny_folder, "fp8_static", "dataset.num_samples=8", "dataset.max_seq_length=64"))
    values = json.loads(plan.to_json())
    assert values["samples"] == 8 and values["max_length"] == 64
    assert values["bytes_after"] < values["bytes_before"]
    assert values["seconds"] > 0 and values["files"] == 1
    assert sum(values["layers"].values()) == 14


def test_activations_count_in_memory_up_to_their_budget_and_on_disk_twice(tiny_folder):
    long = ("dataset.num_samples=1000", "dataset.max_seq_length=512")
    big = job_for(tiny_folder, "fp8_static", *long, "global.activation_budget=1GB")
    small = job_for(tiny_folder, "fp8_static", *long, "global.activation_budget=1MB")
    size = 1000 * 512 * 128 * 2
    assert activation_bytes(big) == size
    assert peak_memory(big) - peak_memory(small) == size - 10**6
    assert disk_needed(big, 100) >= 2 * size
    assert activation_bytes(job_for(tiny_folder, "fp8_dynamic", *long)) == 0


def test_disk_is_checked_where_the_output_will_lie(tiny_folder, tmp_path, monkeypatch):
    import shutil

    asked = []

    def usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(1, 1, 0)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(ResourceError, match=r"needs .* MB on the disk of .* free"):
        check_disk(job_for(tiny_folder, "fp8_dynamic"), tmp_path / "not" / "there" / "yet")
    assert asked == [tmp_path]


def test_a_mixture_needs_the_memory_of_one_expert_however_it_is_stored(tmp_path):
    """Twice the experts add their results and what travels, not their weights or what rounding one takes."""
    data = ("dataset.num_samples=4", "dataset.max_seq_length=32")
    sizes = {"vocab_size": 272, "hidden_size": 256, "moe_intermediate_size": 256, "norm_topk_prob": True}
    peaks = {}
    for experts in (8, 16):
        folder = tmp_path / str(experts)
        random_model("qwen3_moe", torch.bfloat16, num_experts=experts, **sizes).save_pretrained(folder)
        peaks[experts] = peak_memory(job_for(folder, "fp8_static", *data))
    one = 3 * 256 * 256  # parameters of an expert, and its bytes in FP8
    scales = 3 * 4 * 8
    routers = 2 * 256 * 8
    assert peaks[16] - peaks[8] == pytest.approx(8 * one + scales + routers, abs=2000)
    stored = tmp_path / "stacks"
    text = {**FAMILIES["qwen3_vl_moe"]["text_config"], **sizes, "num_experts": 8}
    changes = {
        "text_config": text,
        "vision_config": {**FAMILIES["qwen3_vl_moe"]["vision_config"], "out_hidden_size": 256},
    }
    random_model("qwen3_vl_moe", torch.bfloat16, **changes).save_pretrained(stored)
    assert peak_memory(job_for(stored, "fp8_static", *data)) == pytest.approx(peaks[8], rel=0.02)


def test_a_run_without_data_on_a_remembered_model_loads_no_network(tmp_path, monkeypatch):
    folder = save_qwen3(tmp_path / "model")
    shipped = peak_memory(job_for(folder, "int8_dynamic"))
    for module in (plan, loading):
        monkeypatch.setattr(module, "shipped", lambda *_: None)
    assert peak_memory(job_for(folder, "int8_dynamic")) - shipped == LIBRARIES - WITHOUT_NETWORK
    monkeypatch.setenv("ANGELSLIM_CACHE", str(tmp_path / "cache"))
    assert peak_memory(job_for(folder, "int8_dynamic")) == shipped
