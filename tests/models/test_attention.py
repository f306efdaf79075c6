"""Watching attention changes nothing, sees what the cache holds, and can change what attention reads."""

from __future__ import annotations

import pytest
import torch

from angelslim.models.attention import PREFIX, module_path, stored_name, watch, watched
from angelslim.models.loading import open_model
from families import FAMILIES, random_model, save_random
from tiny import qwen3

IDS = torch.arange(3, 19)[None]


def logits(model, **settings):
    with torch.no_grad():
        return model(input_ids=IDS, **settings).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_be_watched_and_computes_the_same(family):
    model = random_model(family).eval()
    before, seen = logits(model), []
    with watched(model, lambda module, *states: seen.append((module, states))):
        during = logits(model)
    assert torch.equal(before, during) and torch.equal(before, logits(model))
    text = model.config.get_text_config()
    assert len(seen) == text.num_hidden_layers
    for _, (query, key, value) in seen:
        assert query.shape[1:3] == (text.num_attention_heads, 16) and key.shape[2] == value.shape[2] == 16
        assert key.shape[1] == value.shape[1] == text.num_key_value_heads


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_seen_is_what_the_cache_holds(implementation):
    model = qwen3()
    model.set_attn_implementation(implementation)
    seen = {}
    with (
        watched(model, lambda module, _query, key, value: seen.update({module.layer_idx: (key, value)})),
        torch.no_grad(),
    ):
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    assert model.config._attn_implementation == implementation
    for index, (key, value) in seen.items():
        assert torch.equal(cache.layers[index].keys, key) and torch.equal(cache.layers[index].values, value)
    assert sorted(seen) == [0, 1]


def test_one_block_is_watched_without_the_others():
    model, seen = qwen3(), []
    with watched(model.model.layers[1], lambda module, *_: seen.append(module.layer_idx)):
        logits(model)
    logits(model)
    assert seen == [1]


def test_attention_reads_what_the_watcher_returns_until_it_ends():
    model = qwen3()
    before = logits(model)
    with watched(model, lambda _module, query, key, value: (query, key, torch.zeros_like(value))):
        silenced = logits(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    assert torch.allclose(silenced, logits(model), atol=1e-6) and not torch.allclose(
        silenced, before, atol=1e-3
    )


def test_a_watch_can_stay_and_be_watched_no_second_time():
    model, seen = qwen3(), []
    watch([model.model.layers[0].self_attn], lambda module, *_: seen.append(module.layer_idx))
    logits(model)
    logits(model)
    assert seen == [0, 0] and model.config._attn_implementation == PREFIX + "sdpa"
    with pytest.raises(AssertionError, match="once at a time"):
        watch([model.model.layers[0].self_attn], lambda *_: None)
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 19) and len(seen) == 5


@pytest.mark.parametrize(
    ("family", "path"),
    [("qwen3", "model.layers.1.self_attn"), ("llava", "model.language_model.layers.1.self_attn")],
)
def test_names_of_the_checkpoint_and_paths_of_modules_lead_to_each_other(family, path, tmp_path):
    save_random(family, tmp_path / "model")
    source = open_model(tmp_path / "model")
    stored = stored_name(source, path)
    assert f"{stored}.k_proj.weight" in source.checkpoint.tensors
    assert module_path(source, stored) == path
    assert stored_name(source, "somewhere.else") == "somewhere.else" == module_path(source, "somewhere.else")
