"""Foldings change the weights and not the function, and what cannot be folded is refused with a reason."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from angelslim.models import fold
from angelslim.models.activations import ActivationStore
from angelslim.models.block import Block
from angelslim.models.experts import ExpertRunner
from angelslim.models.fold import NO_MAKER, Fold, _row_maps, find
from angelslim.models.loading import open_model
from angelslim.models.select import groups_by_linear, select
from angelslim.models.structure import Group
from angelslim.models.walk import BlockStream
from angelslim.numerics.scheme import PRESETS
from angelslim.reopen import load
from families import random_model, save_random

CPU = torch.device("cpu")
DENSE = (
    "llama",
    "qwen3",
    "gemma3_text",
    "phi3",
    "glm4",
    "deepseek_v3",
)  # grouped queries, 1 + w, fused, latent
MIXTURES = ("qwen3_moe", "hunyuan_v1_moe", "deepseek_v3")


def streamed(folder, lengths=(24, 17)):
    source = open_model(folder)
    ids = [torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    stream = BlockStream(source, ids, ActivationStore(folder, 1 << 30), CPU)
    stream.prepare(0)
    return source, stream


@contextmanager
def resident(source, stream, index=0):
    with stream.resident(index) as runner:
        yield Block(source, index, (), groups_by_linear(source), CPU, runner)


def scale_for(found: Fold, seed: int) -> torch.Tensor:
    """Random numbers between 1/4 and 4, equal where they must be."""
    spread = torch.rand(found.width, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    return found.shared(2**spread, "amax")


def local(path: str) -> str:
    return path.split("layers.")[-1].partition(".")[2]


def found_in(source, block, index=0) -> dict[str, Fold | str]:
    groups = source.structure.groups[source.structure.blocks[index]]
    return {local((group.linears or group.others)[0]): find(block, group) for group in groups}


@pytest.mark.parametrize("family", DENSE)
def test_the_function_stays_and_the_weights_do_not(family, tmp_path):
    save_random(family, tmp_path)
    source, stream = streamed(tmp_path)
    for index in range(2):
        with resident(source, stream, index) as block, torch.no_grad():
            before = [block.forward([sample]) for sample in range(2)]
            everything = found_in(source, block, index)
            assert not [name for name, found in everything.items() if isinstance(found, str)]
            for seed, found in enumerate(everything.values()):
                original = block.parameter(f"{found.group.linears[0]}.weight").clone()
                scale = scale_for(found, seed)
                done = fold.apply(block, found, scale)
                assert torch.allclose(done, scale, rtol=1e-5)
                rescaled = block.parameter(f"{found.group.linears[0]}.weight")
                assert torch.allclose(rescaled, original * done, rtol=1e-5)
            for sample, then in enumerate(before):
                now = block.forward([sample])
                assert (now - then).abs().max() < 1e-5 * then.abs().max()
            block.advance()
            stream.finish(index)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixtures_experts_and_router_follow_their_norm(family, tmp_path):
    """The logits of the whole model, experts included, from what would be written."""
    save_random(family, tmp_path)
    source, stream = streamed(tmp_path)
    changed, folded = {}, 0
    for index in range(2):
        with resident(source, stream, index) as block:
            for seed, found in enumerate(found_in(source, block, index).values()):
                assert isinstance(found, Fold), found
                fold.apply(block, found, scale_for(found, seed))
                folded += any(other.endswith("experts") for other in found.group.others)
            changed |= block.changed
            block.advance()
            for experts in stream.experts.values():
                for tensors in experts.tensors:
                    part = ExpertRunner(experts, tensors.index)
                    for name in tensors.first:
                        path = f"{tensors.module(name)}.weight"
                        changed[path] = Block(source, index, (), part.groups, CPU, part).parameter(path)
                    Block(source, index, (), part.groups, CPU, part).advance()
            stream.finish(index)
    assert folded
    model, ids = load(tmp_path), stream.samples[0]["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        parameters = dict(model.named_parameters())
        for path, value in changed.items():
            if path in parameters:
                parameters[path].copy_(value)
            else:
                _write_expert(parameters, path, value)
        after = model(input_ids=ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def _write_expert(parameters, path, value):
    """``...experts.3.up_proj.weight`` is the lower half of row 3 of the stack."""
    stack, expert, name, _ = path.rsplit(".", 3)
    target = parameters[f"{stack}.gate_up_proj"][int(expert)]
    half = len(target) // 2
    (target[half:] if name == "up_proj" else target[:half]).copy_(value)


def test_an_expert_folds_its_own_up_into_down(tmp_path):
    save_random("qwen3_moe", tmp_path)
    source, stream = streamed(tmp_path)
    with resident(source, stream) as block:
        block.advance()
        (experts,) = stream.experts.values()
        part = ExpertRunner(experts, 1)
        expert = Block(source, 0, (), part.groups, CPU, part)
        groups = list(dict.fromkeys(part.groups.values()))
        first, last = (find(expert, group) for group in groups)
        assert first == NO_MAKER
        assert isinstance(last, Fold) and last.maker.endswith("up_proj")
        with torch.no_grad():
            before = expert.forward([0])
            fold.apply(expert, last, scale_for(last, 0))
            assert torch.allclose(expert.forward([0]), before, atol=1e-5 * before.abs().max())
        assert {local(path) for path in expert.changed} == {
            "mlp.experts.1.up_proj.weight",
            "mlp.experts.1.down_proj.weight",
        }


def test_the_makers_are_found_without_names(tmp_path):
    save_random("phi3", tmp_path)
    source, stream = streamed(tmp_path)
    with resident(source, stream) as block:
        found = found_in(source, block)
    assert {name: local(each.maker) for name, each in found.items()} == {
        "self_attn.qkv_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.qkv_proj",
        "mlp.gate_up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.gate_up_proj",
    }
    # 4 query heads and 2 of v, 16 wide: v's rows are the last 32 of 128, and each of its heads serves two.
    expected = [96 + (column // 32) * 16 + column % 16 for column in range(64)]
    assert found["self_attn.o_proj"].rows.tolist() == expected
    assert found["mlp.down_proj"].rows.tolist() == list(range(96, 192))
    assert found["self_attn.qkv_proj"].offset == 0


def test_a_norm_that_multiplies_with_one_plus_w_is_recognised(tmp_path):
    save_random("gemma3_text", tmp_path)
    source, stream = streamed(tmp_path)
    with resident(source, stream) as block:
        found = found_in(source, block)
    assert found["self_attn.q_proj"].offset == 1 and found["mlp.gate_proj"].offset == 1
    assert found["self_attn.o_proj"].offset == 0


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_what_a_norm_loses_to_its_type_the_readers_make_up_for(family, tmp_path):
    model = random_model(family, torch.bfloat16)
    model.save_pretrained(tmp_path)
    source, stream = streamed(tmp_path)
    with resident(source, stream) as block:
        found = found_in(source, block)["mlp.gate_proj"]
        assert isinstance(found, Fold)
        before = block.parameter(found.parameters[0]).float() + found.offset
        done = fold.apply(block, found, scale_for(found, 0) * 1.01)
        after = block.parameter(found.parameters[0]).float() + found.offset
    assert torch.allclose(before / after, done, rtol=1e-6)


def test_a_hidden_reader_is_noticed(tmp_path, monkeypatch):
    """The norm's output also goes past the linears: scaling it would change the block."""
    save_random("qwen3", tmp_path)
    source, stream = streamed(tmp_path)
    with resident(source, stream) as block:
        group = block.groups["model.layers.0.mlp.gate_proj"]
        mlp = fold.submodule(block, "model.layers.0.mlp")
        original = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda hidden: original(hidden) + 0.1 * hidden)
        assert find(block, group) == NO_MAKER
        monkeypatch.undo()
        assert isinstance(find(block, group), Fold)


def test_a_reader_that_cannot_be_compensated_is_named(tmp_path):
    save_random("qwen3", tmp_path)
    source, stream = streamed(tmp_path)
    with resident(source, stream) as block:
        block.module.add_module("conv", nn.Conv1d(64, 64, 3))
        group = block.groups["model.layers.0.mlp.gate_proj"]
        also = Group(group.source, group.linears, ("model.layers.0.conv",))
        assert (
            find(block, also)
            == "model.layers.0.conv also reads the input, and its weights cannot be rescaled"
        )


def test_experts_that_are_not_streamed_are_not_folded(tmp_path, monkeypatch):
    save_random("qwen3_moe", tmp_path)
    source, stream = streamed(tmp_path)
    with resident(source, stream) as block:
        monkeypatch.setattr(Block, "scale_expert_inputs", lambda *_: False)
        reason = found_in(source, block)["mlp.gate"]
    assert isinstance(reason, str) and "experts also reads the input" in reason


def test_an_overflow_changes_nothing(tmp_path):
    model = random_model("qwen3", torch.float16)
    model.save_pretrained(tmp_path)
    source, stream = streamed(tmp_path)
    with resident(source, stream) as block:
        found = found_in(source, block)["mlp.gate_proj"]
        before = {path: block.parameter(path).clone() for path in found.parameters}
        assert "overflow" in fold.apply(block, found, torch.full((found.width,), 1e6))
        assert not block.changed
        assert all(torch.equal(block.parameter(path), value) for path, value in before.items())


def test_a_trial_leaves_no_trace(tmp_path):
    save_random("qwen3", tmp_path)
    source, stream = streamed(tmp_path)
    path = "model.layers.0.mlp.up_proj.weight"
    with resident(source, stream) as block:
        before = block.parameter(path)
        with pytest.raises(RuntimeError), fold.with_values(block, {path: torch.zeros(96, 64)}):
            assert not block.parameter(path).any()
            raise RuntimeError
        assert block.parameter(path) is before and not block.changed


def test_channels_with_one_maker_share_their_statistic():
    rows = torch.tensor([0, 1, 0, 1, 2])
    found = Fold(Group(None, ("a",)), "v", ("v.weight",), rows, 4)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.shared(values, "amax").tolist() == [3, 4, 3, 4, 5]
    assert found.shared(values, "mean").tolist() == [2, 3, 2, 3, 5]


def test_row_maps_stay_inside_the_maker():
    for out, width in ((64, 64), (32, 64), (128, 64), (192, 64), (96, 64), (128, 48), (60, 64)):
        for maps in _row_maps(out, width):
            for rows in maps:
                assert len(rows) == width and rows.min() >= 0 and rows.max() < out


def test_eight_bits_are_rounded_from_what_was_not_rounded_before(tmp_path):
    """A rescaled bfloat16 weight is rounded once: to eight bits, not to sixteen first."""
    save_random("qwen3", tmp_path)
    source, stream = streamed(tmp_path)
    with stream.resident(0) as runner:
        groups = groups_by_linear(source)
        for scheme, exact in ((PRESETS["int8_dynamic"], True), (PRESETS["mxfp4_weight_only"], False)):
            layers = tuple(x for x in select(source, scheme).layers if x.block == 0)
            block = Block(source, 0, layers, groups, CPU, runner)
            layer = next(x for x in layers if x.module and x.module.endswith("gate_proj"))
            path = f"{layer.module}.weight"
            kept = block.parameter(path).bfloat16()
            value, columns = kept.float() * 1.1, torch.full((kept.shape[1],), 1.1)
            block._assign(path, kept)
            block.submodule(layer.module).weight.data = kept
            block.rescale({path: value}, [layer.module], columns)
            assert block.parameter(path).dtype == torch.bfloat16
            wanted = value if exact else value.bfloat16()
            assert torch.equal(block.weight(layer), wanted)
            block.replace(layer, kept)
            assert torch.equal(block.weight(layer), kept)
