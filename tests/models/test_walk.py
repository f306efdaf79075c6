"""The block stream gives the hidden states of the whole model, with one block in memory."""

from __future__ import annotations

import pytest
import torch

from angelslim.base.errors import ModelError
from angelslim.models.activations import ActivationStore
from angelslim.models.loading import Source, open_model
from angelslim.models.stacks import unstacked
from angelslim.models.walk import BlockStream
from families import random_model, save_random, with_image

FAMILIES = (
    "qwen3", "gemma3_text", "phi3", "qwen3_moe", "deepseek_v3", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "glm4", "glm4_moe", "seed_oss", "llava", "qwen2_5_vl", "qwen3_vl", "qwen2_audio", "glmasr", "gemma3",
    "qwen3_vl_moe", "llama4_text",
)  # fmt: skip
CPU = torch.device("cpu")


def samples(lengths: tuple[int, ...] = (5, 12, 1, 12)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 80, (1, length), generator=generator) for length in lengths]


def block_outputs(model, blocks: tuple[str, ...], ids: torch.Tensor) -> list[torch.Tensor]:
    """Input of the first block and output of every block in one ordinary forward."""
    seen: list[torch.Tensor] = []

    def first(_module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(_module, _args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [model.get_submodule(blocks[0]).register_forward_pre_hook(first, with_kwargs=True)]
    handles += [model.get_submodule(block).register_forward_hook(after) for block in blocks]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def resident(source: Source) -> set[str]:
    return {name for name, value in source.model.named_parameters() if not value.is_meta}


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_equals_the_whole_model(family, tmp_path):
    model = save_random(family, tmp_path / "model")
    source = unstacked(open_model(tmp_path / "model"))
    blocks = source.structure.blocks
    ids = samples()
    store = ActivationStore(tmp_path / "store", 0)
    stream = BlockStream(source, ids, store, CPU)
    stream.prepare(0)
    assert resident(source) == set()  # the embedding is freed again
    expected = [block_outputs(model, blocks, sample) for sample in ids]
    for index in range(len(blocks)):
        for sample in range(len(ids)):
            torch.testing.assert_close(store.get(index, sample), expected[sample][index], atol=1e-5, rtol=0)
        with stream.resident(index):
            assert {name.split(f"{blocks[index]}.")[0] for name in resident(source)} == {""}
            assert not any(".experts." in name for name in resident(source))  # they come one at a time
            stream.through(index)
        assert resident(source) == set()
    for sample in range(len(ids)):
        torch.testing.assert_close(store.get(len(blocks), sample), expected[sample][-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_the_last_block_gives_is_stored_for_who_wants_it(family, tmp_path):
    """The samples do not run for nothing; who watches sees them run all the same."""
    save_random(family, tmp_path / "model")
    source, ids = open_model(tmp_path / "model"), samples()
    store = ActivationStore(tmp_path / "store", 1 << 24)
    stream = BlockStream(source, ids, store, CPU, keep_last=False)
    stream.prepare(0)
    last = len(stream.blocks) - 1
    runs: list[int] = []
    for index in range(last + 1):
        with stream.resident(index) as runner:
            handle = runner.module.register_forward_hook(lambda *_: runs.append(1))
            runs.clear()
            stream.through(index)
            handle.remove()
            streamed = bool(stream.experts)
            assert len(runs) == len(ids) * ((index < last) + streamed)
            seen: list[torch.Tensor] = []
            if index == last:
                stream.run(
                    index, {f"{stream.blocks[index]}.self_attn.q_proj": seen.append}, keep=True, again=True
                )
                assert len(seen) == len(ids)
        assert store.complete(index + 1, len(ids)) == (index < last)
        assert stream.complete(index + 1)
    assert not BlockStream(source, ids, store, CPU).complete(last + 1)


def test_the_families_would_notice_a_wrong_mask():
    """Guards the test above: with a random model, attention matters and layer types differ."""
    model = random_model("gemma3_text")
    ids = samples((12,))[0]
    blocks = ("model.layers.0", "model.layers.1")
    sliding = block_outputs(model, blocks, ids)
    model.config.sliding_window = model.model.config.sliding_window = 12
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert (block_outputs(model, blocks, ids)[1] - sliding[1]).abs().max() > 1e-2


def test_observers_see_what_the_linears_see(tmp_path):
    model = save_random("qwen3", tmp_path / "model")
    source = open_model(tmp_path / "model")
    name = "model.layers.1.mlp.down_proj"
    stream = BlockStream(source, samples(), ActivationStore(tmp_path / "store", 1 << 20), CPU)
    stream.prepare(0)
    inputs: list[torch.Tensor] = []
    for index in range(2):
        with stream.resident(index):
            stream.run(index, {name: inputs.append} if index == 1 else {}, keep=True)
    expected: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _module, args: expected.append(args[0][0]))
    for sample in samples():
        with torch.no_grad():
            model(input_ids=sample)
    assert [tuple(x.shape) for x in inputs] == [(5, 96), (12, 96), (1, 96), (12, 96)]
    for ours, theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_nan_in_a_block_names_the_block_and_the_sample(tmp_path):
    model = random_model("qwen3")
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "model")
    source = open_model(tmp_path / "model")
    stream = BlockStream(source, samples(), ActivationStore(tmp_path / "store", 1 << 20), CPU)
    stream.prepare(0)
    with stream.resident(0):
        stream.run(0, {}, keep=True)
    with pytest.raises(ModelError, match=r"Block 1 \(model.layers.1\) gives NaN"), stream.resident(1):
        stream.run(1, {}, keep=True)


def test_a_run_that_keeps_nothing_can_be_repeated(tmp_path):
    save_random("qwen3", tmp_path / "model")
    source = open_model(tmp_path / "model")
    store = ActivationStore(tmp_path / "store", 1 << 20)
    stream = BlockStream(source, samples(), store, CPU)
    stream.prepare(0)
    with stream.resident(0):
        stream.run(0, {}, keep=False)
        before = store.get(0, 1)
        stream.run(0, {}, keep=True)
    assert torch.equal(before, block_outputs(random_model("qwen3"), source.structure.blocks, samples()[1])[0])


def test_tables_are_stored_once_for_samples_of_one_length(tmp_path):
    save_random("qwen3", tmp_path / "model")
    source = open_model(tmp_path / "model")
    stream = BlockStream(source, samples((12,) * 6), ActivationStore(tmp_path / "store", 1 << 20), CPU)
    stream.prepare(0)
    tables = {
        id(tensor)
        for calls in stream._calls
        for _args, kwargs in calls.values()
        for tensor in kwargs["position_embeddings"]
    }
    assert len(tables) == 2  # cos and sin


def test_the_original_travels_beside_what_a_method_changes(tmp_path):
    model = save_random("qwen3", tmp_path / "model")
    source = open_model(tmp_path / "model")
    blocks, ids = source.structure.blocks, samples()
    store = ActivationStore(tmp_path / "store", 1 << 20)
    stream = BlockStream(source, ids, store, CPU, follow_original=True)
    stream.prepare(0)
    count, name = len(ids), "self_attn.q_proj"
    pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor | None]]] = {0: [], 1: []}
    for index in range(2):
        path = f"{blocks[index]}.{name}"
        with stream.resident(index):
            stream.compare(index, {path: lambda a, b, seen=pairs[index]: seen.append((a.clone(), b))})
            source.model.get_submodule(path).weight.data.zero_()
            stream.run(index, {}, keep=True)
    expected = [block_outputs(model, blocks, sample) for sample in ids]
    for name_ in (f"{blocks[index]}.{name}" for index in range(2)):
        model.get_submodule(name_).weight.data.zero_()
    changed = [block_outputs(model, blocks, sample) for sample in ids]
    for sample in range(count):
        torch.testing.assert_close(store.get(2, sample), changed[sample][2], atol=1e-5, rtol=0)
        torch.testing.assert_close(store.get(2, count + sample), expected[sample][2], atol=1e-5, rtol=0)
    assert all(torch.equal(now, original) for now, original in pairs[0])
    assert all(len(now) == ids[sample].shape[1] for sample, (now, _) in enumerate(pairs[1]))
    assert any(not torch.allclose(now, original) for now, original in pairs[1])


def test_inputs_that_cannot_be_matched_are_told_apart(tmp_path):
    """A linear that got other tokens in the original, as experts do, has nothing to compare with."""
    save_random("qwen3", tmp_path / "model")
    source = open_model(tmp_path / "model")
    store = ActivationStore(tmp_path / "store", 1 << 20)
    stream = BlockStream(source, samples((5, 12)), store, CPU, follow_original=True)
    stream.prepare(0)
    path = f"{source.structure.blocks[0]}.mlp"
    calls, originals = [], []

    def routed(hidden):
        calls.append(None)
        mlp.down_proj(mlp.up_proj(hidden)[:, : -1 if len(calls) % 2 else None])
        return hidden

    with stream.resident(0):
        mlp = source.model.get_submodule(path)
        mlp.forward = routed
        stream.compare(
            0, {f"{path}.{leaf}_proj": lambda _now, x: originals.append(x) for leaf in ("up", "down")}
        )
        del mlp.forward
    assert [original is None for original in originals] == [False, True] * 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "qwen2_audio"])
def test_towers_feed_the_stream(family, tmp_path):
    model = save_random(family, tmp_path / "model")
    source = open_model(tmp_path / "model")
    inputs, blocks = with_image(family), source.structure.blocks
    stream = BlockStream(source, [inputs], ActivationStore(tmp_path / "store", 0), CPU)
    stream.prepare(0)
    assert resident(source) == set()  # towers are freed again
    expected: list[torch.Tensor] = []
    for block in blocks:
        model.get_submodule(block).register_forward_hook(
            lambda _module, _args, out: expected.append((out[0] if isinstance(out, tuple) else out).clone())
        )
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for index in range(len(blocks)):
        with stream.resident(index):
            stream.through(index)
        torch.testing.assert_close(stream.store.get(index + 1, 0), expected[index], atol=1e-5, rtol=0)
    added = set(stream._added[0])
    assert added == ({1} if family == "qwen3_vl" else set())  # that one adds to the first blocks' outputs
