"""Round to nearest on hand-made blocks."""

from __future__ import annotations

import pytest
import torch

from angelslim import pipeline
from angelslim.base.errors import ConfigError
from angelslim.methods.base import PTQ
from angelslim.methods.ptq.rtn import RoundToNearest
from angelslim.models.block import Block
from angelslim.models.loading import open_model
from angelslim.models.select import groups_by_linear, select
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import FORMATS as GRIDS
from angelslim.numerics.scheme import PER_TENSOR, PRESETS, Quant, Scheme, with_group
from families import save_random
from tiny import byte_tokenizer, job_for

FP8 = Quant(GRIDS["fp8_e4m3"], PER_TENSOR)


@pytest.fixture(scope="module")
def source(tiny_folder):
    return open_model(tiny_folder)


def processed(source, scheme: Scheme, **options) -> dict[str, torch.Tensor]:
    selection = select(source, scheme)
    block = Block(source, 0, selection.in_block(0), groups_by_linear(source), torch.device("cpu"))
    RoundToNearest(options).process(block)
    return {result.layer.name.removeprefix("model.layers.0."): result for result in block.results}


def test_it_is_a_method_with_declared_options():
    assert PTQ.get("rtn") is RoundToNearest
    assert RoundToNearest.reads == {"observer", "percentile", "mse_range", "signed_scales"}
    with pytest.raises(ConfigError, match="Did you mean 'absmax'"):
        RoundToNearest({"observer": "absmaxx"})


def test_only_static_schemes_need_data():
    method = RoundToNearest({})
    assert method.needs_data(PRESETS["fp8_static"])
    assert not any(
        method.needs_data(PRESETS[name]) for name in ("fp8_dynamic", "int8_dynamic", "int4", "fp8_block")
    )


def test_members_of_a_group_share_a_per_tensor_scale_and_nobody_else(source):
    results = processed(source, Scheme(FP8))
    scales = {name: result.weight.scale.item() for name, result in results.items()}
    largest = max(
        source.checkpoint.read(f"model.layers.0.self_attn.{x}_proj.weight").abs().max().item() for x in "qkv"
    )
    assert all(scales[f"self_attn.{x}_proj"] == pytest.approx(largest / 448) for x in "qkv")
    assert scales["mlp.gate_proj"] == scales["mlp.up_proj"]
    assert len(set(scales.values())) == 4


@pytest.mark.parametrize("name", ["fp8_dynamic", "int8_dynamic", "fp8_block"])
def test_finer_scales_are_each_layers_own(name, source):
    for local, result in processed(source, PRESETS[name]).items():
        weight = source.checkpoint.read(f"model.layers.0.{local}.weight")
        expected = quantize(weight, PRESETS[name].weight)
        assert torch.equal(result.weight.codes.float(), expected.codes.float())
        assert torch.equal(result.weight.scale, expected.scale)


def test_the_record_measures_what_was_lost(source):
    results = processed(source, with_group(PRESETS["int4"], 32))
    record = results["mlp.up_proj"].record
    weight = source.checkpoint.read("model.layers.0.mlp.up_proj.weight").float()
    lost = results["mlp.up_proj"].weight.dequantize() - weight
    assert record.relative_error == pytest.approx((lost.norm() / weight.norm()).item(), rel=1e-4)
    assert (record.block, record.shape, record.bits_per_weight) == (0, (256, 128), 4.5)
    assert record.weights is not None and sum(record.weights.before) == weight.numel()


def test_observers_change_the_static_scales(tiny_folder, tmp_path):
    from safetensors.torch import load_file

    from angelslim import pipeline

    scales = {}
    for observer in ("absmax", "percentile", "mse"):
        words = (f"compression.quantization.observer={observer}", "compression.quantization.percentile=90")
        job = job_for(tiny_folder, "fp8_static", "dataset.num_samples=4", "dataset.max_seq_length=32", *words)
        pipeline.run(job, tmp_path / observer)
        tensors = load_file(tmp_path / observer / "model.safetensors")
        scales[observer] = tensors["model.layers.0.mlp.down_proj.input_scale"].item()
    assert scales["percentile"] < 0.8 * scales["absmax"]
    assert scales["mse"] <= scales["absmax"] * 1.001


def test_every_expert_gets_its_own_static_scale(tmp_path):
    save_random("qwen3_moe", tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text('{"text": "!!!!!!!!!!!!!!!"}\n' * 2)
    words = ("dataset.num_samples=2", "dataset.max_seq_length=16")
    job = job_for(tmp_path / "model", "fp8_static", *words, f"dataset.data_path={tmp_path / 'texts.jsonl'}")
    record = pipeline.run(job, tmp_path / "out")
    scales = {layer.name: layer.input_scale for layer in record.layers if ".experts." in layer.name}
    assert len(scales) == 24 and None not in scales.values()
    first = "model.layers.0.mlp.experts.0."
    assert scales[first + "gate_proj"] == scales[first + "up_proj"] != scales[first + "down_proj"]


def test_ignored_experts_are_left_alone(tmp_path):
    save_random("qwen3_moe", tmp_path / "model")
    job = job_for(tmp_path / "model", "fp8_static", "compression.quantization.ignore_layers=[experts]")
    assert {layer.name.rpartition(".")[2] for layer in job.selection.layers} == {f"{x}_proj" for x in "qkvo"}


def test_clipping_needs_data_loses_less_of_the_outputs_and_says_how_much(tmp_path):
    assert RoundToNearest({"mse_range": True}).needs_data(PRESETS["int4"])
    short = ("dataset.num_samples=6", "dataset.max_seq_length=64")
    clip = "compression.quantization.quant_method.mse_range"
    plain = job_for("tiny-lm", "int4_rtn", *short)
    clipped = job_for("tiny-lm", "int4_rtn", f"{clip}=true", *short)
    assert clipped.calibrates and not plain.calibrates
    records = [pipeline.run(job, tmp_path / name) for job, name in ((plain, "plain"), (clipped, "clipped"))]
    before, after = ({layer.name: layer for layer in record.layers} for record in records)
    assert before.keys() == after.keys()
    assert all(layer.output_error is not None for layer in after.values())
    assert sum(layer.bits_per_weight for layer in after.values()) == sum(
        layer.bits_per_weight for layer in before.values()
    )
    smaller = sum(after[name].relative_error != before[name].relative_error for name in before)
    assert smaller > len(before) // 2  # some tile of nearly every layer was clipped


def test_signed_scales_need_no_data_and_lose_less(source):
    scheme = PRESETS["q4_0"]
    assert not RoundToNearest({"signed_scales": True}).needs_data(scheme)
    plain, signed = processed(source, scheme), processed(source, scheme, signed_scales=True)
    for name, result in signed.items():
        assert result.weight.scale.dtype == torch.float16 and bool((result.weight.scale < 0).any())
        assert result.record.relative_error < 0.97 * plain[name].record.relative_error
    scheme = PRESETS["fp8_dynamic"]  # nothing to sign
    same, usual = processed(source, scheme, signed_scales=True), processed(source, scheme)
    assert all(torch.equal(same[name].weight.scale, usual[name].weight.scale) for name in usual)
