"""Whole files with blocks of our choice, and reading them back: our reader against the format's library."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from angelslim.base.errors import ModelError
from angelslim.export._checkpoint import open_any
from angelslim.export.files import _gguf_lowbit as lowbit
from angelslim.export.files._gguf_read import read_bytes, read_header
from angelslim.export.files._gguf_types import KINDS
from angelslim.export.files.gguf import FORMAT, ROUNDED, Blocks, write_model
from tiny import save_qwen3

LAYER = "model.layers.1.mlp.down_proj"  # [128, 256]


def blocks_of(name: str, scale: float = 0.5) -> Blocks:
    """Random codes for `LAYER`."""
    kind = "seq" if name == "Q2_K" else "ternary"
    low, high = lowbit.CODES[kind]
    codes = torch.randint(low, high + 1, (128, 256), generator=torch.Generator().manual_seed(0))
    scales = torch.full((128, 1), scale)
    data = lowbit.pack(kind, name, codes.to(torch.int8), scales, round_scales=True)
    return Blocks(name, data, rounded=not lowbit.holds_scales(kind, name, scales))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0", "Q2_K", "Q4_0"])
def test_blocks_take_the_place_of_a_matrix_and_come_back(name, tiny_folder, tmp_path):
    source, blocks, file = open_any(tiny_folder), blocks_of(name), tmp_path / "model.gguf"
    write_model(source, file, {LAYER: blocks})
    header = read_header(file)
    assert header.fields["general.file_type"] == KINDS[name].file_type
    found = {tensor.name: tensor for tensor in header.tensors}
    assert len(found) == len(source.checkpoint.tensors)
    assert found["blk.1.ffn_down.weight"].kind == name and found["blk.0.ffn_down.weight"].kind == "BF16"
    assert torch.equal(read_bytes(file, found["blk.1.ffn_down.weight"]), blocks.data)
    embedding = read_bytes(file, found["token_embd.weight"]).view(torch.bfloat16)
    assert torch.equal(embedding, source.checkpoint.read("model.embed_tokens.weight"))
    assert FORMAT.check(file) == 1 and ROUNDED not in header.fields
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_blocks_may_be_made_when_they_are_written_and_rounded_scales_are_named(tiny_folder, tmp_path):
    ready, called = blocks_of("TQ2_0", scale=0.1), []

    def make():
        called.append(1)
        return ready.data

    write_model(open_any(tiny_folder), tmp_path / "a.gguf", {LAYER: ready})
    write_model(open_any(tiny_folder), tmp_path / "b.gguf", {LAYER: Blocks("TQ2_0", make, rounded=True)})
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes() and called == [1]
    assert read_header(tmp_path / "a.gguf").fields[ROUNDED] == [LAYER]


def test_rows_of_packed_blocks_are_turned_for_the_llama_graph(tmp_path):
    from transformers import LlamaForCausalLM

    from families import config_of
    from tiny import byte_tokenizer

    folder, name = tmp_path / "model", "model.layers.0.self_attn.q_proj"
    torch.manual_seed(0)
    LlamaForCausalLM(config_of("llama", vocab_size=300)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    codes = torch.randint(-1, 2, (64, 64), dtype=torch.int8)
    data = lowbit.pack_q2_0(codes, torch.ones(64, 1))
    write_model(open_any(folder), tmp_path / "model.gguf", {name: Blocks("Q2_0", data)})
    stored = next(t for t in read_header(tmp_path / "model.gguf").tensors if t.name == "blk.0.attn_q.weight")
    order = [16 * head + 8 * part + channel for head in range(4) for channel in range(8) for part in range(2)]
    assert torch.equal(read_bytes(tmp_path / "model.gguf", stored), data[order])


def test_a_bias_that_the_graph_does_not_add_is_refused(tmp_path):
    folder = save_qwen3(tmp_path / "model", attention_bias=True)  # llama.cpp's Qwen3 adds those of q, k and v
    with pytest.raises(
        ModelError, match=r"no place for the tensor 'model\.layers\.0\.self_attn\.o_proj\.bias'"
    ):
        write_model(open_any(folder), tmp_path / "model.gguf", {})


def test_a_plain_model_is_written_in_its_own_types(tmp_path):
    for dtype, name in ((torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")):
        folder = save_qwen3(tmp_path / name, dtype=dtype)
        write_model(open_any(folder), tmp_path / f"{name}.gguf", {})
        header = read_header(tmp_path / f"{name}.gguf")
        assert {tensor.kind for tensor in header.tensors} == {name, "F32"}
        assert header.fields["general.file_type"] == KINDS[name].file_type


def test_our_reader_finds_what_the_librarys_does(tiny_folder, tmp_path):
    file = tmp_path / "model.gguf"
    write_model(open_any(tiny_folder), file, {LAYER: blocks_of("TQ1_0")})
    ours, theirs = read_header(file), gguf.GGUFReader(file)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.fields == {name: field.contents() for name, field in fields.items()}
    for tensor, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (tensor.name, tensor.kind) == (other.name, other.tensor_type.name)
        assert tensor.shape == tuple(reversed(other.shape.tolist()))
        assert (tensor.offset, tensor.nbytes) == (other.data_offset, other.n_bytes)
        flat = np.frombuffer(other.data.tobytes(), dtype=np.uint8)
        assert np.array_equal(read_bytes(file, tensor).flatten().numpy(), flat)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0", "Q2_K", "Q4_0"])
def test_a_scale_that_is_not_finite_is_noticed(name, tiny_folder, tmp_path):
    file = tmp_path / "model.gguf"
    write_model(open_any(tiny_folder), file, {LAYER: blocks_of(name)})
    tensor = next(t for t in read_header(file).tensors if t.kind == name)
    data = bytearray(file.read_bytes())
    end = tensor.offset + KINDS[name].scales[1]
    data[end - 2 : end] = b"\x00\x7e"  # NaN in float16
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"'blk\.1\.ffn_down\.weight' has a scale that is not finite"):
        FORMAT.check(file)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda data: b"GGML" + data[4:], "does not begin with GGUF"),
        (lambda data: data[:4] + b"\x09" + data[5:], "version 9"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "items"),
        (lambda data: data[:100], "no complete GGUF file"),
        (lambda data: data[:-5000], "it should hold"),
    ],
)
def test_damage_is_named(damage, reason, tiny_folder, tmp_path):
    file = tmp_path / "model.gguf"
    write_model(open_any(tiny_folder), file, {})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=reason):
        read_header(file)
