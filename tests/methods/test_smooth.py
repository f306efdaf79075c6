"""SmoothQuant as a transform: outliers planted into a model, schemes, experts, and no room for harm."""

from __future__ import annotations

import pytest
import torch

from angelslim import pipeline
from angelslim.base import parallel
from angelslim.base.errors import ConfigError
from angelslim.lab.outliers import plant_outliers
from angelslim.methods.base import TRANSFORMS
from angelslim.methods.transform import _shared
from angelslim.methods.transform.smooth import Range, Smooth
from angelslim.models.activations import ActivationStore
from angelslim.models.block import Block
from angelslim.models.loading import open_model
from angelslim.models.select import groups_by_linear, select
from angelslim.models.walk import BlockStream
from angelslim.numerics.quantize import fake_quantize, quantize
from angelslim.numerics.scheme import PRESETS
from angelslim.reopen import load
from families import save_random
from tiny import job_for, save_qwen3

CPU = torch.device("cpu")
INT8 = PRESETS["int8_dynamic"]
QUANT = "compression.quantization"


def random_ids(lengths=(24, 17, 30)):
    return [torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]


def smoothed(folder, ids, method, scheme=INT8):
    """Return the parameters that the transform changes, block after block."""
    source = open_model(folder)
    selection, groups = select(source, scheme), groups_by_linear(source)
    stream = BlockStream(source, ids, ActivationStore(source.folder, 1 << 30), CPU)
    stream.prepare(0)
    changed = {}
    for index in range(len(source.structure.blocks)):
        with stream.resident(index) as runner:
            block = Block(source, index, selection.in_block(index), groups, CPU, runner)
            method.process(block)
            changed |= block.changed
            assert not block.results and not block.advanced
            block.advance()
    return changed


@torch.no_grad()
def logits(folder, ids, changed=None, rounded=False):
    """The model's logits, with other parameters, and with its linears in INT8."""
    model = load(folder)
    for name, parameter in model.named_parameters():
        if changed and name in changed:
            parameter.copy_(changed[name])
    if rounded:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight.copy_(quantize(module.weight, INT8.weight).dequantize())
                module.register_forward_pre_hook(lambda _m, args: (fake_quantize(args[0], INT8.input),))
    return torch.cat([model(input_ids=each).logits.float()[0] for each in ids])


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """A float32 model of two blocks with planted outliers."""
    folder = tmp_path_factory.mktemp("planted")
    save_qwen3(folder / "plain", dtype=torch.float32)
    return plant_outliers(folder / "plain", folder / "outliers", factor=64.0, channels=4)


def test_it_is_a_transform_with_declared_options():
    assert TRANSFORMS.get("smooth") is Smooth
    assert Smooth({}).alpha == 0.5 and Smooth({"alpha": "search"}).alpha is None
    assert Smooth({}).needs_data(INT8)
    with pytest.raises(ConfigError, match=r"alpha is 1\.5"):
        Smooth({"alpha": 1.5})


@pytest.mark.parametrize("alpha", [0.5, 0.8, "search"])
def test_the_function_stays_and_int8_loses_less(outliers, alpha):
    ids = random_ids()
    exact = logits(outliers, ids)
    changed = smoothed(outliers, ids, Smooth({"alpha": alpha}))
    now = logits(outliers, ids, changed)
    assert (now - exact).abs().max() < 1e-5 * exact.abs().max()
    plain = (logits(outliers, ids, rounded=True) - exact).square().mean()
    smooth = (logits(outliers, ids, changed, rounded=True) - exact).square().mean()
    assert smooth < 0.2 * plain


def test_nothing_is_changed_where_no_scale_helps(outliers, monkeypatch):
    from angelslim.numerics import smooth

    monkeypatch.setattr(smooth, "ALPHAS", ())
    assert not smoothed(outliers, random_ids(), Smooth({"alpha": "search"}))


def test_a_per_tensor_scheme_keeps_the_rows_of_its_makers(outliers, caplog):
    caplog.set_level("INFO", "angelslim")
    changed = smoothed(outliers, random_ids(), Smooth({"alpha": 0.5}), PRESETS["fp8_static"])
    assert any(name.endswith("layernorm.weight") for name in changed)
    assert not any(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    said = [line for line in caplog.messages if _shared.TIED in line]
    assert len(said) == 2  # once for o_proj and once for down_proj, not for every block


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gemma3_text", "phi3"])
def test_families_keep_their_function(family, tmp_path):
    save_random(family, tmp_path)
    ids = random_ids()
    source = open_model(tmp_path)
    stream = BlockStream(source, ids, ActivationStore(tmp_path, 1 << 30), CPU)
    stream.prepare(0)
    selection, groups = select(source, INT8), groups_by_linear(source)
    with stream.resident(0) as runner, torch.no_grad():
        own = tuple(layer for layer in selection.in_block(0) if layer.module is not None)
        block = Block(source, 0, own, groups, CPU, runner)
        before = [block.forward([sample]) for sample in range(3)]
        Smooth({"alpha": 0.5}).process(block)
        assert block.changed
        for sample, then in enumerate(before):
            assert (block.forward([sample]) - then).abs().max() < 1e-5 * then.abs().max()


def test_ranges_are_the_same_in_any_batches_and_processes(monkeypatch):
    values = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = Range(8, 0, CPU), Range(8, 4, CPU)
    whole.update(values)
    for part in values.split(25):
        parts.update(part)
    parts.update(values[:0])
    assert torch.equal(whole.amax, parts.amax) and torch.equal(whole.amax, values.abs().amax(0))
    assert 8 <= len(parts.tokens) <= 12
    assert len(whole.tokens) == 0
    monkeypatch.setattr(parallel, "highest", lambda value: value * 2)
    monkeypatch.setattr(parallel, "gathered", lambda value: [value, value])
    count = len(parts.tokens)
    parts.merge()
    assert len(parts.tokens) == 2 * count and torch.equal(parts.amax, 2 * whole.amax)


@pytest.mark.parametrize("recipe", ["int8_smooth", "int8_smooth_gptq"])
def test_the_recipes_run(recipe, outliers, tmp_path):
    job = job_for(outliers, recipe, "dataset.num_samples=12", "dataset.max_seq_length=32")
    assert [type(each) for each in job.transforms] == [Smooth]
    record = pipeline.run(job, tmp_path / "out")
    assert record.scheme == str(INT8) and not record.warnings
    fixed = job_for(outliers, recipe, f"{QUANT}.smooth_alpha=0.8")
    assert fixed.transforms[0].alpha == 0.8
