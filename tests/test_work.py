"""Units of a job: mixtures, towers, and models that were published in FP8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import angelslim
from angelslim import pipeline
from angelslim.base.errors import ModelError
from angelslim.models.checkpoint import Checkpoint
from families import image_processor, random_model, save_random
from tiny import byte_tokenizer, job_for

SHORT = ("dataset.num_samples=3", "dataset.max_seq_length=24", "evaluation.enabled=false")
GROUP = "compression.quantization.quant_method.group_size=32"


def texts(folder: Path) -> str:
    """Lines whose ids lie below the tiny vocabulary of 96."""
    (folder / "texts.jsonl").write_text('{"text": "!#$%&(*+-./:;!#$%"}\n' * 3)
    return f"dataset.data_path={folder / 'texts.jsonl'}"


def saved(family: str, folder: Path) -> Path:
    save_random(family, folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["int4_gptq", "int4_gptaq"])
def test_a_mixture_is_calibrated_expert_by_expert(recipe, tmp_path):
    folder = saved("deepseek_v3", tmp_path / "model")
    job = job_for(
        folder, recipe, *SHORT, GROUP, texts(tmp_path), "compression.quantization.ignore_layers=[kv_b]"
    )
    record = pipeline.run(job, tmp_path / "out")
    experts = [layer for layer in record.layers if ".experts." in layer.name]
    assert len(experts) == 12 and all(layer.output_error is not None for layer in experts)
    assert len(record.experts) == 4 and {use.of for use in record.experts} == {51}
    assert sum(use.tokens for use in record.experts) == 2 * 51
    model = angelslim.load(tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours, original = model(ids).logits, random_model("deepseek_v3")(ids).logits
    assert torch.nn.functional.cosine_similarity(ours.flatten(), original.flatten(), dim=0) > 0.8


def test_images_calibrate_a_vision_model(tmp_path):
    folder = tmp_path / "model"
    save_random("llava", folder)
    image_processor().save_pretrained(folder)
    job = job_for(
        folder, "fp8_static", "dataset.name=MultiModalDataset", "dataset.num_samples=2",
        "dataset.max_seq_length=200", "evaluation.enabled=false",
    )  # fmt: skip
    record = pipeline.run(job, tmp_path / "out")
    scales = [layer.input_scale for layer in record.layers]
    assert len(scales) == 14 and None not in scales
    assert any("vision_tower" in name for name in record.skipped)
    assert (tmp_path / "out" / "preprocessor_config.json").exists() or (
        tmp_path / "out" / "processor_config.json"
    ).exists()


def test_a_text_model_has_no_images(tmp_path):
    folder = saved("qwen3", tmp_path / "model")
    job = job_for(folder, "fp8_static", *SHORT, "dataset.name=MultiModalDataset")
    with pytest.raises(ModelError, match="processor"):
        pipeline.run(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_published_in_fp8_is_decoded_as_it_is_read(tmp_path):
    folder = saved("deepseek_v3", tmp_path / "model")
    blocks = ("compression.quantization.quant_method.block_size=[16,16]", "evaluation.enabled=false")
    pipeline.run(job_for(folder, "fp8_block", *blocks), tmp_path / "fp8")
    second = job_for(tmp_path / "fp8", "int4_rtn", GROUP, "compression.quantization.ignore_layers=[kv_b]")
    record = pipeline.run(second, tmp_path / "out")
    assert len(record.layers) > 12
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith("weight_scale_inv") for name in stored)


def test_layers_published_in_the_wanted_numbers_keep_them(tmp_path):
    """INT4 experts from an FP8 checkpoint: all other layers are copied bit for bit, not rounded twice."""
    folder = saved("deepseek_v3", tmp_path / "model")
    blocks = "compression.quantization.quant_method.block_size=[16,16]"
    measure = "evaluation.enabled=false"
    pipeline.run(job_for(folder, "fp8_block", blocks, measure), tmp_path / "fp8")
    first = load_file(tmp_path / "fp8" / "model.safetensors")
    for name in [name for name in first if name.endswith("weight_scale_inv")]:
        first[name] = first[name] * 1.17  # as published: not what rounding would choose again
    save_file(first, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    pipeline.run(job_for(tmp_path / "fp8", "fp8_block", blocks, measure), tmp_path / "again")
    second = load_file(tmp_path / "again" / "model.safetensors")
    scales = [name for name in first if name.endswith("weight_scale_inv")]
    assert len(scales) > 12 and first.keys() == second.keys()
    for name in scales:
        codes = name.removesuffix("_scale_inv")
        assert torch.equal(first[codes].view(torch.uint8), second[codes].view(torch.uint8))
        assert torch.equal(first[name], second[name])


def test_an_int4_folder_is_no_source(tmp_path):
    folder = saved("qwen3", tmp_path / "model")
    pipeline.run(job_for(folder, "int4_rtn", GROUP, "evaluation.enabled=false"), tmp_path / "int4")
    with pytest.raises(ModelError, match="already quantized"):
        job_for(tmp_path / "int4", "fp8_dynamic")


def test_reading_ahead_changes_nothing(tmp_path):
    folder = saved("qwen3", tmp_path / "model")
    checkpoint = Checkpoint(folder)
    expected = {name: Checkpoint(folder).read(name) for name in checkpoint.tensors}
    checkpoint.ahead(list(checkpoint.tensors)[:5])
    checkpoint.ahead(list(checkpoint.tensors)[:3])
    assert all(torch.equal(checkpoint.read(name), value) for name, value in expected.items())
