"""Compressed folders opened by us and by stock transformers: the same weights and the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from angelslim import load, pipeline
from angelslim.base.errors import ModelError
from angelslim.models.checkpoint import Checkpoint
from angelslim.numerics.quantize import fake_quantize
from angelslim.numerics.scheme import PRESETS
from families import FAMILIES, save_random
from tiny import job_for, save_qwen3

GROUP = "compression.quantization.quant_method.group_size"
SCHEME = "compression.quantization.scheme"
RUNS = {
    "fp8_static": ("fp8_static", "dataset.num_samples=4", "dataset.max_seq_length=32"),
    "fp8_dynamic": ("fp8_dynamic",),
    "fp8 per tensor, dynamic": ("fp8_dynamic", "compression.quantization.quant_method.weight=per-tensor"),
    "int8_dynamic": ("int8_dynamic",),
    "int4_rtn": ("int4_rtn",),
    "int8 weights alone": ("int8_dynamic", f"{SCHEME}=int8_weight_only"),
    "w4a8_fp8": ("w4a8_fp8",),
    "int4 groups of 32": ("int4_rtn", f"{GROUP}=32"),
    "int4 per channel": ("int4_rtn", f"{GROUP}=-1"),
}
ASYMMETRIC = {
    "int4_rtn_asym": ("int4_rtn_asym",),
    "int4 groups of 64": ("int4_rtn_asym", f"{GROUP}=64"),
    "int4 per channel": ("int4_rtn_asym", f"{GROUP}=-1"),
}
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory) -> Path:
    """A float32 model, so that transformers keeps our float32 scales instead of rounding them to bfloat16."""
    return save_qwen3(tmp_path_factory.mktemp("float32") / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def compressed(float_folder, tmp_path_factory):
    made: dict[tuple[str, ...], Path] = {}

    def folder(*words: str) -> Path:
        if words not in made:
            made[words] = tmp_path_factory.mktemp("runs") / "out"
            pipeline.run(job_for(float_folder, words[0], *words[1:]), made[words])
        return made[words]

    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def stock(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def assert_same_weights(theirs, ours) -> None:
    expected = ours.state_dict()
    found = theirs.state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_transformers_computes_our_logits_exactly(words, compressed):
    """Its quantized forward and ours agree to the last bit: weights, input scales, rounding."""
    theirs, ours = stock(compressed(*words)), load(compressed(*words))
    assert torch.equal(logits(theirs), logits(ours))
    assert_same_weights(theirs, ours)  # its first forward has unpacked them


SMALL = {  # transformers decodes these to bfloat16, whatever the model's type
    "nvfp4_weight_only": ("nvfp4_weight_only",),
    "mxfp4": ("mxfp4",),
    "mxfp4_weight_only": ("mxfp4_weight_only",),
    "mxfp8": ("mxfp8",),
    "nvfp4 beside mxfp8": (
        "mxfp8",
        "compression.quantization.overrides=[{match: mlp, scheme: nvfp4_weight_only}]",
    ),
}


@pytest.mark.parametrize("words", SMALL.values(), ids=SMALL)
def test_transformers_computes_our_logits_with_small_floats(words, tiny_folder, tmp_path):
    pipeline.run(job_for(tiny_folder, words[0], *words[1:]), tmp_path / "out")
    theirs, ours = stock(tmp_path / "out"), load(tmp_path / "out")
    assert torch.equal(logits(theirs), logits(ours))
    assert_same_weights(theirs, ours)


def test_transformers_rounds_nvfp4_inputs_more_coarsely(tiny_folder, tmp_path):
    """The same weights and global scales, but it computes the local scales and quotients in bfloat16."""
    words = ("nvfp4", "dataset.num_samples=4", "dataset.max_seq_length=32")
    pipeline.run(job_for(tiny_folder, *words), tmp_path / "out")
    theirs, ours = stock(tmp_path / "out"), load(tmp_path / "out")
    found, expected = logits(theirs).float(), logits(ours).float()
    assert_same_weights(theirs, ours)
    assert (found - expected).norm() < 0.15 * expected.norm()
    attention = theirs.model.layers[1].self_attn
    assert attention.q_proj.input_global_scale == attention.v_proj.input_global_scale > 1
    assert attention.q_proj.weight_global_scale == attention.v_proj.weight_global_scale
    assert attention.o_proj.weight_global_scale != attention.v_proj.weight_global_scale


def test_the_deepseek_mixture_is_int4_experts_among_fp8_blocks(tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank"), 128)
    sizes |= {"kv_lora_rank": 128, "v_head_dim": 32, "head_dim": 8}
    torch.manual_seed(0)
    config = DeepseekV3Config(**{**FAMILIES["deepseek_v3"], **sizes})
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    pipeline.run(job_for(tmp_path / "model", "deepseek_w4a8_fp8"), tmp_path / "out")
    stored = Checkpoint(tmp_path / "out").tensors
    expert = "model.layers.1.mlp.experts.3.down_proj"
    assert stored[f"{expert}.weight_packed"].shape == (128, 16)  # half a byte a weight
    assert stored[f"{expert}.weight_scale"].shape == (128, 1)
    shared = "model.layers.1.mlp.shared_experts.down_proj"
    assert stored[f"{shared}.weight"].dtype == torch.float8_e4m3fn
    assert stored[f"{shared}.weight_scale"].shape == (1, 1)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "mixed-precision"
    targets = {group["format"]: group["targets"] for group in settings["config_groups"].values()}
    assert targets["float-quantized"] == ["Linear"]
    assert sorted(targets["pack-quantized"]) == [
        rf"re:(.*\.)?layers\.\d+\.mlp\.experts\.\d+\.{name}_proj$" for name in ("down", "gate", "up")
    ]
    with torch.no_grad():
        found = load(tmp_path / "out")(input_ids=IDS).logits.float()
        expected = load(tmp_path / "model")(input_ids=IDS).logits.float()
    assert 0 < (found - expected).norm() < 0.3 * expected.norm()


def test_static_inputs_of_an_override_are_calibrated(float_folder, tmp_path):
    words = ("compression.quantization.overrides=[{match: mlp, scheme: fp8_static}]", "dataset.num_samples=4")
    pipeline.run(job_for(float_folder, "fp8_dynamic", *words), tmp_path / "out")
    stored = Checkpoint(tmp_path / "out").tensors
    assert {name.rpartition(".")[0].split(".", 3)[3] for name in stored if name.endswith("input_scale")} == {
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert torch.equal(logits(stock(tmp_path / "out")), logits(load(tmp_path / "out")))


@pytest.mark.parametrize("words", ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_transformers_decodes_zero_points_as_we_do(words, compressed):
    from transformers import CompressedTensorsConfig

    # Without dequantize, transformers 5.23 with compressed-tensors 0.18 and newer packs the zero points of an
    # already packed layer a second time while loading, and fails.
    theirs = stock(compressed(*words), quantization_config=CompressedTensorsConfig(dequantize=True))
    ours = load(compressed(*words))
    assert_same_weights(theirs, ours)
    assert torch.equal(logits(theirs), logits(ours))


def test_transformers_decodes_fp8_blocks_as_we_do(compressed):
    folder = compressed("fp8_block", "compression.quantization.format=fp8_block")
    theirs, ours = stock(folder), load(folder)  # without an FP8 device it dequantizes the weights
    assert_same_weights(theirs, ours)


def test_inputs_are_quantized_as_the_engine_will(compressed, float_folder):
    model = load(compressed("fp8_dynamic"))
    projection = model.model.layers[0].mlp.up_proj
    values = torch.randn(1, 5, 128)
    scheme = PRESETS["fp8_dynamic"].input
    assert scheme is not None
    expected = torch.nn.functional.linear(fake_quantize(values, scheme), projection.weight)
    with torch.no_grad():
        assert torch.equal(projection(values), expected)
        assert not torch.equal(projection(values), torch.nn.functional.linear(values, projection.weight))


def test_static_scales_saturate_inputs(compressed):
    model = load(compressed(*RUNS["fp8_static"]))
    projection = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        huge, larger = projection(torch.full((1, 1, 256), 1e6)), projection(torch.full((1, 1, 256), 1e7))
    assert torch.equal(huge, larger)


def test_weights_only_schemes_leave_inputs_alone(compressed):
    projection = load(compressed("int4_rtn")).model.layers[0].mlp.up_proj
    assert not projection._forward_pre_hooks


def test_an_uncompressed_model_opens_as_it_is(float_folder):
    assert_same_weights(stock(float_folder), load(float_folder))


def test_generation_settings_travel(compressed):
    model = load(compressed("fp8_dynamic"))
    assert model.generation_config.eos_token_id == 2
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] <= IDS.shape[1] + 3
    assert not model.training


@pytest.mark.parametrize("family", ["llava", "phi3"])
def test_other_dense_families_open_in_transformers_too(family, tmp_path):
    save_random(family, tmp_path / "model")
    pipeline.run(job_for(tmp_path / "model", "int8_dynamic"), tmp_path / "out")
    ours = load(tmp_path / "out")
    assert torch.equal(logits(type(ours).from_pretrained(tmp_path / "out").eval()), logits(ours))


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "hunyuan_v1_moe", "deepseek_v3"])
def test_fp8_experts_open_in_transformers_too(family, tmp_path):
    """Experts stored as integers do not: transformers 5.23 finds none of them when it stacks."""
    from transformers import CompressedTensorsConfig

    save_random(family, tmp_path / "model")
    pipeline.run(job_for(tmp_path / "model", "fp8_dynamic"), tmp_path / "out")
    ours = load(tmp_path / "out")
    options = CompressedTensorsConfig(dequantize=True)
    assert_same_weights(type(ours).from_pretrained(tmp_path / "out", quantization_config=options), ours)


def test_experts_are_decoded_into_their_stack(tmp_path):
    original = save_random("qwen3_moe", tmp_path / "model")
    pipeline.run(job_for(tmp_path / "model", "int8_dynamic"), tmp_path / "out")
    stored = Checkpoint(tmp_path / "out").tensors
    assert "model.layers.1.mlp.experts.3.down_proj.weight_scale" in stored
    name = "model.layers.1.mlp.experts.down_proj"
    before, after = original.get_parameter(name), load(tmp_path / "out").get_parameter(name)
    assert before.shape == after.shape and not torch.equal(before, after)
    assert (before - after).norm() / before.norm() < 0.01


def test_a_routing_bias_survives(tmp_path):
    """DeepSeek-V3 and its kin store it as a buffer, not as a parameter."""
    original = save_random("deepseek_v3", tmp_path / "model")
    pipeline.run(job_for(tmp_path / "model", "fp8_dynamic"), tmp_path / "out")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert original.get_buffer(name).abs().min() > 0
    assert torch.equal(load(tmp_path / "out").get_buffer(name), original.get_buffer(name))


def test_a_foreign_format_is_refused(tmp_path, float_folder):
    from tiny import copy_model, edit_json

    folder = copy_model(float_folder, tmp_path / "model")
    edit_json(
        folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    with pytest.raises(ModelError, match="'bitsandbytes', which cannot be read here"):
        load(folder)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "llama4_text", "qwen2_5_vl", "qwen3_vl"])
def test_transformers_computes_our_logits_with_int4_experts_and_text_towers(family, tmp_path):
    """Of stacks that transformers has no rule for (Qwen3-VL-MoE) it finds no single experts: docs/deploy.md says so."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    save_random(family, tmp_path / "model")
    words = ("int4_rtn", "compression.quantization.quant_method.group_size=16")
    pipeline.run(job_for(tmp_path / "model", *words), tmp_path / "out")
    auto = AutoModelForImageTextToText if "vl" in family else AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found, expected = (model(input_ids=IDS % 80).logits for model in (theirs, load(tmp_path / "out")))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
