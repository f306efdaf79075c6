"""Experts are streamed one at a time, and the block computes what it would compute with all of them resident."""

from __future__ import annotations

import pytest
import torch

from angelslim.models.activations import ActivationStore
from angelslim.models.experts import ENOUGH, ExpertRunner, streamable
from angelslim.models.loading import Source, open_model
from angelslim.models.stacks import unstacked
from angelslim.models.walk import BlockStream
from families import random_model, save_random

FAMILIES = ("qwen3_moe", "deepseek_v3", "hunyuan_v1_moe", "hy_v3", "glm4_moe")
STACKED = ("qwen3_vl_moe", "llama4_text")
CPU = torch.device("cpu")


def samples(count: int = 4, length: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 80, (1, length), generator=generator) for _ in range(count)]


def opened(family: str, tmp_path, **options) -> tuple[Source, BlockStream]:
    save_random(family, tmp_path / "model")
    source = unstacked(open_model(tmp_path / "model"))
    stream = BlockStream(source, samples(), ActivationStore(tmp_path / "store", 1 << 24), CPU, **options)
    stream.prepare(0)
    return source, stream


def mixture(source: Source) -> int:
    """The first block with experts."""
    return next(i for i, block in enumerate(source.structure.blocks) if streamable(source, block))


@pytest.mark.parametrize("family", FAMILIES + STACKED)
def test_every_mixture_of_the_list_can_be_streamed(family, tmp_path):
    save_random(family, tmp_path / "model")
    source = unstacked(open_model(tmp_path / "model"))
    (experts,) = streamable(source, source.structure.blocks[mixture(source)]).values()
    assert [expert.index for expert in experts] == [0, 1, 2, 3]
    assert [name.rpartition("experts.")[2] for name in experts[2].first] == [
        "2.gate_proj.weight",
        "2.up_proj.weight",
    ]
    assert experts[2].last.endswith("experts.2.down_proj.weight")


def test_an_expert_sees_the_tokens_the_router_sent_and_gives_what_the_stack_gives(tmp_path):
    _source, stream = opened("qwen3_moe", tmp_path)
    whole = random_model("qwen3_moe").model.layers[0].mlp.experts
    with stream.resident(0):
        stream.run(0, {}, keep=True)
        (experts,) = stream.experts.values()
        for tensors in experts.tensors:
            seen: list[torch.Tensor] = []
            runner = ExpertRunner(experts, tensors.index)
            runner.run({tensors.module(tensors.first[0]): seen.append}, keep=True)
            sent = sum(int((routing.index == tensors.index).sum()) for routing in experts.asked.values())
            assert runner.use.tokens == sent and runner.use.of == 48
            assert sum(map(len, seen)) == 48  # few tokens in all, so every expert reads all of them
        for entry, routing in experts.asked.items():
            with torch.no_grad():
                expected = whole(routing.hidden, routing.index, routing.weight)
            torch.testing.assert_close(experts.answers[entry], expected, atol=1e-6, rtol=1e-5)


def test_tokens_of_others_enter_statistics_up_to_enough_and_never_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("angelslim.models.experts.ENOUGH", 30)
    _source, stream = opened("qwen3_moe", tmp_path)
    with stream.resident(0):
        stream.run(0, {}, keep=True)
        (experts,) = stream.experts.values()
        for routing in experts.asked.values():  # the router forgets expert 3
            routing.index[routing.index == 3] = 2
        runner = ExpertRunner(experts, 3)
        seen: list[torch.Tensor] = []
        before = [answer.clone() for answer in experts.answers.values()]
        runner.run({experts.tensors[3].module(experts.tensors[3].last): seen.append}, keep=True)
        assert runner.use.tokens == 0 and "30 of others" in runner.use.note
        assert sum(map(len, seen)) == 30
        assert all(map(torch.equal, before, experts.answers.values()))
    assert ENOUGH > 30


def test_the_original_model_travels_through_the_experts_too(tmp_path):
    source, stream = opened("deepseek_v3", tmp_path, follow_original=True)
    index = mixture(source)
    for block in range(index):
        with stream.resident(block):
            stream.run(block, {}, keep=True)
            for entry in range(4):
                stream.store.put(block + 1, 4 + entry, stream.store.get(block + 1, entry))
    changed = f"{source.structure.blocks[index]}.self_attn.o_proj"
    with stream.resident(index):
        stream.compare(index, {})
        linear = source.model.get_submodule(changed)
        linear.weight = torch.nn.Parameter(linear.weight * 1.5, requires_grad=False)
        stream.run(index, {}, keep=True)
        pairs: list[tuple] = []
        (experts,) = stream.experts.values()
        for tensors in experts.tensors:
            runner = ExpertRunner(experts, tensors.index)
            head = tensors.module(tensors.first[0])
            runner.compare({head: lambda now, then: pairs.append((now, then))})
            runner.run({}, keep=True)
        stream.finish(index)
    matched = [(now, then) for now, then in pairs if then is not None]
    assert matched and all(now.shape == then.shape for now, then in matched)
    assert any((now - then).abs().max() > 1e-3 for now, then in matched)  # the weight was changed
    plain = random_model("deepseek_v3")
    for sample, ids in enumerate(samples()):
        seen: list[torch.Tensor] = []
        hook = plain.model.layers[index].register_forward_hook(
            lambda _m, _a, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            plain(input_ids=ids, use_cache=False)
        hook.remove()
        torch.testing.assert_close(stream.store.get(index + 1, 4 + sample), seen[0], atol=1e-5, rtol=0)
        assert (stream.store.get(index + 1, sample) - seen[0]).abs().max() > 1e-3


def test_scaled_inputs_are_scaled_when_an_expert_is_read(tmp_path):
    source, stream = opened("qwen3_moe", tmp_path)
    scale = torch.linspace(0.5, 2, 64)
    with stream.resident(0) as runner:
        (path,) = stream.experts
        assert runner.scale_expert_inputs(path, scale) and not runner.scale_expert_inputs("model", scale)
        expert = stream.experts[path].load(1)
    name = stream.source.tensors_of[f"{path}.down_proj"][1].replace("down", "gate")
    torch.testing.assert_close(expert.gate_proj.weight, source.checkpoint.read(name) * scale)


def test_sorted_experts_read_the_tokens_that_were_sent_and_no_zeros(tmp_path):
    """Llama 4 calls its experts with every token once for each of them, times the router's weight or zero."""
    source, stream = opened("llama4_text", tmp_path)
    with stream.resident(0):
        stream.through(0)
    whole = random_model("llama4_text").model.layers[1].feed_forward
    calls: list[torch.Tensor] = []
    with stream.resident(1):
        stand_in = source.model.model.layers[1].feed_forward.experts
        forward = stand_in.forward
        stand_in.forward = lambda hidden: (calls.append(hidden.clone()), forward(hidden))[1]
        stream.run(1, {}, keep=True)
        stand_in.forward = forward
        (experts,) = stream.experts.values()
        total = 0
        for tensors in experts.tensors:
            runner = ExpertRunner(experts, tensors.index)
            seen: list[torch.Tensor] = []
            runner.run({tensors.module(tensors.first[0]): seen.append}, keep=True)
            total += runner.use.tokens
            assert runner.use.of == 48 and all(rows.any(dim=1).all() for rows in seen)
        assert total == 48  # each token goes to one expert
        for entry, call in enumerate(calls):
            asked = experts.asked[entry]
            with torch.no_grad():
                expected = whole.experts(call)
            torch.testing.assert_close(
                asked.placed(experts.answers[entry], call), expected, atol=1e-6, rtol=1e-5
            )


def test_sorted_experts_are_matched_with_the_original_by_token(tmp_path):
    _source, stream = opened("llama4_text", tmp_path, follow_original=True)
    with stream.resident(0):
        stream.through(0)
        for entry in range(4):
            stream.store.put(1, 4 + entry, stream.store.get(1, entry) * 1.001)
    with stream.resident(1):
        stream.compare(1, {})
        stream.run(1, {}, keep=True)
        (experts,) = stream.experts.values()
        pairs: list[tuple] = []
        for tensors in experts.tensors:
            runner = ExpertRunner(experts, tensors.index)
            runner.compare({tensors.module(tensors.first[0]): lambda now, then: pairs.append((now, then))})
    matched = [(now, then) for now, then in pairs if then is not None]
    assert sum(len(now) for now, _ in matched) >= 40  # nearly all go to the same expert
    for now, then in matched:
        torch.testing.assert_close(now, then, atol=0.05, rtol=0.05)  # the same tokens, hardly changed
