"""From a folder to a GGUF file and back: the same tensors, configuration and token ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from angelslim import pipeline
from angelslim.base.errors import ModelError, SchemeError
from angelslim.check import check
from angelslim.convert import convert
from angelslim.export._checkpoint import open_any
from angelslim.export.files._gguf_lowbit import pack
from angelslim.export.files._gguf_read import read_header
from angelslim.export.files._gguf_types import KINDS
from angelslim.export.files._gguf_vocab import add_tokenizer, save_tokenizer
from angelslim.export.files.gguf import Blocks, write_model
from angelslim.models.builtin import builtin_model
from families import config_of
from tiny import byte_tokenizer, job_for, save_qwen3

LAYER = "model.layers.0.mlp.down_proj"  # [128, 256]


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unpack") / "q4"
    pipeline.run(job_for(tiny_folder, "gguf_q4_0"), out)
    return out


def assert_same_model(first: Path, second: Path) -> None:
    old, new = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert old.keys() == new.keys()
    for name in old:
        assert old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]), name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    ignored = {"transformers_version", "_name_or_path"}
    different = {k for k in before.keys() & after.keys() - ignored if before[k] != after[k]}
    assert not different
    assert before["quantization_config"] == after["quantization_config"]
    assert before["architectures"] == after["architectures"]


def test_q4_0_comes_back_bit_for_bit(made, tmp_path):
    convert(made, "gguf", tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", "compressed_tensors", tmp_path / "back")
    assert_same_model(made, tmp_path / "back")
    assert check(tmp_path / "back") == 14
    convert(tmp_path / "back", "gguf", tmp_path / "again.gguf")
    first, second = (read_header(tmp_path / f"{name}.gguf") for name in ("model", "again"))
    assert first.fields | {"general.name": ""} == second.fields | {"general.name": ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.gguf", "back", "model.gguf"]


def test_the_llama_graph_comes_back_too(tmp_path):
    """Rows of q and k in transformers' order, a head of its own, float32, Q8_0."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
    config = config_of(
        "llama", vocab_size=300, rope_parameters=yarn, pad_token_id=0, attention_bias=True, mlp_bias=True
    )
    config.bos_token_id, config.eos_token_id = None, 2
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    pipeline.run(job_for(tmp_path / "model", "gguf_q8_0"), tmp_path / "out")
    convert(tmp_path / "out", "gguf", tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", "compressed-tensors", tmp_path / "back")
    assert_same_model(tmp_path / "out", tmp_path / "back")


def test_a_file_becomes_any_other_format_that_holds_it(made, tmp_path):
    convert(made, "gguf", tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", "gptq", tmp_path / "gptq")
    wanted, found = open_any(made).checkpoint, open_any(tmp_path / "gptq").checkpoint
    assert torch.equal(wanted.read(f"{LAYER}.weight"), found.read(f"{LAYER}.weight"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq", "model.gguf"]


@pytest.mark.parametrize("source", ["builtin", "bytes", "llama"])
def test_tokenizers_come_back_with_the_same_ids(source, tmp_path):
    """`llama` splits digits by threes, keeps whole tokens unmerged, and begins texts with a token."""
    from transformers import AutoTokenizer

    folder = tmp_path / "old"
    if source == "bytes":
        byte_tokenizer().save_pretrained(folder)
    else:
        AutoTokenizer.from_pretrained(builtin_model("tiny-lm")).save_pretrained(folder)
    if source == "llama":
        from angelslim.export.files._gguf_vocab import SPLITS

        content = json.loads((folder / "tokenizer.json").read_text())
        content["normalizer"] = None
        pattern = {split: pattern for pattern, split in SPLITS.items()}["llama-bpe"]
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
        content["model"]["ignore_merges"] = True
        (folder / "tokenizer.json").write_text(json.dumps(content))
    old = AutoTokenizer.from_pretrained(folder)
    fields = tokenizer_fields(folder, len(old) + 5, tmp_path)
    if source == "llama":
        fields |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}
    save_tokenizer(fields, tmp_path / "new", tmp_path / "a.gguf")
    new = AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "def add(a, b):\n    return 12345 + a  # Ärger, naïve café\n\n<|im_start|>user it's<|im_end|> x"
    ids = old(text).input_ids
    assert new(text).input_ids == ([1, *ids] if source == "llama" else ids)
    assert new.decode(ids) == old.decode(ids) and new.chat_template == old.chat_template
    assert new.eos_token_id == old.eos_token_id and new.pad_token_id == old.pad_token_id


def tokenizer_fields(folder: Path, size: int, work: Path) -> dict:
    import gguf

    writer = gguf.GGUFWriter(work / "vocab.gguf", "qwen3")
    add_tokenizer(writer, folder, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return read_header(work / "vocab.gguf").fields


def test_scales_of_zero_and_below_are_turned_without_changing_a_number(tmp_path):
    folder = save_qwen3(tmp_path / "model")
    scale = torch.full((128, 8), 0.5)
    scale[0, 0], scale[1, 1] = -0.25, 0.0
    codes = torch.randint(-1, 2, (128, 256), dtype=torch.int8)
    weights = {LAYER: Blocks("Q4_0", pack("ternary", "Q4_0", codes, scale))}
    write_model(open_any(folder), tmp_path / "model.gguf", weights)
    convert(tmp_path / "model.gguf", "compressed_tensors", tmp_path / "back")
    assert check(tmp_path / "back") == 1  # scales above zero, among others
    read = open_any(tmp_path / "back").checkpoint.restore(LAYER).weight.dequantize()
    assert torch.equal(read, codes * scale.repeat_interleave(32, 1))


def test_what_no_folder_holds_is_refused_and_nothing_is_left(made, tmp_path):
    folder = save_qwen3(tmp_path / "model")
    source, file = open_any(folder), tmp_path / "model.gguf"

    def refused(weights, match, kind=SchemeError):
        write_model(source, file, weights)
        with pytest.raises(kind, match=match):
            convert(file, "compressed_tensors", tmp_path / "back")

    codes, scale = torch.zeros(128, 256, dtype=torch.int8), torch.ones(128, 8)
    q4 = Blocks("Q4_0", pack("ternary", "Q4_0", codes, scale))
    other = Blocks("TQ1_0", pack("ternary", "TQ1_0", codes, scale[:, :1]))
    refused({}, "holds no Q4_0 or Q8_0 weights", ModelError)
    refused({LAYER: q4, LAYER.replace("0", "1"): other}, "has the type TQ1_0")
    embedding = torch.zeros(272, 4 * KINDS["Q4_0"].nbytes, dtype=torch.uint8)
    refused({"model.embed_tokens": Blocks("Q4_0", embedding)}, "is no linear layer of a block")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


@pytest.mark.parametrize(
    "old, new, reason",
    [
        (b"qwen3.block_count", b"qwen3.block_couny", "lacks a field"),
        (b"token_embd.weight", b"token_embx.weight", "holds no embedding"),
        (b"tokenizer.ggml.pre", b"tokenizer.ggml.prx", r"tokenizer is not read \(''\)"),
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_ux.weight", "no place in a model folder"),
    ],
)
def test_a_file_that_lacks_something_is_refused_with_what(old, new, reason, made, tmp_path):
    convert(made, "gguf", tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    assert data.count(old) == 1
    (tmp_path / "model.gguf").write_bytes(data.replace(old, new))
    with pytest.raises((ModelError, SchemeError), match=reason):
        convert(tmp_path / "model.gguf", "compressed_tensors", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_where_a_folder_is_wanted_gets_the_way_out(made, tmp_path):
    convert(made, "gguf", tmp_path / "model.gguf")
    with pytest.raises(ModelError) as refused:
        open_any(tmp_path / "model.gguf")
    assert "angelslim export" in refused.value.fix and "--format compressed_tensors" in refused.value.fix


def test_scales_below_zero_stay_where_a_code_has_no_negative(tmp_path):
    folder = save_qwen3(tmp_path / "model")
    lowest = torch.zeros(128, 8 * KINDS["Q4_0"].nbytes, dtype=torch.uint8)
    lowest[:, 1] = 0xBC  # -1 in float16, and the code -8 in one block of each row
    write_model(open_any(folder), tmp_path / "model.gguf", {LAYER: Blocks("Q4_0", lowest)})
    convert(tmp_path / "model.gguf", "compressed_tensors", tmp_path / "back")
    assert check(tmp_path / "back") == 1
    read = open_any(tmp_path / "back").checkpoint.restore(LAYER).weight
    wanted = torch.zeros(128, 256)
    wanted[:, :32] = 8.0
    assert torch.equal(read.dequantize(), wanted) and bool((read.scale[:, 0] == -1).all())
    convert(tmp_path / "back", "gguf", tmp_path / "again.gguf")
    convert(tmp_path / "again.gguf", "compressed_tensors", tmp_path / "again")
    assert torch.equal(open_any(tmp_path / "again").checkpoint.restore(LAYER).weight.dequantize(), wanted)
