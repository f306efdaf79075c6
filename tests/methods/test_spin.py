"""A rotated model computes what the original does, is read lazily, and becomes an ordinary checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

import angelslim
from angelslim.base.errors import ConfigError, ModelError
from angelslim.config.recipe import load
from angelslim.export._checkpoint import open_any
from angelslim.job import prepare
from angelslim.methods.rewrite import _verify
from angelslim.methods.rewrite._fuse import Changes
from angelslim.methods.rewrite._view import Edit, Gain, RewrittenCheckpoint
from angelslim.methods.rewrite.spin import Spin
from angelslim.models.loading import open_model
from angelslim.numerics.hadamard import rotation
from angelslim.pipeline import run
from families import random_model
from tiny import job_for, qwen3, save_qwen3

CPU = torch.device("cpu")
ROTATED = (
    "llama",
    "qwen2",
    "qwen3",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "qwen3_moe",
    "deepseek_v3",
    "glm4_moe",
    "phi3",
)
LIVELY = {"rotation_mode": "Random", "seed": 3}


def lively(model):
    """Give norms and biases values of which each matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def save_lively(family, folder):
    model = lively(random_model(family))
    model.save_pretrained(folder)
    return model


def logits(model, vocabulary=80):
    ids = torch.randint(3, vocabulary, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


def apart(now, then):
    return float((now - then).detach().abs().max() / then.detach().abs().max())


def rewritten(folder, **options):
    return Spin(LIVELY | options).rewrite(open_model(folder))


@pytest.mark.parametrize("family", ROTATED)
def test_a_rotated_model_computes_the_same(family, tmp_path):
    model = save_lively(family, tmp_path)
    source = rewritten(tmp_path)
    moved = source.materialize("", CPU)
    assert apart(logits(moved), logits(model)) < 1e-4
    for block in source.structure.blocks:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(moved.get_parameter(f"{block}.{norm}.weight"), torch.ones(64))
        assert apart(*(m.get_parameter(f"{block}.self_attn.o_proj.weight") for m in (moved, model))) > 0.5


@pytest.mark.parametrize("family", ["gemma3_text", "glm4", "qwen2_5_vl"])
def test_values_are_rotated_where_the_stream_cannot_be(family, tmp_path):
    model = save_lively(family, tmp_path)
    with pytest.raises(ModelError, match="residual stream of this model cannot be rotated"):
        rewritten(tmp_path)
    source = rewritten(tmp_path, rotation=["R2"])
    assert apart(logits(source.materialize("", CPU)), logits(model)) < 1e-4
    changed = {name for name in source.checkpoint.tensors if name in source.checkpoint.edits}
    assert {name.split(".")[-2] for name in changed} == {"v_proj", "o_proj"}


@pytest.mark.parametrize(
    "options",
    [
        {"rotation_mode": "Hadamard"},
        {"rotation_mode": "Orthogonal"},
        {"rotation_mode": "Identity"},
        {"rotation": ["R1"]},
        {"rotation": ["R1"], "had_dim": 16},
        {"rotation": ["R1", "R2", "R4"]},
    ],
    ids=str,
)
def test_every_kind_of_rotation_computes_the_same(options, tmp_path):
    model = lively(qwen3(tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    assert apart(logits(rewritten(tmp_path, **options).materialize("", CPU)), logits(model)) < 1e-4


def test_a_tied_head_becomes_a_tensor_of_its_own(tmp_path):
    model = lively(qwen3())
    model.save_pretrained(tmp_path)
    source = open_model(tmp_path)
    assert "lm_head.weight" not in source.checkpoint.tensors
    moved = Spin(LIVELY).rewrite(source)
    assert moved.edits == {"tie_word_embeddings": False} and not moved.config.tie_word_embeddings
    assert source.config.tie_word_embeddings and source.edits == {}
    turn = rotation(128, "random_hadamard", seed=3)
    embedding = model.get_parameter("model.embed_tokens.weight").double()
    gain = model.get_parameter("model.norm.weight").double()
    for name, expected in (("model.embed_tokens", embedding), ("lm_head", embedding * gain)):
        assert apart(moved.checkpoint.read(f"{name}.weight").double(), turn.apply(expected)) < 1e-6
    filled = moved.materialize("", CPU)
    filled.tie_weights()
    assert apart(logits(filled), logits(model)) < 1e-4


def test_each_tensor_is_what_the_formulas_say(tmp_path):
    model = lively(qwen3(tie_word_embeddings=False, attention_bias=True)).double()
    model.float().save_pretrained(tmp_path)
    checkpoint = rewritten(tmp_path).checkpoint
    q, r = rotation(128, "random_hadamard", 3).matrix(), rotation(32, "random_hadamard", 4).matrix()
    block, state = "model.layers.0.", {name: value.double() for name, value in model.state_dict().items()}
    gain = state[block + "input_layernorm.weight"].diag()
    two, four = torch.block_diag(r, r), torch.block_diag(r, r, r, r)
    attention = block + "self_attn."
    expected = {
        attention + "q_proj.weight": state[attention + "q_proj.weight"] @ gain @ q,
        attention + "q_proj.bias": state[attention + "q_proj.bias"],
        attention + "v_proj.weight": two.T @ state[attention + "v_proj.weight"] @ gain @ q,
        attention + "v_proj.bias": two.T @ state[attention + "v_proj.bias"],
        attention + "o_proj.weight": q.T @ state[attention + "o_proj.weight"] @ four,
        attention + "o_proj.bias": q.T @ state[attention + "o_proj.bias"],
        block + "mlp.down_proj.weight": q.T @ state[block + "mlp.down_proj.weight"],
        attention + "q_norm.weight": state[attention + "q_norm.weight"],
    }
    for name, value in expected.items():
        assert (checkpoint.read(name).double() - value).abs().max() < 1e-5, name


def test_sixteen_bit_weights_are_rounded_once(tmp_path):
    save_qwen3(tmp_path)
    inner = open_model(tmp_path).checkpoint
    name, turn = "model.layers.0.self_attn.q_proj.weight", rotation(128, "random_hadamard")
    view = RewrittenCheckpoint(
        inner, {name: Edit(name, gain=Gain("model.layers.0.input_layernorm.weight", 1.0), columns=turn)}
    )
    exact = turn.apply(inner.read(name).double() * 2)  # the gain is 1, and 1 is added
    now = view.read(name)
    assert now.dtype == torch.bfloat16
    assert (now.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    assert (now == exact.bfloat16()).float().mean() > 0.99


def test_large_matrices_are_rotated_in_pieces(tmp_path, monkeypatch):
    save_qwen3(tmp_path)
    inner = open_model(tmp_path).checkpoint
    name = "model.embed_tokens.weight"
    view = RewrittenCheckpoint(inner, {name: Edit(name, columns=rotation(128, "random_hadamard"))})
    whole = view.read(name)
    monkeypatch.setattr(
        "angelslim.methods.rewrite._view.CHUNK", 128 * 100
    )  # 272 rows: pieces of 100, 100, 72
    assert torch.equal(view.read(name), whole)


@pytest.mark.parametrize(
    "lost", ["q_proj.weight", "o_proj.weight", "mlp.down_proj.weight", "experts.0.up_proj.weight"]
)
def test_a_forgotten_tensor_is_noticed(lost, tmp_path, monkeypatch):
    save_lively("qwen3_moe" if "experts" in lost else "llama", tmp_path)
    edit = Changes._edit
    monkeypatch.setattr(
        Changes,
        "_edit",
        lambda self, tensor, **steps: None if lost in tensor else edit(self, tensor, **steps),
    )
    with pytest.raises(ModelError, match=r"changes what model\.layers\.0"):
        rewritten(tmp_path)


def test_a_network_that_cannot_be_run_is_refused(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    save_lively("llama", tmp_path)
    source = open_model(tmp_path)
    assert source.structure.blocks
    forward = LlamaForCausalLM.forward

    def run(self, input_ids=None, inputs_embeds=None, **options):
        if inputs_embeds is not None or torch.is_grad_enabled() in refused:
            raise TypeError("not like this")
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", run)
    refused = {True}
    with pytest.raises(ModelError, match=r"could not be traced \(not like this"):
        Spin(LIVELY).rewrite(source)
    refused = set()
    with pytest.raises(ModelError, match=r"could not be compared with the original \(not like this"):
        Spin(LIVELY).rewrite(source)


def test_gains_of_one_plus_a_weight_and_scaled_embeddings(tmp_path):
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = lively(GemmaForCausalLM(config).eval())
    model.save_pretrained(tmp_path)
    source = rewritten(tmp_path)
    assert torch.equal(source.checkpoint.read("model.norm.weight"), torch.zeros(64))
    assert source.edits == {"tie_word_embeddings": False}
    assert apart(logits(source.materialize("", CPU)), logits(model)) < 1e-4


def test_a_norm_that_subtracts_the_mean_is_refused(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"CohereLayerNorm.* is no RMSNorm"):
        rewritten(tmp_path)


def test_a_norm_that_adds_one_to_its_weight_is_understood():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for kind, offset in ((GemmaRMSNorm, 1.0), (LlamaRMSNorm, 0.0)):
        norm = kind(48)
        torch.nn.init.normal_(norm.weight, 0.5, 0.3)
        kept = norm.weight.clone()
        assert _verify.offset_of(norm.bfloat16()) == offset
        assert torch.equal(norm.weight, kept.bfloat16())
    assert _verify.offset_of(torch.nn.LayerNorm(48)) is None
    assert _verify.offset_of(torch.nn.LayerNorm(48, bias=False)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": ["R5"]}, "no rotation 'R5'"),
        ({"rotation": ["R4"]}, "asks for R4 only"),
        ({"rotation": []}, "asks for nothing only"),
        ({"ignore_layers": ["o_proj"]}, "cannot leave layers out"),
        ({"rotation_mode": "Givens"}, "no rotation_mode 'Givens'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Spin(options)


def test_a_block_size_that_does_not_divide_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match="had_dim 48 does not divide the 128 channels"):
        rewritten(tiny_folder, had_dim=48)


def test_matrices_that_no_module_reads_are_named(tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    save_qwen3(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.layers.2.eh_proj.weight": torch.ones(4, 4)}, file, {"format": "pt"})
    source = rewritten(tmp_path)
    assert "model.layers.2.eh_proj.weight and 0 more are carried over" in caplog.text
    assert torch.equal(source.checkpoint.read("model.layers.2.eh_proj.weight"), torch.ones(4, 4))


# --------------------------------------------------------------------------------------------------- runs


def test_a_run_writes_an_ordinary_checkpoint(tiny_folder, tmp_path):
    job = job_for(tiny_folder, "int8_dynamic", "transform.name=SpinQuant", "transform.spin_config.seed=1")
    record = run(job, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["tie_word_embeddings"] is False and config["quantization_config"]["format"] == "int-quantized"
    )
    stored = open_any(tmp_path / "out").checkpoint.stored
    assert "lm_head.weight" in stored and stored["lm_head.weight"].dtype == torch.bfloat16
    before, after = (logits(angelslim.load(each), 250).float() for each in (tiny_folder, tmp_path / "out"))
    assert apart(after, before) < 0.1
    assert record.bytes_before == open_model(tiny_folder).checkpoint.nbytes


def test_the_public_keys_start_it_and_say_what_is_left_out(tiny_folder, texts, tmp_path):
    file = tmp_path / "public.yaml"
    file.write_text(
        "model: {name: Qwen, model_path: some/model}\n"
        "transform:\n  name: SpinQuant\n  output_log: false\n"
        "  spin_config: {had_dim: -1, rotation_mode: Hadamard, rotation: [R1, R2, R4], ignore_layers: []}\n"
        "compression:\n  name: PTQ\n"
        "  quantization: {name: int4_gptq, bits: 4, quant_method: {weight: per-group, group_size: 32}}\n"
    )
    overrides = [f"dataset.data_path={texts}", "dataset.max_seq_length=32", "evaluation.enabled=false"]
    job = prepare(load(str(file), overrides), tiny_folder)
    assert job.rewrites == ("spin",)
    record = run(job, tmp_path / "out")
    assert any("rotation R4 is left out" in warning for warning in record.warnings)
    before, after = (logits(angelslim.load(each), 250).float() for each in (tiny_folder, tmp_path / "out"))
    assert apart(after, before) < 0.5


def test_a_model_published_in_fp8_is_rotated_as_it_is_decoded(tiny_folder, tmp_path):
    run(job_for(tiny_folder, "fp8_block"), tmp_path / "fp8")
    source = open_any(tmp_path / "fp8")
    expected = logits(open_any(tmp_path / "fp8").materialize("", CPU), 250).float()
    found = logits(Spin(LIVELY).rewrite(source).materialize("", CPU), 250).float()
    assert apart(found, expected) < 0.05  # the rotated weights are bfloat16 again
