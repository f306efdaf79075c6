"""Rewriting a compressed folder in another format keeps every number."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim import load, pipeline
from angelslim.base.errors import ConfigError, ModelError, SchemeError, UserError
from angelslim.convert import check, convert
from families import save_random
from tiny import copy_model, job_for


@pytest.fixture(scope="module")
def blocks(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("convert") / "fp8-block"
    pipeline.run(job_for(tiny_folder, "fp8_block", "compression.quantization.format=fp8_block"), out)
    return out


def same_weights(left, right) -> bool:
    first, second = load(left).state_dict(), load(right).state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_there_and_back_again(blocks, tmp_path):
    convert(blocks, "compressed-tensors", tmp_path / "ct")
    assert (
        json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "compressed-tensors"
    )
    assert same_weights(blocks, tmp_path / "ct")
    convert(tmp_path / "ct", "fp8_block", tmp_path / "back")
    original, back = (
        load_file(blocks / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert original.keys() == back.keys()
    assert all(
        torch.equal(original[n].view(-1).view(torch.uint8), back[n].view(-1).view(torch.uint8))
        for n in original
    )
    first, second = (json.loads((f / "config.json").read_text()) for f in (blocks, tmp_path / "back"))
    assert first == second
    assert (tmp_path / "ct" / "tokenizer.json").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_biases_and_sharded_folders(tmp_path):

    save_random("qwen2", tmp_path / "model")  # q, k and v have biases
    pipeline.run(
        job_for(
            tmp_path / "model",
            "int4_rtn_asym",
            "compression.quantization.quant_method.group_size=32",
            "global.max_shard_size=20KB",
        ),
        tmp_path / "out",
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    convert(tmp_path / "out", "compressed_tensors", tmp_path / "again")
    assert same_weights(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors.index.json").exists()


def test_a_format_that_cannot_hold_the_scheme_is_refused(tiny_folder, tmp_path):
    pipeline.run(job_for(tiny_folder, "int8_dynamic"), tmp_path / "int8")
    with pytest.raises(SchemeError, match=r"cannot hold .*int8 per-channel.*weights must be FP8"):
        convert(tmp_path / "int8", "fp8_block", tmp_path / "out")
    with pytest.raises(ConfigError, match="Unknown format"):
        convert(tmp_path / "int8", "fp9", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_what_exists_is_not_replaced(blocks, tmp_path):
    with pytest.raises(UserError, match="already exists"):
        convert(blocks, "compressed_tensors", tmp_path)


def test_a_plain_model_cannot_be_converted(tiny_folder, tmp_path):
    with pytest.raises(ModelError, match="is not quantized"):
        convert(tiny_folder, "compressed_tensors", tmp_path / "out")


def test_check_counts_the_layers(blocks):
    assert check(blocks) == 14


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_check_finds_a_bad_scale(value, blocks, tmp_path):
    folder = copy_model(blocks, tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj'"):
        check(folder)


def test_check_finds_a_missing_part(blocks, tmp_path):
    folder = copy_model(blocks, tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        check(folder)


def test_check_finds_scales_of_another_shape(blocks, tmp_path):
    folder = copy_model(blocks, tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 5)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        check(folder)
