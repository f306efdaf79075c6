"""What post-training methods share."""

from __future__ import annotations

import pytest
import torch

from angelslim.methods.ptq._shared import (
    PROBE_VALUES,
    InputStatistics,
    by_group,
    round_weight,
    shared_scale,
)
from angelslim.models.block import Block
from angelslim.models.loading import open_model
from angelslim.models.select import Choice, groups_by_linear, select
from angelslim.numerics.error import Histogram
from angelslim.numerics.observers import make_observer
from angelslim.numerics.quantize import fake_quantize
from angelslim.numerics.scheme import FORMATS, PER_TENSOR, PRESETS, Quant, Scheme
from families import save_random

FP8 = Quant(FORMATS["fp8_e4m3"], PER_TENSOR)


def test_scales_below_eight_bits_take_the_weights_type():
    weight = torch.randn(8, 128).to(torch.bfloat16)
    assert round_weight(weight, PRESETS["int4"].weight).scale.dtype == torch.bfloat16
    assert round_weight(weight, PRESETS["int8_dynamic"].weight).scale.dtype == torch.float32


def test_statistics_keep_a_bounded_sample():
    statistics = InputStatistics(make_observer("absmax", FP8.format))
    for _ in range(20):
        statistics.update(torch.randn(100, 256))
    statistics.update(torch.full((1, 256), -9.0))
    assert 0 < statistics.values.numel() <= PROBE_VALUES
    assert statistics.scale(FP8).item() == pytest.approx(9 / 448)
    assert statistics.scale(FP8).shape == (1, 1)


def test_inputs_that_are_always_zero_give_a_usable_scale():
    statistics = InputStatistics(make_observer("absmax", FP8.format))
    statistics.update(torch.zeros(4, 8))
    assert statistics.scale(FP8).item() > 0


def test_nvfp4_inputs_get_a_global_scale_and_their_groups_stay_together():
    quant = PRESETS["nvfp4"].input
    assert quant is not None
    statistics = InputStatistics(make_observer("mse", quant.format))
    values = torch.randn(40, 64)
    statistics.update(values)
    scale = statistics.scale(quant)
    assert scale.item() == pytest.approx(448 * 6 / values.abs().max().item())
    exact = Histogram.of(values, fake_quantize(values, quant, scale))
    assert statistics.histogram(quant, scale) == exact


def block_of(family, scheme, folder, **choice) -> Block:
    save_random(family, folder)
    source = open_model(folder)
    selection = select(source, scheme, Choice(**choice))
    return Block(source, 1, selection.in_block(1), groups_by_linear(source), torch.device("cpu"))


def names(members) -> list[str]:
    return [layer.name.removeprefix("model.layers.1.") for layer in members]


def test_an_experts_gate_and_up_share_even_without_modules(tmp_path):
    block = block_of("qwen3_moe", PRESETS["nvfp4_weight_only"], tmp_path)
    groups = {tuple(sorted(names(members))): members for members in by_group(block)}
    pair = groups["mlp.experts.2.gate_proj", "mlp.experts.2.up_proj"]
    assert ("mlp.experts.2.down_proj",) in groups and len(groups) == 2 + 4 * 2
    shared = shared_scale(block, pair)
    largest = max(block.weight(layer).abs().max().item() for layer in pair)
    assert shared[pair[0].scheme.weight].item() == pytest.approx(448 * 6 / largest)
    rounded = [round_weight(block.weight(layer), layer.scheme.weight, shared) for layer in pair]
    assert torch.equal(rounded[0].global_scale, rounded[1].global_scale)
    assert shared_scale(block, groups["mlp.experts.2.down_proj",]) == {}


def test_members_with_other_numbers_share_among_themselves(tmp_path):
    """Experts of another scheme read the same tensor as the shared expert and have other scales."""
    fp8, nvfp4 = PRESETS["fp8_static"], PRESETS["nvfp4_weight_only"]
    static = Scheme(fp8.weight)
    block = block_of("llama", static, tmp_path, overrides=(("self_attn", nvfp4),))
    members = [
        layer for layer in block.layers if layer.name.endswith(("q_proj", "k_proj", "gate_proj", "up_proj"))
    ]
    shared = shared_scale(block, members)
    assert set(shared) == {nvfp4.weight, fp8.weight}
    for layer in members:
        rounded = round_weight(block.weight(layer), layer.scheme.weight, shared)
        assert (rounded.global_scale is not None) == (layer.scheme == nvfp4)
