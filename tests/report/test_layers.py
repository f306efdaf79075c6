from __future__ import annotations

import math
from dataclasses import replace

from angelslim.report.layers import grid, role, worst


def test_roles(record):
    layer = record.layers[0]
    assert role(layer) == "self_attn.q_proj"
    assert role(replace(layer, name="model.layers.0.mlp.experts.17.up_proj")) == "mlp.experts.up_proj"
    assert role(replace(layer, name="visual.blocks.12.attn.qkv", block=12)) == "attn.qkv"
    assert role(replace(layer, name="lm_head", block=None)) == "lm_head"


def test_grid_shows_the_worst_expert_and_only_the_stack(record):
    layer = record.layers[0]
    experts = [
        replace(layer, name=f"model.layers.3.mlp.experts.{i}.up_proj", block=3, sqnr_db=level)
        for i, level in enumerate((30.0, 12.0, 25.0))
    ]
    head = replace(layer, name="lm_head", block=None)
    assert grid([*experts, head]) == {"mlp.experts.up_proj": {3: 12.0}}


def test_worst_puts_not_a_number_first_and_exact_last(record):
    layer = record.layers[0]
    levels = [math.inf, 10.0, math.nan, 20.0]
    layers = [replace(layer, name=str(index), sqnr_db=level) for index, level in enumerate(levels)]
    assert [item.name for item in worst(layers, 4)] == ["2", "1", "3", "0"]
    assert len(worst(record.layers)) == 5
