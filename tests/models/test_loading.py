"""Opening a folder lazily gives the weights that transformers loads eagerly."""

from __future__ import annotations

import json

import pytest
import torch

from angelslim.base.errors import ModelError
from angelslim.models.builtin import builtin_model
from angelslim.models.loading import load_config, meta_model, model_class, open_model, resolve
from families import FAMILIES, random_model, save_random
from tiny import copy_model, edit_json, qwen3, save_qwen3

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_materialized_weights_equal_those_of_transformers(family, tmp_path):
    model = save_random(family, tmp_path)
    source = open_model(tmp_path)
    assert all(value.is_meta for value in source.model.parameters())
    assert set(source.targets) == set(source.checkpoint.tensors)
    filled = source.materialize("", CPU).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(filled[name], value), name


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "hunyuan_v1_moe"])
def test_experts_are_stored_one_by_one_and_fused_when_read(family, tmp_path):
    model = save_random(family, tmp_path)
    source = open_model(tmp_path)
    stored = [name for name in source.checkpoint.tensors if ".experts." in name]
    assert len(stored) == sum(3 * experts.count for experts in source.structure.experts)
    block = source.structure.blocks[-1]
    source.materialize(block, CPU)
    for name, value in source.model.get_submodule(block).named_parameters():
        assert torch.equal(value, model.get_submodule(block).get_parameter(name)), name
    source.free(block)
    assert all(value.is_meta for value in source.model.parameters())


def test_a_router_declared_in_float32_stays_so(tmp_path):
    random_model("hunyuan_v1_moe", torch.bfloat16).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    source.materialize("model.layers.0", CPU)
    assert source.dtype == torch.bfloat16
    assert source.model.get_parameter("model.layers.0.self_attn.q_proj.weight").dtype == torch.bfloat16
    declared = meta_model(source.config).get_parameter("model.layers.0.mlp.gate.wg.weight").dtype
    assert source.model.get_parameter("model.layers.0.mlp.gate.wg.weight").dtype == declared


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_are_read_from_the_embedding(tied, tmp_path):
    save_qwen3(tmp_path, tie_word_embeddings=tied)
    source = open_model(tmp_path)
    assert ("lm_head.weight" in source.checkpoint.tensors) != tied
    source.materialize("", CPU)
    same = torch.equal(
        source.model.get_parameter("lm_head.weight"), source.model.get_parameter("model.embed_tokens.weight")
    )
    assert same == tied


def test_buffers_are_real_and_equal_those_of_an_ordinary_model(tmp_path):
    save_random("llama", tmp_path)
    source = open_model(tmp_path)
    expected = dict(random_model("llama").named_buffers())
    assert expected and all(
        torch.equal(value, expected[name]) for name, value in source.model.named_buffers()
    )


def test_shards_are_followed(tmp_path):
    save_qwen3(tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    source = open_model(tmp_path)
    source.materialize("", CPU)
    expected = qwen3().to(torch.bfloat16)
    assert all(torch.equal(v, expected.get_parameter(n)) for n, v in source.model.named_parameters())


def test_a_tensor_that_the_model_does_not_have_is_carried_not_lost(tmp_path):
    from safetensors.torch import load_file, save_file

    save_qwen3(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mtp.weight"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    assert "model.layers.2.mtp.weight" in source.checkpoint.tensors
    assert "model.layers.2.mtp.weight" not in source.targets


def test_a_weight_of_another_shape_is_refused_with_both_shapes(tmp_path, tiny_folder):
    folder = copy_model(tiny_folder, tmp_path / "model")
    edit_json(folder / "config.json", intermediate_size=384)
    source = open_model(folder)
    with pytest.raises(ModelError, match=r"has shape \[.*\], config.json asks for \[.*\]"):
        source.materialize("model.layers.0", CPU)


def test_missing_weights_are_named(tmp_path, tiny_folder):
    folder = copy_model(tiny_folder, tmp_path / "model")
    edit_json(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ModelError, match=r"holds no weights for 'model.layers.2"):
        open_model(folder).materialize("model.layers.2", CPU)


def test_a_quantized_source_is_refused(tmp_path, tiny_folder):
    folder = copy_model(tiny_folder, tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"already quantized \(fp8\)"):
        open_model(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"model_type": "qwen33"}', "model_type 'qwen33'.*Did you mean 'qwen3'"),
        ('{"model_type": "my_own_network"}', "model_type 'my_own_network'"),
        ('{"hidden_size": 3}', "cannot be used"),
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ('{"model_type": "qwen3", "hidden_size": "wide"}', "cannot be used"),
    ],
)
def test_a_wrong_config_is_one_sentence(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        load_config(tmp_path)


def test_sizes_that_no_network_can_have_are_refused(tmp_path, tiny_folder):
    folder = copy_model(tiny_folder, tmp_path / "model")
    edit_json(folder / "config.json", num_key_value_heads=0)
    with pytest.raises(ModelError, match=r"No Qwen3ForCausalLM can be built from config\.json"):
        open_model(folder).check()


def test_remote_code_is_not_run_unasked(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_config(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_models_without_a_generative_class_are_refused():
    from transformers import BertConfig, ViTConfig

    with pytest.raises(ModelError, match="'vit' has no generative class"):
        model_class(ViTConfig())
    assert model_class(BertConfig(architectures=["BertLMHeadModel"])).__name__ == "BertLMHeadModel"


def test_references(tmp_path, tiny_folder):
    assert resolve(tiny_folder) == tiny_folder
    assert resolve("tiny-lm") == builtin_model("tiny-lm")
    with pytest.raises(ModelError, match=r"No model 'tiny-ml'.*Did you mean 'tiny-lm'"):
        resolve("tiny-ml")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        resolve(tiny_folder / "config.json")
    with pytest.raises(ModelError, match="hub could not provide"):
        resolve("nobody/no-such-model-at-all")
    with pytest.raises(ModelError, match=r"No model './nothing'"):
        resolve("./nothing")
    with pytest.raises(ModelError, match="Unknown built-in"):
        builtin_model("tiny-xl")
