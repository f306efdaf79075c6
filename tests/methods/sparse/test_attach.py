"""The hook on real model classes: nothing changes at density 1, padding and chunks change nothing, all is counted."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from angelslim.base.errors import ConfigError, ModelError
from angelslim.kernels.attention.choose import KERNELS
from angelslim.methods.sparse import attach as hook
from angelslim.methods.sparse.assign import Rule, full
from angelslim.methods.sparse.attach import NAME, Settings, attach
from angelslim.methods.sparse.plan import BlockPlan, Context, finish
from families import FAMILIES, random_model

PLAIN = Settings(block=16, crossover=16, kernel="dense")
LENGTH = 61


def some_blocks(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
    """A third of the blocks, the same ones for the same positions whatever the call's offset is."""
    heads = torch.arange(q.shape[1])[:, None, None]
    rows = torch.arange(ctx.q_offset // ctx.block, -(-ctx.keys // ctx.block))[:, None]
    columns = torch.arange(-(-ctx.keys // ctx.block))
    mask = (heads + 2 * rows + columns) % 3 == 0
    return finish(mask.expand(q.shape[0], *mask.shape), ctx)


def ids(rows: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 80, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model: Any, prompt: Tensor, **more: Any) -> Tensor:
    result: Tensor = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, **more)
    return result


def logits(model: Any, prompt: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(prompt, **more).logits
    return result


DENSE_LAYERS = {  # family -> why some of its two layers stay dense
    "gemma3": {"sliding window": 1},
    "gemma3_text": {"sliding window": 1},
    "llama4_text": {"a mask that is not plain causality": 1},  # it attends to chunks
    "gpt_oss": {"sliding window": 1, "attention with s_aux": 1},  # sinks
}


@pytest.mark.parametrize("family", FAMILIES)
def test_density_one_generates_the_same_tokens(family: str) -> None:
    model, prompt = random_model(family), ids()
    expected = generate(model, prompt)
    with attach(model, full, PLAIN) as attached:
        assert torch.equal(generate(model, prompt), expected)
    whole = attached.total()
    dense = DENSE_LAYERS.get(family, {})
    assert whole["density"] == (1.0 if len(dense) < 2 else None) and whole["calls"] == 2 - len(dense)
    assert whole["fallbacks"] == {"decode": 10} | dense
    assert torch.equal(generate(model, prompt), expected), "removed without a trace"


@pytest.mark.parametrize("family", ["qwen3", "llama", "hunyuan_v1_dense", "deepseek_v3", "gemma3_text"])
def test_a_padded_batch_equals_its_rows_alone(family: str) -> None:
    model = random_model(family)
    rows = [ids(length=LENGTH)[0], ids(length=44)[0], ids(length=12)[0]]
    with attach(model, some_blocks, PLAIN) as attached:
        alone = [logits(model, row[None])[0] for row in rows]
        for side in ("left", "right"):
            batch, mask = torch.zeros(3, LENGTH, dtype=torch.long), torch.zeros(3, LENGTH, dtype=torch.long)
            spans = [
                slice(LENGTH - len(row), LENGTH) if side == "left" else slice(0, len(row)) for row in rows
            ]
            for b, (row, span) in enumerate(zip(rows, spans, strict=True)):
                batch[b, span], mask[b, span] = row, 1
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            together = logits(model, batch, attention_mask=mask, position_ids=positions)
            for b, span in enumerate(spans):
                torch.testing.assert_close(together[b, span], alone[b], rtol=1e-4, atol=1e-4)
    assert 0.3 < attached.total()["density"] < 0.95, "the comparison is of sparse attention"
    assert attached.total()["fallbacks"].get("below the crossover length", 0) > 0, "and of a short row"


def test_padded_generation_equals_singles() -> None:
    model = random_model("qwen3")
    rows = [ids(length=LENGTH)[0], ids(length=40)[0]]
    batch = torch.stack([rows[0], torch.cat([torch.zeros(LENGTH - 40, dtype=torch.long), rows[1]])])
    mask = torch.ones_like(batch)
    mask[1, : LENGTH - 40] = 0
    with attach(model, some_blocks, PLAIN):
        together = generate(model, batch, attention_mask=mask)
        for b, row in enumerate(rows):
            assert torch.equal(together[b, LENGTH:], generate(model, row[None])[0, len(row) :])


@pytest.mark.parametrize("family", ["qwen3", "hunyuan_v1_moe", "deepseek_v3"])
def test_a_prompt_in_chunks_equals_the_whole(family: str) -> None:
    model, prompt = random_model(family), ids(length=64)
    with attach(model, some_blocks, PLAIN) as attached:
        whole = logits(model, prompt)
        cache, parts = None, []
        for start in range(0, 64, 32):
            with torch.no_grad():
                out = model(prompt[:, start : start + 32], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert attached.total()["fallbacks"] == {}
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_generate_in_chunks() -> None:
    model, prompt = random_model("llama"), ids(length=64)
    with attach(model, some_blocks, PLAIN) as attached:
        whole = generate(model, prompt)
        calls = attached.total()["calls"]
        assert torch.equal(generate(model, prompt, prefill_chunk_size=32), whole)
    assert attached.total()["calls"] == calls + 4, "two chunks in two layers"


def test_a_chunk_that_ends_inside_a_block() -> None:
    model, prompt = random_model("qwen3"), ids(length=64)
    with attach(model, full, PLAIN) as attached:
        whole = logits(model, prompt)
        with torch.no_grad():
            cache = model(prompt[:, :37], use_cache=True).past_key_values
            rest = model(prompt[:, 37:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 37:], rtol=1e-4, atol=1e-4)
    assert attached.total()["density"] == 1.0


def test_the_compiled_kernel_in_a_model() -> None:
    model, prompt = random_model("qwen3"), ids()
    with attach(model, some_blocks, PLAIN):
        expected = logits(model, prompt)
    with attach(model, some_blocks, Settings(block=16, crossover=16)) as attached:
        torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-4, atol=1e-4)
    assert attached.stats[0].row()["kernels"] in ({"flex": 1}, {"triton": 1}, {"hopper": 1})


def test_settings_for_layers_and_heads_arrive() -> None:
    model, seen = random_model("qwen3"), []

    def watch(name: str) -> Any:
        def selector(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
            seen.append((name, ctx.layer, ctx.layers, q.shape[1], k.shape[1]))
            return some_blocks(q, k, v, ctx)

        return selector

    first, second = watch("first"), watch("second")
    rules = [
        Rule(None, layers=frozenset({0})),
        Rule(first, heads=frozenset({1, 3})),
        Rule(second, heads=frozenset({0})),
        Rule(None),
    ]
    with attach(model, rules, PLAIN) as attached:
        logits(model, ids())
    assert attached.stats[0].row()["fallbacks"] == {"set dense": 1}
    assert sorted(seen) == [("first", 1, 2, 2, 2), ("second", 1, 2, 1, 1)]
    assert 0.3 < (attached.stats[1].density() or 0) < 1, "one head of four is dense"


def test_scale_and_lengths_reach_the_selector() -> None:
    model, seen = random_model("gemma3_text", query_pre_attn_scalar=64), []

    def selector(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        seen.append(ctx)
        return full(q, k, v, ctx)

    with attach(model, selector, Settings(block=16, crossover=70, kernel="dense", prompt_len=99)):
        logits(model, ids())
    (ctx,) = seen
    assert (ctx.scaling, ctx.prompt_len, ctx.keys, ctx.q_offset, ctx.layer) == (64**-0.5, 99, LENGTH, 0, 1)


@pytest.mark.parametrize(("found", "calls"), [(32, 2), (64, 0), (None, 0)])
def test_a_measured_crossover(found: int | None, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find(selector: Any, kernel: Any, like: tuple[Tensor, ...], ctx: Context) -> int | None:
        asked.append((selector, kernel.name, like[0].shape[1], ctx.layer, ctx.block))
        return found

    monkeypatch.setattr(hook, "find", find)
    model = random_model("qwen3")
    with attach(model, full, Settings(block=16, crossover="auto", kernel="dense")) as attached:
        logits(model, ids())
    assert asked == [(full, "dense", 4, 1, 16)], "once for all layers of a shape"
    assert attached.total()["calls"] == calls


def reasons(model: Any, settings: Settings = PLAIN, prompt: Tensor | None = None, **more: Any) -> set[str]:
    """Why calls were dense; the logits must be the dense ones."""
    prompt = ids() if prompt is None else prompt
    expected = logits(model, prompt, **more)
    with attach(model, some_blocks, settings) as attached:
        torch.testing.assert_close(logits(model, prompt, **more), expected, rtol=1e-4, atol=1e-4)
    assert attached.total()["calls"] == 0
    return set(attached.total()["fallbacks"])


def test_every_fallback_has_its_reason() -> None:
    model = random_model("qwen3")
    assert reasons(model, Settings(block=16, crossover=100)) == {"below the crossover length"}
    assert reasons(model, prompt=ids(length=1)) == {"decode"}
    holes = torch.ones(1, LENGTH, dtype=torch.long)
    holes[0, 20:30] = 0
    assert reasons(model, attention_mask=holes) == {"padding inside a row"}
    packed = torch.cat([torch.arange(30), torch.arange(LENGTH - 30)])[None]
    assert reasons(model, position_ids=packed, use_cache=False) == {"a mask that is not plain causality"}
    sliding = random_model(
        "qwen3", layer_types=["sliding_attention"] * 2, sliding_window=8, use_sliding_window=True
    )
    assert reasons(sliding) == {"sliding window"}
    with attach(model, some_blocks, PLAIN) as attached:
        model(ids()).logits.sum().backward()
    assert attached.total()["fallbacks"] == {"gradients": 2}


def test_images_that_see_all_of_themselves_stay_exact() -> None:
    text = FAMILIES["gemma3"]["text_config"] | {"layer_types": ["full_attention"] * 2, "sliding_window": 256}
    model = random_model("gemma3", text_config=text)
    image = torch.zeros_like(ids())
    image[0, 8:12] = 1
    assert not torch.equal(logits(model, ids(), token_type_ids=image), logits(model, ids()))
    assert reasons(model, token_type_ids=image) == {"a mask that is not plain causality"}


def test_no_kernel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hopper", "triton", "flex"):
        missing = replace(KERNELS[name], refuses=lambda case, name=name: f"no {name}")
        monkeypatch.setitem(KERNELS, name, missing)
    found = reasons(random_model("qwen3"), Settings(block=16, crossover=16))
    assert found == {"no sparse kernel: no hopper; no triton; no flex"}


def test_softcaps_stay_with_the_models_own_attention() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from families import TEXT

    torch.manual_seed(0)
    config = Gemma2Config(**TEXT, attn_logit_softcapping=0.5, sliding_window=256)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    assert reasons(model) == {"attention with softcap"}


def test_a_static_cache_has_room_that_is_not_read() -> None:
    model, prompt = random_model("qwen3"), ids()
    expected = generate(model, prompt)
    with attach(model, some_blocks, PLAIN) as attached:
        found = generate(model, prompt, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)
    assert attached.total()["fallbacks"] == {"a mask that is not plain causality": 2, "decode": 10}


def test_two_hooks_and_a_name_without_a_hook() -> None:
    model = random_model("qwen3")
    with attach(model, full, PLAIN), pytest.raises(ModelError, match="already"):
        attach(model, full, PLAIN)
    model.set_attn_implementation(NAME)
    with pytest.raises(ModelError, match="without a hook"):
        logits(model, ids())


def test_an_unknown_kernel_and_a_bad_block() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'triton'"):
        Settings(kernel="tritn")
    with pytest.raises(ConfigError, match="0 tokens"):
        Settings(block=0)


def test_removal_is_complete_and_may_be_repeated() -> None:
    model = random_model("qwen3")
    before = model.config._attn_implementation
    attached = attach(model, full, PLAIN)
    assert model.config._attn_implementation == NAME
    attached.remove()
    attached.remove()
    assert model.config._attn_implementation == before


def test_a_forgotten_hook_does_not_keep_the_model() -> None:
    model = random_model("qwen3")
    attached, alive = attach(model, full, PLAIN), weakref.ref(model.get_decoder())
    del model
    gc.collect()
    assert alive() is None
    attached.remove()
