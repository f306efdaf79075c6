"""What discovery finds, name by name, as read from the modelling code of each family."""

from __future__ import annotations

from functools import cache

import pytest

from angelslim.base.errors import ModelError
from angelslim.models.loading import probe_model
from angelslim.models.structure import Experts, Group, Structure, discover
from families import FAMILIES, config_of

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
ATTENTION = [("input_layernorm", QKV, ()), (None, ("self_attn.o_proj",), ())]
DENSE = [("post_attention_layernorm", GATE_UP, ()), (None, ("mlp.down_proj",), ())]
LLAMA = [ATTENTION + DENSE] * 2
SHARED = [
    (
        "post_attention_layernorm",
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("mlp.gate", "mlp.experts"),
    ),
    (None, ("mlp.shared_experts.down_proj",), ()),
]
SANDWICH = [*ATTENTION, ("pre_feedforward_layernorm", GATE_UP, ()), (None, ("mlp.down_proj",), ())]
FUSED_MLP = [("post_attention_layernorm", ("mlp.gate_up_proj",), ()), (None, ("mlp.down_proj",), ())]
LATENT = [
    ("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), ()),
    ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), ()),
    ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), ()),
    (None, ("self_attn.o_proj",), ()),
]
HUNYUAN_MOE = [
    *ATTENTION,
    (
        "post_attention_layernorm",
        ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj", "mlp.gate.wg"),
        ("mlp.experts",),
    ),
    (None, ("mlp.shared_mlp.down_proj",), ()),
]

# family -> the groups of block 0 and of block 1: (source, linears, others), names relative to the block
GROUPS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": [[*ATTENTION, ("post_attention_layernorm", (), ("mlp.gate", "mlp.experts"))]] * 2,
    "hunyuan_v1_dense": LLAMA,
    "hunyuan_v1_moe": [HUNYUAN_MOE] * 2,
    "hy_v3": [ATTENTION + DENSE, ATTENTION + SHARED],
    "deepseek_v3": [LATENT + DENSE, LATENT + SHARED],
    # The norm that glm4 calls post_self_attn_layernorm acts on the attention's output, inside the residual.
    "glm4": [ATTENTION + FUSED_MLP] * 2,
    "glm4_moe": [ATTENTION + DENSE, ATTENTION + SHARED],
    "gemma3_text": [SANDWICH] * 2,
    "phi3": [
        [("input_layernorm", ("self_attn.qkv_proj",), ()), (None, ("self_attn.o_proj",), ()), *FUSED_MLP]
    ]
    * 2,
    "seed_oss": LLAMA,
    "gemma3": [SANDWICH] * 2,
    "qwen2_5_vl": LLAMA,
    "qwen3_vl": LLAMA,
    "llava": LLAMA,
    "qwen2_audio": LLAMA,
    "glmasr": LLAMA,
    "qwen3_vl_moe": [[*ATTENTION, ("post_attention_layernorm", (), ("mlp.gate", "mlp.experts"))]] * 2,
    "gpt_oss": [
        [*ATTENTION, ("post_attention_layernorm", (), ("mlp.router", "mlp.experts"))],
    ]
    * 2,
    # The experts read the router's input times its weights, so they belong to its group.
    "llama4_text": [
        [
            *ATTENTION,
            ("post_attention_layernorm", ("feed_forward.gate_proj", "feed_forward.up_proj"), ()),
            (None, ("feed_forward.down_proj",), ()),
        ],
        [
            *ATTENTION,
            (
                "post_attention_layernorm",
                (
                    "feed_forward.router",
                    "feed_forward.shared_expert.gate_proj",
                    "feed_forward.shared_expert.up_proj",
                ),
                ("feed_forward.experts",),
            ),
            (None, ("feed_forward.shared_expert.down_proj",), ()),
        ],
    ],
}
TOWERS = {
    "gemma3": {"vision": "model.vision_tower", "projector": "model.multi_modal_projector"},
    "qwen2_5_vl": {"vision": "model.visual"},  # its merger lies inside the tower
    "qwen3_vl": {"vision": "model.visual"},
    "qwen3_vl_moe": {"vision": "model.visual"},
    "llava": {"vision": "model.vision_tower", "projector": "model.multi_modal_projector"},
    "qwen2_audio": {"audio": "model.audio_tower", "projector": "model.multi_modal_projector"},
    "glmasr": {"audio": "model.audio_tower", "projector": "model.multi_modal_projector"},
}
FUSED_EXPERTS = {  # family -> blocks with experts
    "qwen3_moe": (0, 1),
    "hunyuan_v1_moe": (0, 1),
    "hy_v3": (1,),
    "deepseek_v3": (1,),
    "glm4_moe": (1,),
    "qwen3_vl_moe": (0, 1),
    "gpt_oss": (0, 1),
    "llama4_text": (1,),
}


@cache
def structure_of(family: str) -> Structure:
    return discover(probe_model(config_of(family)))


def test_every_family_has_its_expectation():
    assert set(GROUPS) == set(FAMILIES)


@pytest.mark.parametrize("family", GROUPS)
def test_groups(family):
    structure = structure_of(family)
    decoder = "model.language_model" if family in TOWERS else "model"
    root = "" if family == "llama4_text" else decoder  # its class does not name its decoder
    assert (structure.model_type, structure.decoder) == (family, root)
    assert structure.blocks == (f"{decoder}.layers.0", f"{decoder}.layers.1")
    for block, expected in zip(structure.blocks, GROUPS[family], strict=True):
        full = [
            Group(
                f"{block}.{source}" if source else None,
                tuple(f"{block}.{name}" for name in linears),
                tuple(f"{block}.{name}" for name in others),
            )
            for source, linears, others in expected
        ]
        found = structure.groups[block]
        assert {(g.source, frozenset(g.linears), frozenset(g.others)) for g in found} == {
            (g.source, frozenset(g.linears), frozenset(g.others)) for g in full
        }
        assert len(found) == len(full)


@pytest.mark.parametrize("family", GROUPS)
def test_head_towers_and_experts(family):
    structure = structure_of(family)
    llama_4 = family == "llama4_text"
    assert structure.head == "lm_head"
    assert structure.towers == TOWERS.get(family, {})
    assert structure.experts == tuple(
        Experts(
            f"{structure.blocks[block]}.{'feed_forward' if llama_4 else 'mlp'}.experts",
            4,
            ("gate_up_proj", "down_proj"),
            sorted=llama_4,
            plain=family != "gpt_oss",
        )
        for block in FUSED_EXPERTS.get(family, ())
    )
    assert structure.tuple_outputs is False


@pytest.mark.parametrize("family", GROUPS)
def test_every_linear_of_a_block_is_in_exactly_one_group(family):
    structure = structure_of(family)
    grouped = [linear for groups in structure.groups.values() for group in groups for linear in group.linears]
    inside = [name for name in structure.linears if structure.block_of(name) is not None]
    assert sorted(grouped) == sorted(inside)


def test_places_of_names():
    structure = structure_of("qwen2_5_vl")
    assert structure.block_of("model.language_model.layers.1.mlp.up_proj") == 1
    assert structure.block_of("model.language_model.layers.10.mlp.up_proj") is None
    assert structure.block_of("model.visual.blocks.1.attn.qkv") is None
    assert structure.tower_of("model.visual.blocks.1.attn.qkv") == "vision"
    assert structure.tower_of("model.visual.merger.mlp.0") == "vision"
    assert structure.tower_of("model.visualiser.mlp") is None
    assert structure_of("qwen2_audio").tower_of("model.multi_modal_projector.linear") == "projector"


def test_linear_routers_are_kept():
    assert structure_of("hunyuan_v1_moe").keep == {f"model.layers.{i}.mlp.gate.wg" for i in (0, 1)}
    assert structure_of("qwen3_moe").keep == frozenset()  # its router is no linear


def test_a_model_without_blocks_is_refused():
    import torch

    class Flat(torch.nn.Module):
        config = config_of("llama")

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    with pytest.raises(ModelError, match="No stack of decoder blocks was found in Flat"):
        discover(Flat())
