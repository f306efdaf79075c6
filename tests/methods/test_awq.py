"""AWQ as a transform: on the built-in model, on mixtures, in front of every rounding."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from angelslim import pipeline
from angelslim.data.text import calibration_batches
from angelslim.methods.base import TRANSFORMS
from angelslim.methods.transform import awq
from angelslim.methods.transform.awq import AWQ
from angelslim.models.activations import ActivationStore
from angelslim.models.block import Block
from angelslim.models.experts import ExpertRunner
from angelslim.models.loading import model_class, open_model
from angelslim.models.select import groups_by_linear, select
from angelslim.models.walk import BlockStream
from angelslim.numerics.awq import Candidate
from angelslim.numerics.moments import Moments
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import PRESETS, with_group
from angelslim.plan import peak_memory
from families import config_of, save_random
from tiny import byte_tokenizer, job_for, save_qwen3

CPU = torch.device("cpu")
INT4 = PRESETS["int4"]
SCHEME = with_group(INT4, 32)
SHORT = ("dataset.num_samples=6", "dataset.max_seq_length=32")
QUANT = "compression.quantization"


@contextmanager
def first_block(folder, ids, scheme=SCHEME, index=0):
    source = open_model(folder)
    layers = select(source, scheme).in_block(index)
    stream = BlockStream(source, ids, ActivationStore(source.folder, 1 << 30), CPU)  # nothing is spilled
    stream.prepare(0)
    with stream.resident(index) as runner:
        owned = {n for e in stream.experts.values() for t in e.tensors for n in t.names}
        own = tuple(layer for layer in layers if layer.tensor not in owned)
        streamed = tuple(layer for layer in layers if layer.tensor in owned)
        yield stream, Block(source, index, own, groups_by_linear(source), CPU, runner, streamed=streamed)


def random_ids(lengths=(24, 17, 30)):
    return [torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]


def relative_error(block, exact) -> float:
    """What the block loses with its layers rounded to nearest, as a share of each token's size."""
    weights = {layer: block.weight(layer) for layer in block.layers}
    for layer, weight in weights.items():
        block.replace(layer, quantize(weight, layer.scheme.weight, weight.dtype).dequantize())
    with torch.no_grad():
        lost = sum(shares_lost(block.forward([sample]), output) for sample, output in exact.items())
    for layer, weight in weights.items():
        block.replace(layer, weight)
    return lost


def shares_lost(now, then) -> float:
    error = (now.float() - then.float()).square().sum(-1)
    return (error / then.float().square().sum(-1)).sum().item()


def test_it_is_a_transform_with_declared_options():
    assert TRANSFORMS.get("awq") is AWQ
    method = AWQ({})
    assert method.duo and not method.follows_original
    assert method.needs_data(PRESETS["int4"])
    assert not AWQ({"duo": False}).duo


def test_a_rounded_block_of_the_built_in_model_loses_less_and_the_function_stays():
    source = open_model("tiny-lm")
    ids = calibration_batches(pipeline.tokenizer_of(source.folder), None, samples=12, max_length=128)
    with first_block("tiny-lm", ids, INT4) as (_, block), torch.no_grad():
        exact = {sample: block.forward([sample]) for sample in range(12)}
        before = relative_error(block, exact)
        AWQ({}).process(block)
        assert block.changed and not block.results and not block.advanced
        assert relative_error(block, exact) < 0.97 * before
        for sample, output in exact.items():
            drift = (block.forward([sample]).float() - output.float()).norm() / output.float().norm()
            assert drift < 0.01  # the model is in bfloat16


def test_where_no_scale_is_best_nothing_changes(tmp_path, monkeypatch):
    save_random("qwen3", tmp_path)
    with first_block(tmp_path, random_ids()) as (_, block):
        monkeypatch.setattr(awq, "search", lambda *args, **_: [Candidate(torch.ones(1), 0, False)])
        AWQ({}).process(block)
        assert not block.changed


def test_a_mixtures_norm_router_and_experts_are_rescaled_together(tmp_path, monkeypatch):
    """The routed experts' weights judge the scale; what is handed on is theirs too."""
    save_random("qwen3_moe", tmp_path)
    with first_block(tmp_path, random_ids()) as (stream, block):
        loud = block.parameter("model.layers.0.post_attention_layernorm.weight")
        loud[:4] = 30.0  # a few channels that AWQ wants to protect
        before = {p: block.parameter(p).clone() for p in ("model.layers.0.mlp.gate.weight",)}
        AWQ({}).process(block)
        assert "model.layers.0.post_attention_layernorm.weight" in block.changed
        gate = "model.layers.0.mlp.gate.weight"
        scale = block.expert_scales["model.layers.0.mlp.experts"]
        assert torch.allclose(block.changed[gate], before[gate] * scale, rtol=1e-5)
        (experts,) = stream.experts.values()
        assert torch.equal(experts.scale, scale) and not torch.equal(scale, torch.ones(64))
        block.advance()
        part = ExpertRunner(experts, 0)
        placed = [layer for layer in block.streamed if layer.tensor in experts.tensors[0].names]
        assert len(placed) == 3
        expert = Block(block.source, 0, (), part.groups, CPU, part)
        AWQ({}).process(expert)  # no layers to be rounded: nothing to gain
        assert not expert.changed


@pytest.mark.parametrize("rounding", ["int4_rtn", "int4_gptq"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_whole_mixture_is_written_with_what_was_rescaled(family, rounding, tmp_path):
    folder = tmp_path / "model"
    config = config_of(family, vocab_size=272)
    torch.manual_seed(0)
    model_class(config)._from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    overrides = (f"{QUANT}.quant_helpers=[awq]", f"{QUANT}.quant_method.group_size=16", *SHORT)
    record = pipeline.run(job_for(folder, rounding, *overrides), tmp_path / "out")
    assert len(record.layers) == len(select(open_model(folder), with_group(INT4, 16)).layers)
    original, written = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    kept = [name for name in original if name in written]
    changed = {name for name in kept if not torch.equal(original[name], written[name])}
    assert any("layernorm" in name for name in changed)
    assert all("layernorm" in name or ".gate." in name for name in changed)  # norms, and routers behind them


def test_the_recipe_clips_and_needs_no_more_room_than_planned(tmp_path):
    folder = save_qwen3(tmp_path / "model")
    job = job_for(folder, "int4_awq", *SHORT)
    assert [type(each) for each in job.transforms] == [AWQ] and job.calibrates
    assert job.method.clips and not job.scheme.weight.symmetric
    assert peak_memory(job) > peak_memory(job_for(folder, "int4_rtn_asym", *SHORT))
    record = pipeline.run(job, tmp_path / "out")
    assert not record.warnings and all(layer.output_error is not None for layer in record.layers)


def test_moments_of_two_processes_decide_together(tmp_path, monkeypatch):
    merged = []
    monkeypatch.setattr(Moments, "merge", lambda self: merged.append(self))
    save_random("qwen3", tmp_path)
    with first_block(tmp_path, random_ids()) as (_, block):
        AWQ({}).process(block)
    assert len(merged) == 4
