"""The roles that are read off a network are those that its modelling code says."""

from __future__ import annotations

import pytest

from angelslim.base.errors import ModelError
from angelslim.methods.rewrite._residual import Trace, Values, residual, values
from angelslim.models.loading import open_model
from families import save_random

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
BEFORE, AFTER = "input_layernorm", "post_attention_layernorm"
DENSE = ({BEFORE: QKV, AFTER: GATE_UP}, ("self_attn.o_proj", "mlp.down_proj"))
# family -> what reads each norm and what writes, in the last block; names relative to it
ROLES = {
    "llama": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "hunyuan_v1_dense": DENSE,
    "seed_oss": DENSE,
    "phi3": (
        {BEFORE: ("self_attn.qkv_proj",), AFTER: ("mlp.gate_up_proj",)},
        ("self_attn.o_proj", "mlp.down_proj"),
    ),
    "qwen3_moe": ({BEFORE: QKV, AFTER: ("mlp.gate", "mlp.experts")}, ("self_attn.o_proj", "mlp.experts")),
    "hunyuan_v1_moe": (
        {
            BEFORE: QKV,
            AFTER: ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj", "mlp.gate.wg", "mlp.experts"),
        },
        ("self_attn.o_proj", "mlp.experts", "mlp.shared_mlp.down_proj"),
    ),
    "deepseek_v3": (  # its q_b_proj and o_proj are as wide as the stream, here; only one of them writes into it
        {
            BEFORE: ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            AFTER: (*SHARED, "mlp.gate", "mlp.experts"),
        },
        ("self_attn.o_proj", "mlp.experts", "mlp.shared_experts.down_proj"),
    ),
}


@pytest.mark.parametrize("family", ROLES)
def test_readers_writers_and_norms_of_the_last_block(family, tmp_path):
    save_random(family, tmp_path)
    source = open_model(tmp_path)
    found = residual(source, Trace.of(source))
    reads, writes = ROLES[family]
    block = source.structure.blocks[-1] + "."
    read = {name: norm for name, norm in found.readers.items() if name.startswith(block)}
    assert read == {block + name: block + norm for norm, names in reads.items() for name in names}
    assert {name for name in found.writers if name.startswith(block)} == {block + name for name in writes}
    assert found.readers["lm_head"] == "model.norm"
    assert found.embeddings == ("model.embed_tokens",)
    assert len(found.norms) == 2 * len(source.structure.blocks) + 1


@pytest.mark.parametrize(
    ("family", "culprit"),
    [
        ("gemma3_text", "layers.0.post_attention_layernorm stands between"),
        ("glm4", "layers.0.post_mlp_layernorm stands between"),
        ("qwen2_5_vl", r"model.visual \(vision\) writes features"),
        ("qwen2_audio", r"audio_tower \(audio\) writes features"),
    ],
)
def test_what_a_rotation_cannot_pass_is_named(family, culprit, tmp_path):
    save_random(family, tmp_path)
    source = open_model(tmp_path)
    with pytest.raises(ModelError, match=culprit):
        residual(source, Trace.of(source))


@pytest.mark.parametrize(
    ("family", "maker", "rows"),
    [
        ("llama", "v_proj", list(range(32))),  # two heads of 16
        ("phi3", "qkv_proj", list(range(96, 128))),  # four heads of queries, two of keys, then two of values
        ("deepseek_v3", "kv_b_proj", [24 * head + 8 + i for head in range(4) for i in range(16)]),
        ("gemma3_text", "v_proj", list(range(32))),
    ],
)
def test_rows_that_make_the_values(family, maker, rows, tmp_path):
    save_random(family, tmp_path)
    source = open_model(tmp_path)
    found = values(Trace.of(source))
    assert list(found) == [f"{block}.self_attn" for block in source.structure.blocks]
    for path, made in found.items():
        assert isinstance(made, Values)
        assert (made.maker, made.reader) == (f"{path}.{maker}", f"{path}.o_proj")
        assert made.rows.tolist() == rows and made.width == 16


def test_values_that_something_touches_on_their_way_are_not_rotated(tmp_path):
    save_random("llama", tmp_path)
    source = open_model(tmp_path)
    path = "model.layers.0.self_attn"
    normed = Trace.of(source)
    query, value = normed.attention[path]
    normed.attention[path] = (query, value * 2)  # as by a norm of the values
    assert values(normed)[path] == f"something stands between a linear and the values of {path}"
    gated = Trace.of(source)
    given = gated.inputs[f"{path}.o_proj"]
    gated.inputs[f"{path}.o_proj"] = given * gated.outputs[f"{path}.q_proj"].sigmoid()
    reason = f"something stands between {path} and the linear that reads what it returns"
    assert values(gated)[path] == reason
