"""GGUF files against the format's own library: its decoder must give our weights bit for bit.

llama.cpp itself reads such files in ``tests/engines/test_llama_cpp.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from angelslim import pipeline
from angelslim.base.errors import MissingExtra, ModelError, SchemeError
from angelslim.check import check
from angelslim.convert import convert
from angelslim.export._checkpoint import open_any
from angelslim.export.files import _gguf_model
from angelslim.export.files._gguf_blocks import refuses, to_blocks
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import (
    FORMATS,
    PER_CHANNEL,
    PER_TENSOR,
    PRESETS,
    Quant,
    Scheme,
    per_block,
    per_group,
)
from families import config_of
from tiny import byte_tokenizer, copy_model, edit_json, job_for

INT4, INT8 = FORMATS["int4"], FORMATS["int8"]
BLOCKS = {
    "Q4_0": PRESETS["q4_0"].weight,
    "Q4_0, groups of 64": Quant(INT4, per_group(64), scale="float16"),
    "Q4_0, per channel": Quant(INT4, PER_CHANNEL, scale="bfloat16"),
    "Q8_0": PRESETS["q8_0"].weight,
    "Q8_0, per channel": Quant(INT8, PER_CHANNEL, scale="float16"),
    "Q8_0, per tensor": Quant(INT8, PER_TENSOR, scale="float16"),
    "Q4_K": Quant(INT4, per_group(256), symmetric=False, scale="float16"),
    "Q4_K, per channel": Quant(INT4, PER_CHANNEL, symmetric=False, scale="bfloat16"),
    "MXFP4": PRESETS["mxfp4_weight_only"].weight,
}


@pytest.mark.parametrize("label", BLOCKS)
def test_the_library_decodes_our_blocks_bit_for_bit(label):
    quant = BLOCKS[label]
    weight = (
        torch.randn(12, 512, generator=torch.Generator().manual_seed(0)) + torch.linspace(-2, 2, 12)[:, None]
    )
    quantized = quantize(weight, quant)
    assert quant.symmetric or (quantized.zero is not None and len(quantized.zero.unique()) > 3)
    assert not refuses(Scheme(quant), (12, 512))
    kind = gguf.GGMLQuantizationType[label.partition(",")[0]]
    decoded = gguf.quants.dequantize(to_blocks(quantized, "a").numpy(), kind)
    assert np.array_equal(decoded, quantized.dequantize().numpy())


@pytest.mark.parametrize(
    "scheme, reason",
    [
        (PRESETS["fp8_dynamic"], "no type has fp8_e4m3 weights"),
        (PRESETS["nvfp4_weight_only"], "with e4m3 scales"),
        (PRESETS["mxfp4"], "weights only"),
        (Scheme(Quant(INT4, per_group(32), symmetric=False)), "multiple of 256 inputs where there are zero"),
        (Scheme(Quant(INT8, PER_CHANNEL, symmetric=False)), "no type has int8 weights with zero points"),
        (Scheme(Quant(INT4, per_group(16))), "multiple of 32"),
        (Scheme(Quant(INT8, per_block(64, 64))), "multiple of 32"),
    ],
)
def test_what_no_type_holds_is_refused_with_the_reason(scheme, reason):
    assert reason in refuses(scheme, (128, 128))


def test_scales_that_float16_does_not_hold_are_refused():
    quantized = quantize(torch.randn(8, 32), Quant(INT8, per_group(32)))
    with pytest.raises(SchemeError, match="'a' has scales that float16"):
        to_blocks(quantized, "a")


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")

    def make(recipe: str, model: Path = tiny_folder) -> Path:
        folder = root / f"{recipe}-{model.parent.name}"
        if not folder.exists():
            pipeline.run(job_for(model, recipe), folder)
        return folder

    return make


def opened(folder: Path, out: Path):
    """Convert a folder; return the file's fields and decoded tensors, by name."""
    convert(folder, "gguf", out)
    reader = gguf.GGUFReader(out)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors, reader


@pytest.mark.parametrize("recipe, kind", [("gguf_q4_0", "Q4_0"), ("gguf_q8_0", "Q8_0"), ("int4_rtn", "Q4_0")])
def test_a_whole_model_holds_our_weights_bit_for_bit(recipe, kind, made, tmp_path):
    folder = made(recipe)
    fields, tensors, reader = opened(folder, tmp_path / "model.gguf")
    checkpoint = open_any(folder).checkpoint
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert len(tensors) == len(checkpoint.tensors)
    for block in range(2):
        for ours, theirs in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
            name = f"model.layers.{block}.{ours}"
            assert kinds[f"blk.{block}.{theirs}.weight"] == kind
            wanted = checkpoint.restore(name).weight.dequantize().numpy()
            assert np.array_equal(tensors[f"blk.{block}.{theirs}.weight"], wanted)
    assert kinds["token_embd.weight"] == "BF16" and kinds["output_norm.weight"] == "F32"
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm")):
        wanted = checkpoint.read(f"{ours}.weight").float().numpy()
        assert np.array_equal(tensors[f"{theirs}.weight"].reshape(wanted.shape), wanted)
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    assert check(tmp_path / "model.gguf") == 14
    assert not list(tmp_path.glob("*.tmp"))


def test_zero_points_that_are_all_0_go_in_and_others_do_not(made, tmp_path):
    convert(made("int4_rtn"), "awq", tmp_path / "awq")
    convert(tmp_path / "awq", "gguf", tmp_path / "awq.gguf")
    convert(made("int4_rtn"), "gguf", tmp_path / "direct.gguf")
    first, second = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("awq", "direct"))
    for tensor, same in zip(*(sorted(each, key=lambda t: t.name) for each in (first, second)), strict=True):
        assert tensor.name == same.name and np.array_equal(tensor.data, same.data)
    with pytest.raises(SchemeError, match="has zero points that are not 0"):
        convert(made("int4_rtn_asym"), "gguf", tmp_path / "asym.gguf")
    with pytest.raises(SchemeError, match=r"GGUF cannot hold W int8 per-channel.*weights only"):
        convert(made("int8_dynamic"), "gguf", tmp_path / "int8.gguf")
    assert not list(tmp_path.glob("asym*")) and not list(tmp_path.glob("int8*"))


def test_what_llama_cpp_reads_of_the_model(made, tmp_path):
    fields, _, _ = opened(made("gguf_q4_0"), tmp_path / "model.gguf")
    config = open_any(made("gguf_q4_0")).config
    expected = {
        "general.architecture": "qwen3",
        "qwen3.block_count": 2,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 128,
        "qwen3.feed_forward_length": 256,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.vocab_size": config.vocab_size,
        "qwen3.rope.dimension_count": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["\u2400 \u2400"],  # llama.cpp refuses a tokenizer with none
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["qwen3.rope.freq_base"] == 10000.0
    assert fields["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    tokenizer = byte_tokenizer()
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == len(fields["tokenizer.ggml.token_type"]) == config.vocab_size
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert fields["tokenizer.ggml.token_type"][:3] == [gguf.TokenType.CONTROL] * 3
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_the_tokenizer_of_the_builtin_model_is_known():
    from angelslim.export.files._gguf_vocab import _split
    from angelslim.models.builtin import builtin_model

    content = json.loads((builtin_model("tiny-lm") / "tokenizer.json").read_text())
    assert _split(content, True) == "qwen2"
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    assert _split(content, True) is None


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random Llama in float32 with a head of its own, compressed for GGUF: its scales become float16."""
    from transformers import LlamaForCausalLM

    root = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(config_of("llama", vocab_size=300)).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    pipeline.run(job_for(root / "model", "gguf_q4_0"), root / "out")
    return root / "out"


def test_rows_of_q_and_k_change_places_for_the_llama_graph(llama, tmp_path):
    """The graph rotates neighbours, so channel i of a head's first half stands beside channel i of its second."""
    fields, tensors, _ = opened(llama, tmp_path / "model.gguf")
    checkpoint = open_any(llama).checkpoint
    assert fields["general.architecture"] == "llama" and fields["llama.rope.dimension_count"] == 16
    for ours, theirs, heads in (("q", "q", 4), ("k", "k", 2), ("v", "v", 0)):
        weight = checkpoint.restore(f"model.layers.0.self_attn.{ours}_proj").weight.dequantize()
        if heads:
            halves = weight.reshape(heads, 2, 8, 64)
            weight = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(heads * 16, 64)
        assert np.array_equal(tensors[f"blk.0.attn_{theirs}.weight"], weight.numpy()), theirs
    assert np.array_equal(tensors["output.weight"], checkpoint.read("lm_head.weight").numpy())


def test_llama_3_frequencies_are_those_of_transformers():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = config_of("llama", head_dim=64, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = _gguf_model.rope_factors(config)
    assert factors is not None and factors.unique().numel() > 1
    plain = 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    torch.testing.assert_close((plain / factors).float(), scaled)
    assert _gguf_model.rope_factors(config_of("llama")) is None


@pytest.mark.parametrize(
    "family, changes, reason",
    [
        ("qwen3_moe", {}, "no mapping for model_type 'qwen3_moe'"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "no sliding windows"),
        ("llama", {"hidden_act": "gelu"}, "no activation 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "beta_fast": 16.0,
                    "beta_slow": 1.0,
                }
            },
            "settings \\['beta_fast'\\]",
        ),
    ],
)
def test_models_that_a_graph_does_not_compute_are_refused(family, changes, reason):
    with pytest.raises(ModelError, match=reason):
        _gguf_model.architecture(config_of(family, **changes))


def test_a_tokenizer_that_splits_otherwise_is_refused_and_nothing_is_left(made, tmp_path):
    folder = copy_model(made("gguf_q4_0"), tmp_path / "folder")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [["a", "b"]]
    content["model"]["vocab"]["ab"] = 259
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no tokenizer that splits text in this way"):
        convert(folder, "gguf", tmp_path / "model.gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        convert(folder, "gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(llama, tmp_path):
    folder = copy_model(llama, tmp_path / "folder")
    edit_json(folder / "config.json", vocab_size=200)
    with pytest.raises(ModelError, match="more tokens than the model's vocab_size 200"):
        convert(folder, "gguf", tmp_path / "model.gguf")


def test_a_truncated_file_is_noticed(made, tmp_path):
    convert(made("gguf_q8_0"), "gguf", tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="no complete GGUF file"):
        check(tmp_path / "model.gguf")


def test_without_the_library_the_way_to_it_is_named(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"pip install 'angelslim\[gguf\]'"):
        convert(made("gguf_q8_0"), "gguf", tmp_path / "model.gguf")
