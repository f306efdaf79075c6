"""Other schemes for some layers: who gets which, and what is refused."""

from __future__ import annotations

import pytest

from angelslim.base.errors import ConfigError, SchemeError
from angelslim.models.loading import open_model
from angelslim.models.select import Choice, select
from angelslim.numerics.scheme import PRESETS, Scheme, with_group
from families import save_random

FP8, INT8 = PRESETS["fp8_dynamic"], PRESETS["int8_dynamic"]
INT4 = with_group(PRESETS["int4"], 32)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    cache = {}

    def source(family):
        if family not in cache:
            folder = tmp_path_factory.mktemp(family)
            save_random(family, folder)
            cache[family] = open_model(folder)
        return cache[family]

    return source


def chosen(source, *overrides, **rest) -> dict[str, Scheme]:
    selection = select(source, FP8, Choice(overrides=overrides, **rest))
    return {layer.name: layer.scheme for layer in selection.layers}


def test_the_first_entry_that_matches_decides(opened):
    entries = ((r"re:.*layers\.1\.mlp\.down_proj", INT8), ("mlp.down_proj", INT4))
    schemes = chosen(opened("llama"), *entries)
    assert schemes["model.layers.0.mlp.down_proj"] == INT4
    assert schemes["model.layers.1.mlp.down_proj"] == INT8
    assert schemes["model.layers.0.mlp.up_proj"] == FP8
    assert len(schemes) == 14


def test_none_keeps_a_layer_in_full_precision_and_says_so(opened):
    selection = select(opened("llama"), FP8, Choice(overrides=(("o_proj", None),)))
    assert len(selection.layers) == 12
    assert selection.skipped["model.layers.0.self_attn.o_proj"] == "override: o_proj"


def test_the_experts_of_a_mixture_differ_from_the_rest(opened):
    for family in ("qwen3_moe", "deepseek_v3", "hunyuan_v1_moe"):
        schemes = chosen(opened(family), (r"re:.*\.experts\.", INT4))
        assert {schemes[name] for name in schemes if ".experts." in name} == {INT4}
        assert {schemes[name] for name in schemes if ".experts." not in name} == {FP8}


def test_ignored_layers_stay_ignored(opened):
    schemes = chosen(opened("llama"), ("mlp", INT4), ignore=("mlp.down_proj",))
    assert "model.layers.0.mlp.down_proj" not in schemes
    assert schemes["model.layers.0.mlp.gate_proj"] == INT4


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("mlp.dwon_proj", "'mlp.dwon_proj' matches no layer that is quantized. Write it"),
        ("lm_head", r"matches no layer that is quantized: 'lm_head' is not quantized \(head"),
        (r"re:model\.layers\.7\.", "matches no layer that is quantized"),
    ],
)
def test_an_entry_without_effect_is_an_error(opened, entry, reason):
    with pytest.raises(ConfigError, match=reason):
        chosen(opened("llama"), ("mlp.down_proj", INT4), (entry, INT8))


def test_an_entry_behind_a_wider_one_is_an_error(opened):
    with pytest.raises(
        ConfigError, match=r"'mlp\.down_proj' has no effect: an earlier entry, 'down_proj', decides"
    ):
        chosen(opened("llama"), ("down_proj", INT4), ("mlp.down_proj", INT8))


@pytest.mark.parametrize(
    ("family", "entry", "scheme", "names"),
    [
        ("llama", "k_proj", INT8, "self_attn.q_proj' as .*self_attn.k_proj' as"),
        ("llama", "gate_proj", None, "mlp.gate_proj' as full precision.*mlp.up_proj' as|up_proj.*gate_proj"),
        ("qwen3_moe", r"re:.*experts\.1\.", INT8, r"experts\.0\..*experts\.1\."),
        ("qwen3_moe", r"re:.*experts\.\d+\.down_proj", INT8, "experts"),
        ("deepseek_v3", "q_a_proj", INT8, "q_a_proj.*kv_a_proj_with_mqa|kv_a_proj_with_mqa.*q_a_proj"),
    ],
)
def test_what_engines_join_may_not_differ(opened, family, entry, scheme, names):
    with pytest.raises(
        SchemeError, match=f"Engines compute these as one matrix, and they differ: .*({names})"
    ):
        chosen(opened(family), (entry, scheme))


def test_joined_layers_that_an_ignored_one_splits_are_refused_only_where_an_override_says_so(opened):
    assert len(chosen(opened("llama"), ("down_proj", INT4), ignore=("q_proj",))) == 12
    with pytest.raises(SchemeError, match="q_proj' as full precision"):
        chosen(opened("llama"), ("self_attn", INT4), ignore=("q_proj",))


def test_groups_of_an_override_have_to_fit(opened):
    with pytest.raises(SchemeError, match=r"not a multiple.*Layers: model\.layers\.0\.mlp\.down_proj"):
        chosen(opened("llama"), ("down_proj", with_group(INT4, 64)))


def test_overridden_embeddings_have_no_input(opened):
    schemes = chosen(opened("llama"), ("embed_tokens", INT8), embeddings=True)
    assert schemes["model.embed_tokens"] == Scheme(INT8.weight)
