"""Which layers are quantized, and the reason for each that is not."""

from __future__ import annotations

import pytest

from angelslim.base.errors import SchemeError
from angelslim.models.loading import open_model
from angelslim.models.select import Choice, groups_by_linear, select
from angelslim.numerics.scheme import PRESETS, Scheme, with_group
from families import save_random

FP8 = PRESETS["fp8_dynamic"]


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


def roles(selection) -> set[str]:
    return {
        layer.name.split(".layers.")[-1].partition(".")[2]
        for layer in selection.layers
        if ".layers." in layer.name
    }


def test_dense_models(opened):
    selection = select(opened("llama"), FP8)
    projections = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert roles(selection) == projections
    assert len(selection.layers) == 14
    assert {selection.skipped["model.embed_tokens"], selection.skipped["lm_head"]} == {
        "embedding (ask with quantize_embeddings: true)",
        "head (ask with quantize_lm_head: true)",
    }
    layer = next(x for x in selection.layers if x.name == "model.layers.1.mlp.down_proj")
    assert (layer.tensor, layer.module) == (
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj",
    )
    assert (layer.shape, layer.block) == ((64, 96), 1)
    assert len(selection.in_block(1)) == 7 and selection.in_block(None) == ()


def test_the_head_when_asked(opened):
    selection = select(opened("llama"), FP8, Choice(head=True))
    assert [layer.name for layer in selection.in_block(None)] == ["lm_head"]


def test_experts_one_by_one_and_never_the_router(opened):
    for family, router in (
        ("qwen3_moe", "mlp.gate"),
        ("hunyuan_v1_moe", "mlp.gate.wg"),
        ("deepseek_v3", "mlp.gate"),
    ):
        selection = select(opened(family), FP8)
        experts = [layer for layer in selection.layers if ".experts." in layer.name]
        assert len(experts) % 12 == 0 and experts
        assert all(layer.module is None and layer.block is not None for layer in experts)
        assert {layer.shape for layer in experts} in ({(32, 64), (64, 32)}, {(96, 64), (64, 96)})
        kept = [name for name in selection.skipped if name.endswith(router)]
        assert kept and not [layer for layer in selection.layers if layer.name.endswith(router)]


def test_embeddings_when_asked_have_no_input(opened):
    selection = select(opened("llama"), FP8, Choice(embeddings=True))
    (embedding,) = (layer for layer in selection.layers if layer.name == "model.embed_tokens")
    assert embedding.scheme == Scheme(FP8.weight) and embedding.block is None


def test_a_tied_head_is_refused(opened, monkeypatch):
    source = opened("llama")
    monkeypatch.setattr(source.config, "tie_word_embeddings", True)
    for choice in (Choice(head=True), Choice(embeddings=True)):
        with pytest.raises(SchemeError, match="tied"):
            select(source, FP8, choice)


def test_towers_only_when_asked(opened):
    source = opened("llava")
    plain = select(source, FP8)
    assert len(plain.layers) == 14
    assert "vision tower" in plain.skipped.values() and "projector" in plain.skipped.values()
    both = select(source, FP8, Choice(towers=frozenset({"vision", "projector"})))
    names = {layer.name for layer in both.layers} - {layer.name for layer in plain.layers}
    assert any("vision" in name for name in names) and any("projector" in name for name in names)
    assert len(select(source, FP8, Choice(towers=frozenset({"vision"}))).layers) < len(both.layers)
    assert "audio tower" in select(opened("qwen2_audio"), FP8).skipped.values()


def test_ignored_layers_say_which_entry(opened):
    selection = select(opened("llama"), FP8, Choice(ignore=("mlp.down_proj", r"re:.*layers\.0\..*q_proj")))
    assert len(selection.layers) == 11
    assert selection.skipped["model.layers.1.mlp.down_proj"] == "ignore_layers: mlp.down_proj"
    assert selection.skipped["model.layers.0.self_attn.q_proj"] == r"ignore_layers: re:.*layers\.0\..*q_proj"


def test_groups_that_do_not_fit_name_the_layers(opened):
    with pytest.raises(
        SchemeError, match=r"96 is not a multiple.*64.*Layers: model\.layers\.0\.mlp\.down_proj, "
    ):
        select(opened("llama"), with_group(PRESETS["int4"], 64))
    selection = select(opened("llama"), with_group(PRESETS["int4"], 64), Choice(ignore=("down_proj",)))
    assert len(selection.layers) == 12


def test_groups_of_inputs_have_to_fit_too(opened):
    """Blocks of weights may be ragged, but engines quantize inputs in whole groups."""
    with pytest.raises(SchemeError, match=r"Input size \d+ is not a multiple of the group size 128"):
        select(opened("llama"), PRESETS["fp8_block"])


def test_each_linear_of_a_group_points_to_it(opened):
    groups = groups_by_linear(opened("deepseek_v3"))
    first = groups["model.layers.0.self_attn.q_a_proj"]
    assert first is groups["model.layers.0.self_attn.kv_a_proj_with_mqa"]
    assert first.source == "model.layers.0.input_layernorm"
    assert "model.layers.1.mlp.experts" not in groups
