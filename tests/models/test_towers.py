"""Towers of images and sound calibrated by what reaches their linears, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from angelslim import pipeline
from angelslim.base.errors import DataError, SchemeError
from angelslim.data.multimodal import multimodal_samples
from angelslim.export._checkpoint import QuantizedCheckpoint, open_any
from angelslim.job import units_of
from angelslim.methods.ptq._shared import round_weight
from angelslim.methods.ptq.gptq import FEW
from angelslim.models.loading import Source, open_model
from angelslim.models.towers import TowerRunner
from angelslim.numerics.compensate import Hessian, output_error
from families import audio_processor, image_processor, random_model, save_random, with_image
from tiny import job_for

IMAGES = ("dataset.name=MultiModalDataset", "dataset.num_samples=3", "dataset.max_seq_length=200")
SOUND = ("dataset.name=AudioDataset", "dataset.num_samples=3", "dataset.max_seq_length=200")
TOWERS = ("compression.quantization.quant_vit=true", "evaluation.enabled=false")
GROUP = "compression.quantization.quant_method.group_size=16"
CPU = torch.device("cpu")


def saved(family: str, folder: Path) -> Path:
    save_random(family, folder)
    (image_processor() if family == "llava" else audio_processor()).save_pretrained(folder)
    return folder


def samples_of(folder: Path, family: str, count: int = 3) -> list[dict[str, torch.Tensor]]:
    kind = "image" if family == "llava" else "audio"
    processor = image_processor() if family == "llava" else audio_processor()
    return multimodal_samples(processor, None, kind=kind, samples=count, max_length=200)


def modules_of(source: Source, names: list[str]) -> dict[str, str]:
    """Layer, by the checkpoint's name -> its module."""
    return {name: source.targets[f"{name}.weight"].parameter.removesuffix(".weight") for name in names}


def inputs_of(
    model: Any, modules: dict[str, str], samples: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """What the linears see in the whole model, ``[tokens, in]``, all samples together."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    for name, path in modules.items():
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    return {name: torch.cat(found) for name, found in seen.items() if found}


@pytest.mark.parametrize(("family", "data"), [("llava", IMAGES), ("qwen2_audio", SOUND)])
def test_static_scales_of_a_tower_are_the_largest_inputs_of_the_whole_model(family, data, tmp_path):
    folder = saved(family, tmp_path / "model")
    record = pipeline.run(job_for(folder, "fp8_static", *data, *TOWERS), tmp_path / "out")
    inside = {layer.name: layer for layer in record.layers if layer.block is None}
    assert len(inside) >= 13 and any("projector" in name for name in inside)
    seen = inputs_of(
        random_model(family), modules_of(open_model(folder), list(inside)), samples_of(folder, family)
    )
    for name, layer in inside.items():
        assert layer.input_scale == pytest.approx(float(seen[name].abs().max()) / 448, rel=1e-5), name
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(f"{name}.input_scale" in written for name in inside)


def test_queries_keys_and_values_of_a_tower_share_their_scales(tmp_path):
    folder = saved("llava", tmp_path / "model")
    record = pipeline.run(job_for(folder, "fp8_static", *IMAGES, *TOWERS), tmp_path / "out")
    checkpoint = open_any(tmp_path / "out").checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    attention = [
        layer.name for layer in record.layers if "vision" in layer.name and ".0.self_attn." in layer.name
    ]
    scales = {name[-6]: float(checkpoint.restore(name).weight.scale) for name in attention}
    assert len(attention) == 4 and scales["q"] == scales["k"] == scales["v"] != scales["t"]


def test_gptq_compensates_with_what_the_images_give(tmp_path):
    folder = saved("llava", tmp_path / "model")
    job = job_for(folder, "int4_gptq", *IMAGES, *TOWERS, GROUP)
    record = pipeline.run(job, tmp_path / "out")
    checkpoint = open_any(tmp_path / "out").checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    inside = [layer for layer in record.layers if layer.block is None]
    assert len(inside) == 14 and {layer.note for layer in inside} <= {"", FEW}
    model, modules = random_model("llava"), modules_of(open_model(folder), [layer.name for layer in inside])
    seen = inputs_of(model, modules, samples_of(folder, "llava"))
    for layer in inside:
        hessian = Hessian(layer.shape[1], CPU)
        hessian.update(seen[layer.name])
        weight = model.get_submodule(modules[layer.name]).weight.detach()
        found = checkpoint.restore(layer.name).weight
        lost = output_error(weight, found, hessian.matrix)
        assert lost == pytest.approx(layer.output_error, rel=1e-3)
        nearest = round_weight(weight, found.quant)
        assert lost < output_error(weight, nearest, hessian.matrix)


def test_more_of_the_tower_is_lost_without_images(tmp_path):
    folder = saved("llava", tmp_path / "model")
    runs = {}
    for name, data in (("images", IMAGES), ("texts", ("dataset.num_samples=3", "dataset.max_seq_length=24"))):
        (tmp_path / "texts.jsonl").write_text('{"text": "abc def ghi jkl mno"}\n' * 3)
        words = (f"dataset.data_path={tmp_path / 'texts.jsonl'}",) if name == "texts" else ()
        job = job_for(folder, "int4_gptq", *data, *words, *TOWERS, GROUP)
        record = pipeline.run(job, tmp_path / name)
        runs[name] = {layer.name: layer for layer in record.layers if layer.block is None}
    notes = {layer.note for layer in runs["texts"].values()}
    assert notes == {"rounded to nearest: it lies outside the blocks"}  # said, never silent
    model, modules = random_model("llava"), modules_of(open_model(folder), list(runs["images"]))
    seen = inputs_of(model, modules, samples_of(folder, "llava"))
    lost = {}
    for name in runs:
        checkpoint = open_any(tmp_path / name).checkpoint
        assert isinstance(checkpoint, QuantizedCheckpoint)
        lost[name] = sum(
            float((seen[layer] @ (checkpoint.restore(layer).weight.dequantize() - weight).T).square().sum())
            for layer in seen
            for weight in [model.get_submodule(modules[layer]).weight.detach()]
        )
    assert lost["images"] < 0.8 * lost["texts"]


@pytest.mark.parametrize("recipe", ["int4_autoround", "int4_gptaq", "fp8_lepto", "int4_awq"])
def test_every_kind_of_method_takes_a_tower(recipe, tmp_path):
    folder = saved("llava", tmp_path / "model")
    few = ("compression.quantization.quant_method.iterations=3",) if recipe == "int4_autoround" else ()
    group = () if recipe == "fp8_lepto" else (GROUP,)
    record = pipeline.run(job_for(folder, recipe, *IMAGES, *TOWERS, *few, *group), tmp_path / "out")
    inside = [layer for layer in record.layers if layer.block is None]
    allowed = {"", FEW} if recipe == "int4_gptaq" else {""}
    assert len(inside) == 14 and {layer.note for layer in inside} <= allowed


def test_what_enters_the_decoder_is_what_the_whole_model_gives_it(tmp_path):
    folder = saved("llava", tmp_path / "model")
    samples = samples_of(folder, "llava", 2)
    runner = TowerRunner(open_model(folder), samples, CPU)
    model, seen = random_model("llava"), []
    model.get_submodule(runner.source.structure.blocks[0]).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    with runner.awake(), torch.no_grad():
        for number, sample in enumerate(samples):
            model(**sample)
            assert torch.allclose(runner.forward([number]), seen[-1], atol=1e-5)
    assert all(value.is_meta for value in runner.source.model.parameters())  # all of it is given back


def test_texts_give_a_tower_no_static_scales(tmp_path):
    folder = saved("llava", tmp_path / "model")
    with pytest.raises(SchemeError, match="lies in a tower"):
        job_for(folder, "fp8_static", *TOWERS)


def test_conversations_without_images_are_noticed_before_any_work(tmp_path):
    folder = saved("llava", tmp_path / "model")
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "hello there"}]}\n' * 3)
    job = job_for(folder, "fp8_static", *IMAGES, *TOWERS, f"dataset.data_path={tmp_path / 'talk.jsonl'}")
    with pytest.raises(DataError, match=r"No calibration sample reaches 14 layers of towers"):
        pipeline.run(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_towers_whose_patches_have_no_batch_are_watched_too(family, tmp_path):
    """Their hidden states are ``[patches, hidden]``, and the merger between tower and decoder is part of the tower."""
    model = save_random(family, tmp_path / "model")
    source, sample = open_model(tmp_path / "model"), with_image(family)
    linears = {name for name in source.structure.linears if source.structure.tower_of(name)}
    runner, seen = TowerRunner(source, [sample], CPU), dict[str, torch.Tensor]()
    with runner.awake():
        groups = runner.groups()
        runner.run({name: partial(seen.__setitem__, name) for name in groups}, keep=False)
    assert groups.keys() == linears and len(linears) >= 8
    wanted = inputs_of(model, {name: name for name in linears}, [sample])
    for name in linears:
        torch.testing.assert_close(seen[name], wanted[name], atol=1e-5, rtol=1e-5)
    gates = {name for name in linears if name.endswith("gate_proj")}
    assert all(groups[name].linears == (name, name.replace("gate", "up")) for name in gates)
    assert len(gates) == (2 if family == "qwen2_5_vl" else 0)


def test_what_belongs_to_one_block_of_a_tower_is_one_portion(tmp_path):
    save_random("llava", tmp_path / "model")
    units = units_of(open_model(tmp_path / "model"), outside_bytes=1)
    portions = [unit.tensors for unit in units if unit.block is None]
    for index in (0, 1):
        inside = [names for names in portions if any(f"encoder.layers.{index}." in name for name in names)]
        assert len(inside) == 1 and len(inside[0]) == 16
    assert sorted(name for unit in units for name in unit.tensors) == sorted(
        open_model(tmp_path / "model").checkpoint.tensors
    )
