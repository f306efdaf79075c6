"""Folders of codes seen as full-precision ones: DeepSeek-type checkpoints in FP8, experts included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim.base.errors import ModelError
from angelslim.export import fp8_block, fp8_tensor
from angelslim.export._checkpoint import QuantizedCheckpoint, open_any
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import FORMATS, Quant, Scheme, per_block, per_group
from families import save_random
from tiny import copy_model, edit_json

FP8 = FORMATS["fp8_e4m3"]
BLOCKS = Scheme(Quant(FP8, per_block(32, 32)), Quant(FP8, per_group(32), dynamic=True))
LINEARS = ("_proj.weight", "_a_proj_with_mqa.weight", "_b_proj.weight", "_a_proj.weight")


def published(folder: Path, exporter, scheme: Scheme, settings: dict, scales=torch.float32) -> dict:
    """Rewrite a saved model as it would be published in FP8; return its decoded weights."""
    tensors, decoded = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(LINEARS):
            tensors[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        scale = quantize(tensor, scheme.weight).scale
        if scales == torch.float8_e8m0fnu:  # powers of two to begin with
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        scale = scale.to(scales)
        codes = (tensor / _spread(scale.float(), tensor.shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
        decoded[name] = codes.float() * _spread(scale.float(), tensor.shape)
        tensors[name] = codes
        leaf = "weight_scale_inv" if exporter is fp8_block else "weight_scale"
        tensors[f"{stem}.{leaf}"] = scale if exporter is fp8_block else scale.reshape(())
        if exporter is fp8_tensor and settings["activation_scheme"] == "static":
            tensors[f"{stem}.input_scale"] = torch.tensor(0.01)
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", quantization_config=settings)
    return decoded


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    return scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: shape[0], : shape[1]]


DEEPSEEK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
}


@pytest.mark.parametrize(
    "scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8], ids=str
)
def test_a_deepseek_checkpoint_in_fp8_is_the_model_of_its_decoded_weights(scales, tmp_path):
    save_random("deepseek_v3", tmp_path / "fp8")
    plain = copy_model(tmp_path / "fp8", tmp_path / "plain")
    as_bytes = scales == torch.uint8
    kind = torch.float8_e8m0fnu if as_bytes else scales
    decoded = published(tmp_path / "fp8", fp8_block, BLOCKS, DEEPSEEK, kind)
    assert any(".experts." in name for name in decoded)
    if as_bytes:  # the same exponents under another type
        tensors = load_file(tmp_path / "fp8" / "model.safetensors")
        raw = {n: t.view(torch.uint8) if t.dtype == kind else t for n, t in tensors.items()}
        save_file(raw, tmp_path / "fp8" / "model.safetensors")
    save_file({**load_file(plain / "model.safetensors"), **decoded}, plain / "model.safetensors")

    source, wanted = open_any(tmp_path / "fp8"), open_any(plain)
    assert isinstance(source.checkpoint, QuantizedCheckpoint)
    assert set(source.checkpoint.parts) == {name.removesuffix(".weight") for name in decoded}
    source.check()
    first, second = (each.materialize("", torch.device("cpu")) for each in (source, wanted))
    expected = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)


@pytest.mark.parametrize("activation", ["static", "dynamic"])
def test_native_fp8_with_one_scale_a_tensor(activation, tmp_path):
    save_random("llama", tmp_path / "fp8")
    settings = {"quant_method": "fp8", "activation_scheme": activation, "ignored_layers": ["lm_head"]}
    scheme = fp8_tensor.STATIC if activation == "static" else fp8_tensor.DYNAMIC
    decoded = published(tmp_path / "fp8", fp8_tensor, scheme, settings)
    checkpoint = open_any(tmp_path / "fp8").checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert set(checkpoint.schemes.values()) == {scheme}
    for name, value in decoded.items():
        assert torch.equal(checkpoint.read(name), value), name
    restored = checkpoint.restore("model.layers.0.mlp.up_proj")
    assert (restored.input_scale is not None) == (activation == "static")


def test_sizes_are_those_of_the_decoded_model_and_bytes_those_on_disk(tmp_path):
    save_random("llama", tmp_path / "model")
    original = open_any(tmp_path / "model").checkpoint
    published(tmp_path / "model", fp8_block, BLOCKS, DEEPSEEK)
    checkpoint = open_any(tmp_path / "model").checkpoint
    assert {n: i.shape for n, i in checkpoint.tensors.items()} == {
        n: i.shape for n, i in original.tensors.items()
    }
    assert {n: i.nbytes for n, i in checkpoint.tensors.items()} == {
        n: i.nbytes for n, i in original.tensors.items()
    }
    assert checkpoint.nbytes < original.nbytes


def test_codes_without_a_known_scale_are_refused(tmp_path):
    """Decoding them as they are would be silent nonsense."""
    save_random("llama", tmp_path / "model")
    published(tmp_path / "model", fp8_block, BLOCKS, DEEPSEEK)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' and 0 more hold codes"):
        open_any(tmp_path / "model")


def test_a_scale_without_codes_is_refused(tmp_path):
    save_random("llama", tmp_path / "model")
    published(tmp_path / "model", fp8_block, BLOCKS, DEEPSEEK)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj' has a scale and no weight"):
        open_any(tmp_path / "model")


def test_an_unknown_format_is_named(tmp_path):
    save_random("llama", tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", quantization_config={"quant_method": "quip"})
    with pytest.raises(ModelError, match="'quip', which cannot be read here"):
        open_any(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"
