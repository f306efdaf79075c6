from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim.analyze import sensitivity as module
from angelslim.analyze.sensitivity import sensitivity
from angelslim.base.errors import ConfigError
from angelslim.config.recipe import load
from angelslim.job import prepare
from angelslim.models.select import Choice, select
from angelslim.numerics.quantize import fake_quantize, quantize
from angelslim.report.sensitivity import recipe_lines
from angelslim.work import calibration_samples
from families import save_random
from test_work import GROUP, texts
from tiny import byte_tokenizer, job_for

SHORT = ("dataset.num_samples=3", "dataset.max_seq_length=24")


def outputs(folder, samples, block, change=None):
    """A block's outputs and the logits in float32, computed by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if change is not None:
        change(model)
    seen = []
    model.model.layers[block].register_forward_hook(
        lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        logits = [model(**sample, use_cache=False).logits[0].double() for sample in samples]
    return seen, logits


def relative(changed, exact):
    change = sum(
        (one.double() - other.double()).square().sum() for one, other in zip(changed, exact, strict=True)
    )
    return (change / sum(other.double().square().sum() for other in exact)).sqrt().item()


def divergence(changed, exact):
    values = []
    for one, other in zip(changed, exact, strict=True):
        p, q = other.log_softmax(-1), one.log_softmax(-1)
        values.append((p.exp() * (p - q)).sum(-1).mean().item())
    return sum(values) / len(values)


def test_a_layer_costs_what_the_whole_model_says(deep_folder):
    job = job_for(deep_folder, "int8_dynamic", *SHORT)
    found = sensitivity(job, recipe="int8_dynamic", kl=True)
    assert len(found.layers) == 42 and found.kl_samples == 3
    samples = calibration_samples(job)
    for name, block in (("self_attn.v_proj", 0), ("mlp.down_proj", 4)):
        path = f"model.layers.{block}.{name}"
        scheme = next(layer.scheme for layer in job.selection.layers if layer.name == path)

        def change(model, path=path, scheme=scheme):
            linear = model.get_submodule(path)
            linear.weight.data = quantize(linear.weight.data, scheme.weight).dequantize()
            linear.register_forward_pre_hook(
                lambda _m, args: (fake_quantize(args[0], scheme.input), *args[1:])
            )

        exact, logits = outputs(deep_folder, samples, block)
        now, moved = outputs(deep_folder, samples, block, change)
        layer = next(layer for layer in found.layers if layer.name == path)
        assert layer.block_error == pytest.approx(relative(now, exact), rel=1e-3)
        assert layer.kl == pytest.approx(divergence(moved, logits), rel=0.02, abs=1e-9)
        assert layer.kl_stderr > 0


def test_all_layers_together_are_the_compressed_model(tiny_folder):
    job = job_for(tiny_folder, "int4_rtn", *SHORT)
    found = sensitivity(job, recipe="int4_rtn", kl=True)
    samples = calibration_samples(job)
    weights = {layer.tensor: layer for layer in job.selection.layers}

    def change(model):
        for tensor, layer in weights.items():
            linear = model.get_submodule(layer.module)
            stored = job.source.checkpoint.read(tensor)
            linear.weight.data = quantize(stored, layer.scheme.weight, stored.dtype).dequantize()

    _, logits = outputs(tiny_folder, samples, 0)
    _, moved = outputs(tiny_folder, samples, 0, change)
    assert found.together == pytest.approx(divergence(moved, logits), rel=1e-3)
    kls = [layer.kl for layer in found.layers]
    assert kls == sorted(kls, reverse=True)


def test_experts_are_rounded_together(tmp_path):
    folder = tmp_path / "model"
    save_random("qwen3_moe", folder)
    byte_tokenizer().save_pretrained(folder)
    job = job_for(folder, "int4_rtn", *SHORT, GROUP, texts(tmp_path))
    found = sensitivity(job, recipe="int4_rtn", kl=True)
    assert len(found.layers) == 14
    layer = next(x for x in found.layers if x.name == "model.layers.1.mlp.experts.*.gate_proj")
    tensors = load_file(folder / "model.safetensors")
    for expert in job.selection.layers:
        if expert.name in layer.members:
            stored = tensors[expert.tensor]
            tensors[expert.tensor] = (
                quantize(stored, expert.scheme.weight, stored.dtype).dequantize().to(stored.dtype)
            )
    assert len(layer.members) == 4
    other = tmp_path / "rounded"
    save_random("qwen3_moe", other)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    samples = calibration_samples(job)
    exact, logits = outputs(folder, samples, 1)
    now, moved = outputs(other, samples, 1)
    assert layer.block_error == pytest.approx(relative(now, exact), rel=1e-2)
    assert layer.kl == pytest.approx(divergence(moved, logits), rel=0.05)
    assert "experts" in layer.note
    assert any(entry.endswith(".mlp.experts") for entry in sensitivity(job, recipe="x", keep=6).suggestion)


def test_the_suggestion_spares_what_it_names(tiny_folder, tmp_path):
    recipe = {
        "extends": "int4_rtn",
        "compression": {"quantization": {"ignore_layers": ["lm_head", "0.self_attn.o_proj"]}},
    }
    job = job_for(tiny_folder, recipe, *SHORT)
    found = sensitivity(job, recipe="int4_rtn", keep=2)
    assert len(found.layers) == 13 and found.suggestion[:2] == ["lm_head", "0.self_attn.o_proj"]
    (tmp_path / "spared.yaml").write_text(recipe_lines(found))
    spared = prepare(load(tmp_path / "spared.yaml", ["evaluation.enabled=false"]), tiny_folder)
    left = {layer.name for layer in spared.selection.layers}
    before = {layer.name for layer in job.selection.layers}
    assert before - left == set(found.kept)
    roles = [name.rpartition(".")[2] for name in found.kept]
    for together in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}):
        assert together <= set(roles) or not together & set(roles)
    weights = {layer.name: layer.shape[0] * layer.shape[1] for layer in job.selection.layers}
    total = sum(weights.values())
    kept = sum(weights[name] for name in found.kept)
    assert found.bits == pytest.approx((4.125, 4.125 + (16 - 4.125) * kept / total))


def test_nothing_to_spare(tiny_folder):
    found = sensitivity(job_for(tiny_folder, "int8_dynamic", *SHORT), recipe="int8_dynamic", keep=0)
    assert found.kept == [] and found.bits[0] == found.bits[1]
    assert found.together is None and all(layer.kl is None for layer in found.layers)
    errors = [layer.block_error for layer in found.layers]
    assert errors == sorted(errors, reverse=True) and min(errors) > 0


def test_static_scales_are_those_of_the_samples(tiny_folder):
    found = sensitivity(job_for(tiny_folder, "fp8_static", *SHORT), recipe="fp8_static")
    assert (
        0
        < min(layer.block_error for layer in found.layers)
        < max(layer.block_error for layer in found.layers)
        < 0.2
    )


def test_a_head_alone_is_refused(tiny_folder, monkeypatch):
    job = job_for(tiny_folder, "int8_dynamic", *SHORT)
    job.selection = select(job.source, job.scheme, Choice(ignore=("model.layers",)))
    with pytest.raises(ConfigError, match="rounds no layer of the decoder blocks"):
        sensitivity(job, recipe="int8_dynamic")


def test_the_source_is_left_as_it_was(tiny_folder):
    job = job_for(tiny_folder, "int4_rtn", *SHORT)
    sensitivity(job, recipe="int4_rtn", kl=True)
    assert all(value.is_meta for value in job.source.model.parameters())
    assert job.source.dtype == torch.bfloat16


def test_equal_runs_give_equal_files(tiny_folder):
    one, other = (sensitivity(job_for(tiny_folder, "int4_rtn", *SHORT), recipe="int4_rtn") for _ in range(2))
    assert one.to_json() == other.to_json()
    assert json.loads(one.to_json())["tokens"] == one.tokens > 0
    assert module.harm(one.layers[0]) == one.layers[0].block_error ** 2
