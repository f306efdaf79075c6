"""GPTQ and GPTAQ as methods: on the built-in model, killed and continued, with any scheme."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import angelslim
from angelslim import pipeline
from angelslim.base.errors import ConfigError
from angelslim.methods.base import PTQ
from angelslim.methods.ptq._shared import head_of, round_weight
from angelslim.methods.ptq.gptq import (
    ALL_DEAD,
    DAMPED,
    DEAD,
    FACTORING,
    FEW,
    GPTQ,
    OUTSIDE,
    SINGULAR,
    UNREACHED,
)
from angelslim.models.activations import ActivationStore
from angelslim.models.block import Block
from angelslim.models.checkpoint import UnitWriter
from angelslim.models.loading import open_model
from angelslim.models.select import groups_by_linear, select
from angelslim.models.walk import BlockStream
from angelslim.numerics.compensate import Hessian, factorize, gptq, output_error
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import PRESETS, with_group
from angelslim.plan import activation_bytes, peak_memory
from angelslim.reopen import load
from families import save_random
from tiny import Killed, byte_tokenizer, dies_at, fingerprints, job_for, save_qwen3

CPU = torch.device("cpu")
QUANT = "compression.quantization"
ENOUGH = "dataset.num_samples=12"  # more tokens than any layer has inputs
SHORT = ("dataset.num_samples=6", "dataset.max_seq_length=32", "global.activation_budget=20KB")


def gptq_job(model, texts, recipe="int4_gptq", *overrides):
    return job_for(model, recipe, *SHORT, f"dataset.data_path={texts}", *overrides)


def test_it_is_a_method_with_declared_options():
    assert PTQ.get("gptq") is GPTQ
    method = GPTQ({})
    assert method.act_order and not method.follows_original
    assert all(method.needs_data(scheme) for scheme in PRESETS.values())
    assert GPTQ({"gptaq": True}).follows_original and not GPTQ({"actorder": False}).act_order
    with pytest.raises(ConfigError, match=r"damp is 2\.0"):
        GPTQ({"damp": 2})
    with pytest.raises(ConfigError, match="Did you mean 'absmax'"):
        GPTQ({"observer": "absmaxx"})


# ------------------------------------------------------------------------------------- the built-in model


@pytest.fixture(scope="module")
def calibrated():
    """The first two blocks of tiny-lm, rounded by GPTQ; per layer its result, and the Hessian it saw."""
    from angelslim.data.text import calibration_batches

    source = open_model("tiny-lm")
    tokenizer = pipeline.tokenizer_of(source.folder)
    ids = calibration_batches(tokenizer, None, samples=12, max_length=128)
    scheme = with_group(PRESETS["int4"], 32)
    selection, groups, method = select(source, scheme), groups_by_linear(source), GPTQ({})
    stream = BlockStream(source, ids, ActivationStore(source.folder, 1 << 30), CPU)  # nothing is spilled
    stream.prepare(0)
    seen = {}
    for index in range(2):
        with stream.resident(index) as runner:
            block = Block(source, index, selection.in_block(index), groups, CPU, runner)
            hessians = {layer.name: Hessian(layer.shape[1]) for layer in block.layers}
            weights = {layer.name: block.weight(layer).clone() for layer in block.layers}
            block.collect({name: hessian.update for name, hessian in hessians.items()})
            method.process(block)
        for result in block.results:
            name = result.layer.name
            seen[name] = (weights[name], result, hessians[name].matrix)
    return seen


def test_every_layer_loses_less_of_its_output_than_by_rounding(calibrated):
    assert len(calibrated) == 14
    for name, (weight, result, squares) in calibrated.items():
        rounded = quantize(weight, result.weight.quant, torch.bfloat16)
        error = output_error(weight, result.weight, squares)
        assert error < output_error(weight, rounded, squares), name
        assert result.record.output_error == pytest.approx(error, rel=1e-4)
        assert torch.equal(result.weight.scale, rounded.scale)  # static: those of the original weight
        assert result.weight.scale.dtype == torch.bfloat16 and result.record.note == ""


def test_the_model_stays_closer_to_the_original(tmp_path):
    """Both against rounding, on text that calibration did not see; more samples than a test has give more."""
    from angelslim.data import builtin

    tokenizer = pipeline.tokenizer_of(open_model("tiny-lm").folder)
    text = "\n".join(builtin.text("evaluation", 20_000))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:2048]).view(-1, 256)
    settings = ("dataset.num_samples=32", "dataset.max_seq_length=256")

    def log_probabilities(model):
        with torch.inference_mode():
            return model(input_ids=ids).logits.float().log_softmax(-1)

    original = log_probabilities(load("tiny-lm"))
    lost = {}
    for recipe in ("int4_rtn", "int4_gptq", "int4_gptaq"):
        pipeline.run(job_for("tiny-lm", recipe, *settings), tmp_path / recipe)
        after = log_probabilities(angelslim.load(tmp_path / recipe))
        lost[recipe] = (original.exp() * (original - after)).sum(-1).mean().item()
    assert lost["int4_gptq"] < 0.88 * lost["int4_rtn"]
    assert lost["int4_gptaq"] < 0.88 * lost["int4_rtn"]


# ----------------------------------------------------------------------------------------------- schemes

SCHEMES = {
    "W int4 per-group 32 asymmetric": {"quant_method": {"group_size": 32, "zero_point": True}},
    "W int4 per-channel": {"quant_method": {"weight": "per-channel"}},
    "W int8 per-channel, A int8 per-token dynamic": {"scheme": "int8_dynamic"},
    "W fp8_e4m3 per-channel, A fp8_e4m3 per-token dynamic": {"scheme": "fp8_dynamic"},
    "W fp8_e4m3 per-block 128x128, A fp8_e4m3 per-group 128 dynamic": {"scheme": "fp8_block"},
    "W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static": {"scheme": "fp8_static"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["int4_gptq", "int4_gptaq"])
def test_any_scheme_gives_a_checkpoint_that_opens(scheme, name, tiny_folder, texts, tmp_path):
    recipe = {"compression": {"quantization": {"name": name, **SCHEMES[scheme]}}}
    record = pipeline.run(gptq_job(tiny_folder, texts, recipe, ENOUGH), tmp_path / "out")
    assert len(record.layers) == 14 and record.warnings == []
    assert {layer.scheme for layer in record.layers} == {scheme}
    assert all(0 < layer.output_error < 0.2 for layer in record.layers)
    with torch.inference_mode():
        assert load(tmp_path / "out")(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()


def test_static_scales_are_shared_and_calibrated(tiny_folder, texts, tmp_path):
    """Weight scales, and the input scales of the first block, are those of rounding: nothing came before it."""
    results = {}
    for name in ("fp8_static", "int4_gptq"):
        recipe = {"compression": {"quantization": {"name": name, "scheme": "fp8_static"}}}
        damp = () if name == "fp8_static" else (f"{QUANT}.quant_method.damp=0.01",)
        pipeline.run(gptq_job(tiny_folder, texts, recipe, *damp), tmp_path / name)
        results[name] = load_file(tmp_path / name / "model.safetensors")
    plain, gptq = results.values()
    scales = [name for name in plain if name.endswith("_scale")]
    assert len(scales) == 28 and plain.keys() == gptq.keys()
    assert all(torch.equal(plain[name], gptq[name]) for name in scales if name.endswith("weight_scale"))
    assert all(torch.equal(plain[name], gptq[name]) for name in scales if ".layers.0." in name)
    assert any(not torch.equal(plain[name], gptq[name]) for name in scales if ".layers.1." in name)


@pytest.mark.parametrize("words", ["actorder=false", "damp=0.5", "group_size=32"])
def test_options_change_the_codes(words, tiny_folder, texts, tmp_path):
    for name, extra in (("plain", ()), ("changed", (f"{QUANT}.quant_method.{words}",))):
        pipeline.run(gptq_job(tiny_folder, texts, "int4_gptq", *extra), tmp_path / name)
    assert fingerprints(tmp_path / "plain") != fingerprints(tmp_path / "changed")


def test_no_alpha_is_gptq(tiny_folder, texts, tmp_path):
    for recipe, alpha in (("int4_gptq", None), ("int4_gptaq", 0), ("int4_gptaq", 1)):
        extra = () if alpha is None else (f"{QUANT}.quant_method.alpha={alpha}",)
        pipeline.run(gptq_job(tiny_folder, texts, recipe, *extra), tmp_path / f"{recipe}{alpha}")
    found = [fingerprints(folder)["model.safetensors"] for folder in sorted(tmp_path.iterdir())]
    assert found[0] == found[2] != found[1]  # alpha 0, alpha 1, GPTQ


# ---------------------------------------------------------------------------------- killed and continued


POINTS = {
    "between a unit and its record": (UnitWriter, "write", 3, True),
    "after a record, before the activations": (ActivationStore, "commit", 2, False),
    "after the activations, before the marker": (ActivationStore, "commit", 2, True),
    "after the marker, before the old activations go": (ActivationStore, "forget", 3, False),
    "while a block runs": (ActivationStore, "put", 6 * 4 + 8, True),
}


@pytest.fixture(scope="module", params=["int4_gptq", "int4_gptaq"])
def whole(request, deep_folder, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    pipeline.run(gptq_job(deep_folder, texts, request.param), out)
    return request.param, fingerprints(out)


@pytest.mark.parametrize("point", POINTS)
def test_death_between_any_two_steps_gives_the_same_bytes(
    point, whole, deep_folder, texts, tmp_path, monkeypatch
):
    recipe, expected = whole
    owner, attribute, when, after = POINTS[point]
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, dies_at(getattr(owner, attribute), when, after))
        with pytest.raises(Killed):
            pipeline.run(gptq_job(deep_folder, texts, recipe), tmp_path / "out")
    written: list[str] = []
    write = UnitWriter.write
    monkeypatch.setattr(UnitWriter, "write", lambda *args: (written.append(args[1]), write(*args))[1])
    pipeline.run(gptq_job(deep_folder, texts, recipe), tmp_path / "out")
    assert fingerprints(tmp_path / "out") == expected
    assert 0 < len([name for name in written if name.startswith("block")]) < 6


def test_half_of_the_activations_are_not_enough(whole, deep_folder, texts, tmp_path, monkeypatch):
    """A generation without the original's half is started over, not continued with the wrong inputs."""
    recipe, expected = whole
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "forget", dies_at(ActivationStore.forget, 3, True))
        with pytest.raises(Killed):
            pipeline.run(gptq_job(deep_folder, texts, recipe), tmp_path / "out")
    files = sorted((tmp_path / "out.partial" / "activations").rglob("*.safetensors"))
    assert len(files) == (12 if recipe == "int4_gptaq" else 6)
    files[-1].unlink()
    pipeline.run(gptq_job(deep_folder, texts, recipe), tmp_path / "out")
    assert fingerprints(tmp_path / "out") == expected


def test_what_the_last_block_gives_is_not_kept_nor_missed(whole, deep_folder, texts, tmp_path, monkeypatch):
    """A run that died after its last block goes on from there, without activations."""
    recipe, expected = whole

    def dying(*_args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_assemble", dying)
        with pytest.raises(Killed):
            pipeline.run(gptq_job(deep_folder, texts, recipe), tmp_path / "out")
    assert not list((tmp_path / "out.partial" / "activations").rglob("*.safetensors"))
    monkeypatch.setattr(UnitWriter, "write", dying)  # no unit is made again
    pipeline.run(gptq_job(deep_folder, texts, recipe), tmp_path / "out")
    assert fingerprints(tmp_path / "out") == expected


# --------------------------------------------------------------------------- what cannot be done is said


def test_every_expert_has_its_own_hessian(tmp_path):
    save_random("qwen3_moe", tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = ("dataset.num_samples=2", "dataset.max_seq_length=16", f"{QUANT}.quant_method.group_size=32")
    (tmp_path / "texts.jsonl").write_text(
        '{"text": "!!!!!!!!!!!!!!!"}\n' * 2
    )  # ids below the vocabulary of 96
    job = job_for(tmp_path / "model", "int4_gptq", *words, f"dataset.data_path={tmp_path / 'texts.jsonl'}")
    record = pipeline.run(job, tmp_path / "out")
    experts = [layer for layer in record.layers if ".experts." in layer.name]
    assert len(experts) == 24 and all(layer.output_error is not None for layer in experts)
    assert [use.expert for use in record.experts] == [0, 1, 2, 3] * 2
    assert sum(use.tokens for use in record.experts) == 2 * sum(
        use.of for use in record.experts if use.expert == 0
    )  # two of four experts a token


def test_a_head_outside_the_blocks_is_rounded_and_said(texts, tmp_path):
    folder = save_qwen3(tmp_path / "model", tie_word_embeddings=False)
    job = gptq_job(folder, texts, "int4_gptq", ENOUGH, f"{QUANT}.quantize_lm_head=true")
    assert pipeline.run(job, tmp_path / "out").warnings == [f"lm_head: {OUTSIDE}."]


def test_a_warning_survives_a_restart(texts, tmp_path, monkeypatch):
    folder = save_qwen3(tmp_path / "model", tie_word_embeddings=False)
    words = ("int4_gptq", ENOUGH, f"{QUANT}.quantize_lm_head=true")

    def dying(*_args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_assemble", dying)
        with pytest.raises(Killed):
            pipeline.run(gptq_job(folder, texts, *words), tmp_path / "out")
    assert pipeline.run(gptq_job(folder, texts, *words), tmp_path / "out").warnings == [
        f"lm_head: {OUTSIDE}."
    ]


def results_with(hessian_of, tiny_folder, method: GPTQ | None = None) -> list:
    """Process one block of a model, with Hessians of the test's own making."""
    source = open_model(tiny_folder)
    layers = select(source, PRESETS["int4"]).in_block(0)
    block = Block(source, 0, layers, groups_by_linear(source), CPU)
    method = method or GPTQ({})
    for layer in layers:
        method._quantize_group(block, [layer], {head_of(block, layer): hessian_of(layer)}, {})
    return block.results


def total_loss(method, hessian_of, tiny_folder) -> float:
    """Return what all layers of that block lose of their outputs together."""
    return sum(result.record.output_error for result in results_with(hessian_of, tiny_folder, method))


@pytest.mark.parametrize(
    "tokens, note, rounded",
    [
        (torch.empty(0, 1), UNREACHED, True),
        (torch.full((4, 1), torch.nan), SINGULAR, True),
        (torch.zeros(4, 1), ALL_DEAD, True),
        (torch.ones(1, 1), FEW, False),  # one token for all inputs: damping makes it work
    ],
)
def test_a_hessian_without_a_factor_is_rounded_and_said(tokens, note, rounded, tiny_folder):
    def hessian_of(layer):
        hessian = Hessian(layer.shape[1])
        hessian.update(tokens.expand(-1, layer.shape[1]))
        return hessian

    for result in results_with(hessian_of, tiny_folder):
        assert result.record.note == note
        weight = open_model(tiny_folder).checkpoint.read(result.layer.tensor)
        plain = quantize(weight, PRESETS["int4"].weight, torch.bfloat16)
        assert torch.equal(result.weight.codes, plain.codes) == rounded


def test_inputs_that_are_always_zero_are_said(tiny_folder):
    def hessian_of(layer):
        hessian = Hessian(layer.shape[1])
        hessian.update(torch.eye(layer.shape[1])[1:].repeat(2, 1))  # nothing on the first input
        return hessian

    assert {result.record.note for result in results_with(hessian_of, tiny_folder)} == {DEAD}


def test_more_damping_than_usual_is_said(tiny_folder):
    def hessian_of(layer):
        hessian = Hessian(layer.shape[1])
        hessian.update(torch.eye(layer.shape[1]))
        hessian.merge()  # nothing is left to be added
        hessian._squares._sums[0, 0] = -0.05  # no inputs give this; rounding errors give its like
        return hessian

    assert {result.record.note for result in results_with(hessian_of, tiny_folder)} == {DAMPED}


STEPS = {  # what each option adds, and what it must then lose less than
    "ranges": {"mse_range": True},
    "signs": {"mse_range": True, "signed_scales": True},
    "descent": {"mse_range": True, "signed_scales": True, "descent": 3},
}


def test_each_refinement_loses_less_of_the_outputs(tiny_folder):
    def hessian_of(layer):
        generator = torch.Generator().manual_seed(layer.shape[1])
        mixing = torch.randn(layer.shape[1], layer.shape[1], generator=generator) / layer.shape[1] ** 0.5
        hessian = Hessian(layer.shape[1])
        hessian.update(torch.randn(4 * layer.shape[1], layer.shape[1], generator=generator) @ mixing)
        return hessian

    lost = [total_loss(GPTQ(options), hessian_of, tiny_folder) for options in ({}, *STEPS.values())]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.85 * lost[0]


def test_signed_scales_are_negative_and_pass_the_check(tiny_folder, texts, tmp_path):
    pipeline.run(gptq_job(tiny_folder, texts, "int4_best"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = torch.cat([value.flatten() for name, value in tensors.items() if name.endswith("weight_scale")])
    assert 0.2 < (scales < 0).float().mean() < 0.8
    with torch.inference_mode():
        assert load(tmp_path / "out")(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()


def test_options_that_exclude_each_other_are_refused():
    for options in (
        {"gptaq": True, "aim": 0.5},
        {"gptaq": True, "descent": 1},
        {"aim": 1, "true_sequential": True},
    ):
        with pytest.raises(ConfigError):
            GPTQ(options)


@pytest.mark.parametrize("words", ["true_sequential=true", "aim=0.5"])
def test_what_the_samples_say_differs(words, tiny_folder, texts, tmp_path):
    for name, extra in (("plain", ()), ("changed", (f"{QUANT}.quant_method.{words}",))):
        pipeline.run(gptq_job(tiny_folder, texts, "int4_gptq", *extra), tmp_path / name)
    plain, changed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "changed"))
    differ = {name for name in plain if not torch.equal(plain[name], changed[name])}
    first = "model.layers.0.self_attn.q_proj.weight_packed"
    assert first not in differ  # it runs first: nothing was rounded before it, and nothing had drifted
    assert any(".layers.0." in name for name in differ) == (words != "aim=0.5")
    assert any(".layers.1." in name for name in differ)


def test_clipped_ranges_lose_less_of_the_outputs():
    """Heavy tails: a few large weights widen their groups' steps."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(512, 256, generator=generator)
    weight = torch.randn(64, 256, generator=generator) ** 3
    hessian = Hessian(256)
    hessian.update(inputs)
    factor = factorize(hessian)
    assert factor is not None
    quant = PRESETS["int4"].weight
    lost = [
        output_error(weight, gptq(weight, factor, round_weight(weight, quant, None, squares)), hessian.matrix)
        for squares in (None, hessian.matrix)
    ]
    assert lost[1] < 0.95 * lost[0]


# ------------------------------------------------------------------------------------------------- plans


def test_the_plan_counts_hessians_and_the_second_stream(tiny_folder, texts):
    jobs = {recipe: gptq_job(tiny_folder, texts, recipe) for recipe in ("int4_gptq", "int4_gptaq")}
    assert activation_bytes(jobs["int4_gptaq"]) == 2 * activation_bytes(jobs["int4_gptq"])
    layers, groups = jobs["int4_gptq"].selection.in_block(0), groups_by_linear(jobs["int4_gptq"].source)
    held = 4 * (3 * 128**2 + 256**2)  # q k v, o, gate up; down
    assert GPTQ({}).working_memory(layers, groups) == held + FACTORING * 4 * 256**2
    assert GPTQ({"gptaq": True}).working_memory(layers, groups) == 2 * held + FACTORING * 4 * 256**2
    assert peak_memory(jobs["int4_gptq"]) > peak_memory(job_for(tiny_folder, "int4_rtn"))
