"""Rewriting a compressed folder in another format keeps every number."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim import load, pipeline
from angelslim.base.errors import ConfigError, ModelError, ResourceError, SchemeError, UserError
from angelslim.check import check
from angelslim.convert import convert
from angelslim.export import w4afp8
from angelslim.export._checkpoint import open_any
from angelslim.export.base import FORMATS
from angelslim.models.checkpoint import UnitWriter
from angelslim.models.loading import model_class
from angelslim.numerics.quantize import quantize
from families import config_of, save_random
from tiny import Killed, copy_model, dies_at, edit_json, job_for, save_qwen3


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


FORMAT = "compression.quantization.format"
GROUPS = "compression.quantization.quant_method.group_size=64"
INT8_GROUPS = {
    "extends": "base",
    "compression": {
        "quantization": {
            "scheme": {"weight": {"format": "int8", "granularity": "per-group", "group_size": 64}}
        }
    },
}
CALIBRATED = ("dataset.num_samples=2", "dataset.max_seq_length=32")
JOURNEYS = {  # recipe, overrides -> the formats that it travels through
    "int4": ("int4_rtn", (), ["gptq", "awq", "compressed_tensors"]),
    "int4 groups of 64": ("int4_rtn", (GROUPS,), ["awq", "gptq", "compressed_tensors"]),
    "int4 with zero points": ("int4_rtn_asym", (), ["awq", "compressed_tensors", "awq"]),
    "int4 per channel": ("int4_rtn", (GROUPS.replace("64", "-1"),), ["gptq", "compressed_tensors"]),
    "int8 groups": (INT8_GROUPS, (f"{FORMAT}=gptq",), ["compressed_tensors", "gptq"]),
    "int4 for llama.cpp": ("gguf_q4_0", (), ["gptq", "compressed_tensors"]),
    "fp8 static": ("fp8_static", CALIBRATED, ["fp8_tensor", "compressed_tensors"]),
    "fp8 blocks": ("fp8_block", (f"{FORMAT}=fp8_block",), ["compressed_tensors", "fp8_block"]),
}


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    return save_qwen3(tmp_path_factory.mktemp("float32") / "model", dtype=torch.float32)


def numbers(folder):
    """Codes less zero points, and scales, of every layer."""
    checkpoint = open_any(folder).checkpoint
    for name in checkpoint.parts:
        layer = checkpoint.restore(name)
        codes, scale, zero = layer.weight.codes.float(), layer.weight.scale.float(), layer.weight.zero
        shift = torch.zeros_like(scale) if zero is None else zero.float()
        given = None if layer.input_scale is None else layer.input_scale.flatten().tolist()
        yield name, codes, shift, scale, given


def assert_same_numbers(left, right):
    for first, second in zip(numbers(left), numbers(right), strict=True):
        assert (first[0], first[4]) == (second[0], second[4])
        assert all(torch.equal(a, b) for a, b in zip(first[1:4], second[1:4], strict=True)), first[0]


@pytest.mark.parametrize("journey", JOURNEYS)
def test_numbers_survive_every_format_that_holds_them(journey, tiny_folder, tmp_path):
    recipe, overrides, formats = JOURNEYS[journey]
    start = here = tmp_path / "start"
    pipeline.run(job_for(tiny_folder, recipe, *overrides), start)
    for stop, name in enumerate(formats):
        convert(here, name, tmp_path / f"{stop}")
        here = tmp_path / f"{stop}"
        assert_same_numbers(start, here)
        assert check(here) == 14
        settings = json.loads((here / "config.json").read_text())["quantization_config"]
        assert FORMATS.get(name).reads(settings)
    assert same_weights(start, here)


@pytest.mark.parametrize(
    "recipe, format_", [("int4_rtn", "gptq"), ("int4_rtn_asym", "awq"), (INT8_GROUPS, "gptq")], ids=str
)
def test_a_run_chooses_codes_for_the_scales_that_the_format_keeps(recipe, format_, float_folder, tmp_path):
    """The model is in float32, so its scales would not be float16 numbers by themselves."""
    pipeline.run(job_for(float_folder, recipe, f"{FORMAT}={format_}"), tmp_path / "out")
    checkpoint = open_any(tmp_path / "out").checkpoint
    original = open_any(float_folder).checkpoint
    name = "model.layers.1.mlp.up_proj"
    layer, scheme = checkpoint.restore(name), checkpoint.schemes[name]
    assert layer.weight.scale.dtype == torch.float16 and scheme.weight.scale == "float16"
    expected = quantize(original.read(f"{name}.weight"), scheme.weight)
    assert torch.equal(layer.weight.codes, expected.codes) and torch.equal(layer.weight.scale, expected.scale)
    convert(tmp_path / "out", "compressed_tensors", tmp_path / "ct")
    assert_same_numbers(tmp_path / "out", tmp_path / "ct")


def test_the_scales_of_a_bfloat16_model_stay_numbers_of_its_own_type(tiny_folder, tmp_path):
    """Engines that compute in bfloat16 load float16 scales into it: nothing may be rounded then."""
    pipeline.run(job_for(tiny_folder, INT8_GROUPS, f"{FORMAT}=gptq"), tmp_path / "out")
    layer = open_any(tmp_path / "out").checkpoint.restore("model.layers.1.mlp.up_proj")
    assert layer.weight.scale.dtype == torch.float16
    assert torch.equal(layer.weight.scale.bfloat16().float(), layer.weight.scale.float())


def test_what_a_run_cannot_write_is_refused_before_any_work(tiny_folder):
    for recipe, format_, reason in (
        ("int4_rtn", "awq", "must have zero points"),
        ("int4_rtn_asym", "gptq", "must be symmetric"),
        ("int8_dynamic", "gptq", "inputs cannot be quantized"),
        ("int4_rtn", "w4afp8", "layers must be"),
    ):
        with pytest.raises(SchemeError, match=reason):
            job_for(tiny_folder, recipe, f"{FORMAT}={format_}")


def test_sizes_that_do_not_fill_words_are_refused_before_any_work(tmp_path):
    model = save_qwen3(tmp_path / "model", intermediate_size=132)
    with pytest.raises(SchemeError, match=r"mlp.*_proj': its sizes 132 x 128 are not multiples of 8"):
        job_for(model, "int4_rtn", f"{FORMAT}=gptq", "compression.quantization.ignore_layers=[down_proj]")


@pytest.mark.parametrize(
    "recipe, wanted, reason",
    [
        ("int4_rtn_asym", "gptq", "has zero points that are not 0"),
        ("int4_rtn", "gptq", "has scales that float16 does not hold"),
        ("int4_rtn", "gguf", "has scales that float16 does not hold"),
    ],
)
def test_numbers_that_a_format_would_change_are_refused(recipe, wanted, reason, float_folder, tmp_path):
    pipeline.run(job_for(float_folder, recipe), tmp_path / "in")
    with pytest.raises(SchemeError, match=f"'model.layers.0.*{reason}"):
        convert(tmp_path / "in", wanted, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_killed_conversion_leaves_no_folder_and_the_next_one_succeeds(blocks, tmp_path, monkeypatch):
    original = UnitWriter.write
    monkeypatch.setattr(UnitWriter, "write", dies_at(original, 3, after=True))
    with pytest.raises(Killed):
        convert(blocks, "compressed_tensors", tmp_path / "ct")
    monkeypatch.setattr(UnitWriter, "write", original)
    assert not (tmp_path / "ct").exists()
    convert(blocks, "compressed_tensors", tmp_path / "ct")
    assert_same_numbers(blocks, tmp_path / "ct")


def test_a_full_disk_is_said(blocks, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UnitWriter, "finish", full)
    with pytest.raises(ResourceError, match=r"No space left.*Free some disk space"):
        convert(blocks, "compressed_tensors", tmp_path / "ct")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny DeepSeek-V3 with INT4 experts and FP8 blocks, in SGLang's layout."""
    wide = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "q_lora_rank": 32}
    config = config_of("deepseek_v3", **wide)
    folder = tmp_path_factory.mktemp("mixture") / "w4afp8"
    torch.manual_seed(0)
    model_class(config)._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    linears = [n.removesuffix(".weight") for n in tensors if "_proj" in n and n.endswith(".weight")]
    schemes = w4afp8.FORMAT.schemes({}, linears)
    for name, scheme in schemes.items():
        weight = quantize(tensors.pop(f"{name}.weight"), scheme.weight)
        given = torch.tensor([[0.5]]) if w4afp8.is_expert(name) else None
        tensors |= w4afp8.FORMAT.tensors(name, weight, scheme, given)
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", quantization_config=w4afp8.FORMAT.config(schemes, ["lm_head"]))
    return folder


def test_a_mixture_is_read_and_written_byte_for_byte(mixture, tmp_path):
    convert(mixture, "w4afp8", tmp_path / "again")
    assert_same_numbers(mixture, tmp_path / "again")
    original, again = (load_file(f / "model.safetensors") for f in (mixture, tmp_path / "again"))
    assert original.keys() == again.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), again[name].reshape(-1).view(torch.uint8)), (
            name
        )
    settings = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.mlp.gate"} <= set(settings["modules_to_not_convert"])
    assert check(mixture) == check(tmp_path / "again") == 3 * 4 + 3 + 3 + 2 * 5


def test_other_formats_do_not_hold_the_mixture(mixture, tmp_path):
    for name, reason in (("fp8_block", "weights must be FP8"), ("compressed_tensors", "static activations")):
        with pytest.raises(SchemeError, match=f"cannot hold .*{reason}"):
            convert(mixture, name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_converts_and_checks_files_too(cli, tmp_path, tiny_folder):
    pipeline.run(job_for(tiny_folder, "gguf_q8_0"), tmp_path / "q8")
    file = tmp_path / "q8.gguf"
    assert "Wrote" in cli("export", tmp_path / "q8", "--format", "gguf", "--out", file).out
    assert "14 layers decode" in cli("export", file, "--check").out
    refused = cli("export", tmp_path / "q8", "--format", "awq", "--out", tmp_path / "awq")
    assert refused.code == 2 and "weights must be INT4" in refused.err


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


def test_check_finds_a_code_that_is_no_number(blocks, tmp_path):
    folder = copy_model(blocks, tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    for bits in (0x7F, 0xFF):
        tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[-1, -1] = bits
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj'"):
            check(folder)


def test_check_finds_a_scale_that_decodes_to_infinity(blocks, tmp_path):
    folder = copy_model(blocks, tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] = 1e38
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj'"):
        check(folder)


def test_check_looks_at_weights_in_full_precision_too(blocks, tmp_path):
    folder = copy_model(blocks, tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"'model\.layers\.1\.input_layernorm\.weight', which is not quantized"
    ):
        check(folder)


def test_check_finds_shapes_of_another_model(blocks, tmp_path):
    folder = copy_model(blocks, tmp_path / "bad")
    edit_json(folder / "config.json", intermediate_size=128)
    with pytest.raises(ModelError, match=r"has shape \[.*256.*\], config\.json asks for"):
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
