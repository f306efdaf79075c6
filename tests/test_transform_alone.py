"""A run that only transforms: a plain model in full precision that computes what the original does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import angelslim
from angelslim.base.errors import ConfigError
from angelslim.config.recipe import load as load_recipe
from angelslim.job import prepare
from angelslim.plan import estimate
from tiny import save_qwen3

SMALL = {"dataset": {"num_samples": 4, "max_seq_length": 32}, "evaluation": {"enabled": False}}
SMOOTH: dict[str, Any] = {
    **SMALL,
    "compression": {"name": "PTQ", "quantization": {"quant_helpers": ["smooth"], "smooth_alpha": 0.5}},
}


def difference(one: Path, other: Path) -> float:
    """The largest difference of logits, relative to the largest logit."""
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        first, second = (angelslim.load(folder).float()(input_ids=ids).logits for folder in (one, other))
    return float((first - second).abs().max() / first.abs().max())


def changed(one: Path, other: Path) -> set[str]:
    """The tensors that differ."""
    before, after = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return {
        name for name, value in after.items() if name not in before or not torch.equal(before[name], value)
    }


@pytest.mark.parametrize("recipe", ["rotated", SMOOTH], ids=["rotated", "smooth"])
def test_the_result_is_a_plain_model_with_the_same_function_and_other_weights(recipe, tmp_path):
    model = save_qwen3(tmp_path / "model", dtype=torch.float32)
    more = {"evaluation__enabled": False} if recipe == "rotated" else {}
    result = angelslim.compress(model, recipe, out=tmp_path / "out", **more)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert difference(model, tmp_path / "out") < 1e-4
    names = changed(model, tmp_path / "out")
    assert "model.layers.1.mlp.gate_proj.weight" in names and "model.layers.1.mlp.up_proj.weight" in names
    report = result.report
    assert report.scheme == report.format == "full precision" and not report.layers
    assert report.bits_per_weight == 32 and report.method == ("rotated" if recipe == "rotated" else "smooth")
    dtypes = {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {torch.float32}  # the stored type, whatever it is


def test_another_run_goes_on_with_it(tmp_path):
    """Rotate, hand over, quantize: as one recipe that does both."""
    model = save_qwen3(tmp_path / "model", dtype=torch.float32)
    angelslim.compress(model, "rotated", out=tmp_path / "rotated", evaluation__enabled=False)
    quiet = {"evaluation__enabled": False}
    angelslim.compress(tmp_path / "rotated", "int8_dynamic", out=tmp_path / "two", **quiet)
    angelslim.compress(model, "int8_rotated", out=tmp_path / "one", **quiet)
    assert changed(tmp_path / "one", tmp_path / "two") == set()


def test_smoothing_and_rotation_together(tmp_path):
    model = save_qwen3(tmp_path / "model", dtype=torch.float32)
    both = {**SMOOTH, "transform": {"name": "SpinQuant", "spin_config": {"rotation": ["R1"]}}}
    result = angelslim.compress(model, both, out=tmp_path / "out")
    assert result.report.method == "spin+smooth" and difference(model, tmp_path / "out") < 1e-4


def test_what_is_planned_is_what_is_written(tmp_path):
    model = save_qwen3(tmp_path / "model")
    job = prepare(load_recipe("rotated", ["evaluation.enabled=false"]), model)
    plan = estimate(job)
    assert plan.scheme == "full precision" and not plan.layers and plan.bits_per_weight == 16
    result = angelslim.compress(model, "rotated", out=tmp_path / "out", evaluation__enabled=False)
    assert abs(result.report.bytes_after / plan.bytes_after - 1) < 0.05


@pytest.mark.parametrize(
    "section, message",
    [
        (
            {"quant_helpers": ["smooth"], "smooth_alpha": "search"},
            "smooth_alpha: search chooses scales by what",
        ),
        ({"quant_helpers": ["awq"]}, "awq chooses scales by what rounding loses"),
    ],
)
def test_scales_that_rounding_judges_need_a_quantization(section, message, tmp_path):
    recipe = {**SMALL, "compression": {"name": "PTQ", "quantization": section}}
    with pytest.raises(ConfigError, match=message):
        angelslim.compress(save_qwen3(tmp_path / "model"), recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_tied_model_counts_the_originals_numbers_and_says_that_the_copy_grew(tmp_path):
    """Untying the head adds a tensor; the original is not measured by it."""
    model = save_qwen3(tmp_path / "model")
    record = angelslim.compress(model, "rotated", out=tmp_path / "out", evaluation__enabled=False).report
    assert 8 * record.bytes_before == 16 * record.parameters and record.bytes_after > record.bytes_before
    page, card = ((tmp_path / "out" / name).read_text("utf-8") for name in ("report.html", "README.md"))
    assert "x larger than" in page and "from 16.00" in page and "Error of each layer" not in page
    assert "x larger)" in card and "No layer was quantized." in card and "\n- quantized\n" not in card
