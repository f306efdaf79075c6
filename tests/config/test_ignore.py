import pytest

from angelslim.config.ignore import ignored, matches


@pytest.mark.parametrize(
    ("entry", "path", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "language_model.lm_head", True),
        ("q_a_proj", "model.layers.0.self_attn.q_a_proj", True),
        ("shared_expert", "model.layers.0.mlp.shared_experts.up_proj", True),
        ("mlp.gate_proj", "model.layers.3.mlp.gate_proj", True),
        ("mlp.gate_proj", "model.layers.3.mlp.experts.0.gate_proj", False),
        ("mlp.gate", "model.layers.3.mlp.gate", True),
        ("mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("mlp.shared_expert", "model.layers.3.mlp.shared_experts.up_proj", True),
        ("model.layers.6.", "model.layers.6.mlp.up_proj", True),
        ("model.layers.6.", "model.layers.61.mlp.up_proj", False),
        (".indexer.wk", "model.layers.6.self_attn.indexer.wk", True),
        ("model.visual.patch_embed.proj", "model.visual.patch_embed.proj", True),
        ("self_attn.q_proj.weight", "self_attn.q_proj", False),
        (r"re:.*layers\.[02]\.", "model.layers.2.mlp.up_proj", True),
        (r"re:.*layers\.[02]\.", "model.layers.1.mlp.up_proj", False),
        ("re:mlp", "model.mlp", False),
        ("", "anything", False),
        (".", "anything", False),
    ],
)
def test_matches(entry, path, expected):
    assert matches(entry, path) is expected


def test_any_entry_is_enough():
    assert ignored("model.lm_head", ["visual", "lm_head"])
    assert not ignored("model.layers.0.mlp.up_proj", ["visual", "lm_head"])
