from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import angelslim
from angelslim.analyze import weights
from angelslim.analyze.weights import analyze
from angelslim.base.errors import ModelError, UserError
from angelslim.check import open_compressed
from angelslim.convert import convert
from angelslim.report.record import RunRecord

LAYER = "model.layers.1.mlp.down_proj"
RECIPES = {
    "fp8_dynamic": {},
    "fp8_static": {},
    "fp8_block": {},
    "int8_dynamic": {},
    "int4_rtn": {},
    "w4a8_fp8": {},
    "nvfp4": {},
    "mxfp4": {},
}
CLIP = ("w4a8_fp8", "nvfp4", "mxfp4")  # their scales are rounded, some below the largest weight


def both(tiny_folder, folder, name=LAYER):
    """The original's and the decoded weight of a layer, in float64."""
    original = load_file(tiny_folder / "model.safetensors")[f"{name}.weight"].double().numpy()
    _, checkpoint = open_compressed(folder)
    return original, checkpoint.restore(name).weight.dequantize().double().numpy()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pair_is_compared_as_float64_does(recipe, tiny_folder, compressed):
    folder = compressed(recipe, **RECIPES[recipe])
    found = analyze(tiny_folder, folder)
    assert len(found.layers) == 14 and found.measured and found.notes == []
    layer = next(layer for layer in found.layers if layer.name == LAYER)
    x, q = both(tiny_folder, folder)
    assert (layer.block, layer.role, layer.shape) == (1, "mlp.down_proj", x.shape)
    assert layer.amax == abs(x).max()
    assert layer.sqnr_db == pytest.approx(10 * math.log10((x**2).sum() / ((x - q) ** 2).sum()), rel=1e-5)
    assert layer.max_error == pytest.approx(abs(x - q).max(), rel=1e-5)
    assert layer.flushed == ((q == 0) & (x != 0)).sum() / (x != 0).sum()
    assert layer.zeros == (q == 0).mean()
    exact = abs(np.sort(x.ravel()) - np.sort(q.ravel())).mean()
    assert layer.wasserstein == pytest.approx(exact, abs=1.01 * (abs(x).max() + abs(q).max()) / 65536)
    assert layer.clipped < (0.01 if "fp8_channel" in layer.scheme or recipe in CLIP else 1e-9)
    assert 0 < layer.at_limit < 0.2
    recorded = {record.name: record for record in RunRecord.load(folder).layers}
    for layer in found.layers:
        assert layer.sqnr_db == pytest.approx(recorded[layer.name].sqnr_db, abs=1e-3)
    assert sum(layer.histogram is not None for layer in found.layers) == weights.HISTOGRAMS


def test_every_format_that_holds_the_numbers_gives_the_same_figures(tiny_folder, compressed, tmp_path):
    folder = compressed("int4_rtn")
    convert(folder, "gptq", tmp_path / "gptq")
    ours, theirs = (analyze(tiny_folder, each) for each in (folder, tmp_path / "gptq"))
    assert (ours.format, theirs.format) == ("compressed-tensors", "gptq")
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert (one.name, one.sqnr_db, one.kl, one.wasserstein) == (
            other.name, other.sqnr_db, other.kl, other.wasserstein,
        )  # fmt: skip


def test_one_folder_takes_its_errors_from_the_record(compressed):
    folder = compressed("int4_gptq")
    found = analyze(folder)
    recorded = {record.name: record for record in RunRecord.load(folder).layers}
    assert not found.measured and found.original is None
    for layer in found.layers:
        assert layer.sqnr_db == recorded[layer.name].sqnr_db
        assert layer.output_error == recorded[layer.name].output_error is not None
        assert layer.clipped is layer.flushed is layer.kl is layer.histogram is None
        assert layer.scale > 0


def test_without_a_record_errors_are_not_known(compressed, altered):
    folder = altered(compressed("int4_rtn"), lambda tensors: None)
    (folder / "run.json").unlink()
    found = analyze(folder)
    assert all(layer.sqnr_db is None and layer.kurtosis > 0 for layer in found.layers)


def test_a_model_in_full_precision_can_be_looked_at(tiny_folder):
    found = analyze(tiny_folder)
    assert found.format == "full precision" and {layer.scheme for layer in found.layers} == {"full precision"}
    assert len(found.layers) == 15  # the embedding is a matrix too
    x = load_file(tiny_folder / "model.safetensors")[f"{LAYER}.weight"].double().numpy()
    layer = next(layer for layer in found.layers if layer.name == LAYER)
    centred = x - x.mean()
    assert layer.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-5)
    assert layer.scale is layer.at_limit is None


def test_static_scales_are_read_and_flagged_above_the_limit(compressed):
    folder = compressed("fp8_static")
    _, checkpoint = open_compressed(folder)
    scales = {name: float(checkpoint.restore(name).input_scale) for name in checkpoint.parts}
    found = analyze(folder, spread=1e9)
    assert {layer.name: layer.input_scale for layer in found.layers} == pytest.approx(scales)
    assert not found.flagged
    limit = sorted(scales.values())[7]
    found = analyze(folder, scale_limit=limit, spread=1e9)
    assert {layer.name for layer in found.flagged} == {
        name for name, scale in scales.items() if scale > limit
    }
    assert found.layers[0].flags[0].column == "input_scale" and found.layers[0].flags[0].score is None


def test_an_outlier_among_its_role_is_flagged(deep_folder, altered):
    def spoil(tensors):
        tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = 40.0

    found = analyze(altered(deep_folder, spoil))
    assert [layer.name for layer in found.flagged] == ["model.layers.3.mlp.up_proj"]
    assert {flag.column for flag in found.layers[0].flags} == {"amax", "kurtosis"}
    assert found.layers[0].name == "model.layers.3.mlp.up_proj"


def test_only_the_worst_keep_their_histograms(tiny_folder, compressed):
    found = analyze(tiny_folder, compressed("int4_rtn"), histograms=3, spread=1e9)
    kept = [layer.name for layer in found.layers if layer.histogram is not None]
    assert kept == [layer.name for layer in found.layers[:3]]
    assert not any(
        layer.histogram for layer in analyze(tiny_folder, compressed("int4_rtn"), histograms=0).layers
    )


def test_moved_scales_are_noticed(tiny_folder, compressed, altered):
    def smooth(tensors):
        tensors["model.layers.0.input_layernorm.weight"] *= 2
        for role in "qkv":
            tensors[f"model.layers.0.self_attn.{role}_proj.weight"] /= 2

    moved = altered(tiny_folder, smooth)  # stands for what a smoothing method makes before it rounds
    out = moved.parent / "out"
    angelslim.compress(moved, "int8_dynamic", out=out, evaluation__enabled=False)
    found = analyze(tiny_folder, out)
    assert "1 tensors that were not quantized differ" in found.notes[0]
    assert "model.layers.0.input_layernorm.weight" in found.notes[0]
    noted = {layer.name for layer in found.layers if "rounded another weight" in layer.note}
    assert noted == {f"model.layers.0.self_attn.{role}_proj" for role in "qkv"}
    assert "3 layers were changed" in found.notes[1]


def test_nan_scales_are_refused(compressed, altered):
    def spoil(tensors):
        tensors[f"{LAYER}.weight_scale"][3] = math.nan

    folder = altered(compressed("fp8_dynamic"), spoil)
    with pytest.raises(ModelError, match=rf"layer '{LAYER}' has a weight scale that is NaN"):
        analyze(folder)


def test_nan_weights_of_the_original_are_refused(tiny_folder, compressed, altered):
    def spoil(tensors):
        tensors[f"{LAYER}.weight"][3, 3] = math.nan

    with pytest.raises(ModelError, match=f"weight of '{LAYER}' holds NaN"):
        analyze(altered(tiny_folder, spoil), compressed("fp8_dynamic"))


def test_a_missing_layer_is_named(tiny_folder, compressed, altered):
    short = altered(tiny_folder, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(ModelError, match=rf"lacks 1 matrices of .*'{LAYER}.weight'"):
        analyze(short, compressed("fp8_dynamic"))


def test_a_copy_of_fewer_blocks_is_refused(deep_folder, compressed):
    with pytest.raises(ModelError, match="lacks 28 matrices"):
        analyze(deep_folder, compressed("fp8_dynamic"))


def test_another_architecture_is_refused(compressed, tmp_path):
    from families import save_random

    save_random("llama", tmp_path / "llama")
    with pytest.raises(ModelError, match=r"is a llama and .* a qwen3"):
        analyze(tmp_path / "llama", compressed("fp8_dynamic"))


def test_other_shapes_are_refused(compressed, tmp_path):
    from tiny import save_qwen3

    wide = save_qwen3(tmp_path / "wide", intermediate_size=384)
    with pytest.raises(ModelError, match=r"other shapes .*down_proj.*\[128, 256\] instead of \[128, 384\]"):
        analyze(wide, compressed("fp8_dynamic"))


def test_the_wrong_order_is_told(tiny_folder, compressed):
    with pytest.raises(ModelError, match=r"is not quantized\. The original comes first: swap the two"):
        analyze(compressed("fp8_dynamic"), tiny_folder)
    with pytest.raises(ModelError, match="Name a compressed folder second"):
        analyze(tiny_folder, tiny_folder)
    with pytest.raises(UserError, match="nowhere"):
        analyze("nowhere")


def test_one_pair_is_in_memory_at_a_time(tiny_folder, compressed, monkeypatch):
    import weakref

    alive: list[weakref.ref] = []
    most = 0
    original = weights.read

    def watched(*args):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        matrix = original(*args)
        alive.extend(weakref.ref(tensor) for tensor in (matrix.restored, matrix.original))
        return matrix

    monkeypatch.setattr(weights, "read", watched)
    analyze(tiny_folder, compressed("fp8_dynamic"))
    assert len(alive) == 28 and most == 0


def test_equal_folders_give_equal_files(tiny_folder, compressed):
    one, other = (analyze(tiny_folder, compressed("int4_rtn")) for _ in range(2))
    assert one.to_json() == other.to_json() and one.to_csv() == other.to_csv()
    assert len(json.loads(one.to_json())["layers"]) == 14
    assert torch.tensor([layer.kl for layer in one.layers]).isfinite().all()
