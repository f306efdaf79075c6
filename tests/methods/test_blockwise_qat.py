"""Training block by block: against rounding, killed and continued, every format, experts, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from angelslim import pipeline
from angelslim.base.errors import ConfigError, SchemeError
from angelslim.config import quantizers
from angelslim.config.recipe import load as load_recipe
from angelslim.engine import prepare_any
from angelslim.job import Job
from angelslim.methods.base import PTQ, QAT, make_quantizer
from angelslim.methods.ptq.blockwise_qat import BlockwiseQAT, mean_error, share_of_rate
from angelslim.models.checkpoint import UnitWriter
from angelslim.numerics.lowbit.record import LowBit
from angelslim.numerics.scheme import PRESETS, with_group
from angelslim.reopen import load
from families import save_random
from tiny import Killed, byte_tokenizer, dies_at, fingerprints
from walks import CPU, nearest, walk_two_blocks

SECTION = "compression.QAT"
WORDS = f"{SECTION}.block_wise_config"
SPECIAL = f"{SECTION}.plugin_config.quant_config.special"
SHORT = (f"{WORDS}.train_size=6", f"{WORDS}.training_seqlen=32", f"{WORDS}.epochs=2", f"{WORDS}.batch_size=4")
INT4 = {
    "extends": "base",
    "compression": {
        "name": "QAT",
        "quantization": {"name": "int4_rtn"},
        "QAT": {"training_mode": "blockwise"},
    },
}


def job_of(model, texts, recipe, *words):
    overrides = [f"dataset.data_path={texts}", "evaluation.enabled=false", *SHORT, *words]
    return prepare_any(load_recipe(recipe, overrides), model)


def seq_job(model, texts, *words):
    return job_of(model, texts, "seq_2bit_blocks", *words)


# ------------------------------------------------------------------------------------------- options


def test_it_is_a_method_with_checked_options():
    assert PTQ.get("blockwise_qat") is BlockwiseQAT and BlockwiseQAT.follows_original
    assert BlockwiseQAT({"weight_lr": 0}).weight_lr == 0
    wrong = ({"epochs": -1}, {"min_lr_factor": 0.5}, {"quant_lr": -1}, {"quantizer": "sequ"})
    for options in (*wrong, {"quantizer_options": {"lambda": 1}}, {"quantizer_options": {"bits": 9}}):
        with pytest.raises(ConfigError):
            BlockwiseQAT(options)
    with pytest.raises(SchemeError, match="Static input"):
        BlockwiseQAT({}).needs_data(PRESETS["fp8_static"])


def test_the_rate_falls_by_a_cosine():
    assert share_of_rate(0, 9, 20) == 1 and share_of_rate(8, 9, 20) == pytest.approx(1 / 20)
    assert share_of_rate(4, 9, 20) == pytest.approx((1 + 1 / 20) / 2)
    assert share_of_rate(2, 9, 1) == 1 and share_of_rate(0, 1, 20) == 1
    assert share_of_rate(2, 9, 20) == pytest.approx(0.05 + 0.95 * math.cos(math.pi / 8) ** 2)


OPTIONS = {
    "seq": ({}, {"bits": "ternary"}, {"group_size": 32, "scale_dtype": "bfloat16"}),
    "lsq": ({}, {"bits": 3}, {"bits": 4, "scale_dtype": "float32"}),
    "minmax": ({"bits": 3}, {"granularity": "per_group", "group_size": 64}),
    "absmean": ({}, {"granularity": "tensor"}),
    "twn": ({},),
    "tequila": ({}, {"group_size": -1}),
    "sherry": ({}, {"group_size": 64}),
    "int": ({}, {"bits": 8}, {"group_size": 64, "scale_dtype": "float16"}),
    "fp": ({}, {"format": "mxfp4"}, {"format": "nvfp4"}, {"granularity": "tensor"}),
}


def test_the_announced_scheme_is_what_a_quantizer_leaves():
    """`config.quantizers` knows the scheme by name; here it is what comes out of the quantizer itself."""
    assert set(OPTIONS) | {"dlt"} == set(QAT)
    assert set(quantizers.BITS) == {name for name in QAT if "bits" in QAT.get(name).reads}
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for name, each in OPTIONS.items():
        for options in each:
            quantizer = make_quantizer(name, options)
            quantizer.start(weight)
            record = quantizer.merged(weight)
            found = record.quantized() if isinstance(record, LowBit) else record
            told = quantizers.scheme_of(name, options).weight
            assert (found.quant.format, found.quant.granularity) == (told.format, told.granularity), name
            kinds = {found.quant.scale, told.scale}  # numbers of bfloat16 may be numbers of float16 too
            assert len(kinds) == 1 or kinds == {"float16", "bfloat16"}, (name, options)
    with pytest.raises(SchemeError, match="shift"):
        quantizers.scheme_of("dlt", {})
    with pytest.raises(ConfigError, match="Unknown quantizer 'sherri'"):
        quantizers.scheme_of("sherri", {})


# ------------------------------------------------------------------------------------------ learning


def originals(stream, block):
    """The original block on the original's inputs: the second half of the stored entries."""
    count = len(stream.samples)
    with torch.no_grad():
        return [stream._forward(block.index, [count + sample], "silent").double() for sample in range(count)]


def lost_by(process, scheme):
    """What the outputs of two blocks lose; each is an ordinary block again afterwards, its norms untouched."""

    def checked(block):
        norms = {name: value.clone() for name, value in block.module.named_parameters() if "norm" in name}
        dtypes = {name: value.dtype for name, value in block.module.named_parameters()}
        process(block)
        now = dict(block.module.named_parameters())
        assert {name: value.dtype for name, value in now.items()} == dtypes
        assert norms and all(torch.equal(now[name], value) for name, value in norms.items())
        assert all(value.grad is None for value in now.values())

    return walk_two_blocks(checked, scheme, originals)


def first_values(method):
    def process(block):
        block.compare({})
        for layer in block.layers:
            weight = block.weight(layer)
            found = method._first(layer, weight)
            block.emit(layer, weight, found)
            block.replace(layer, found.dequantize())
        block.advance()

    return process


CASES = {  # quantizer -> options, how much of the untrained error may be left in each block
    "seq": ({}, 0.5),
    "sherry": ({"group_size": 64, "anneal": "none"}, 0.6),
    "tequila": ({"group_size": 64}, 0.6),
}


@pytest.mark.parametrize("name", CASES)
def test_a_trained_block_loses_less_than_an_untrained_one(name):
    options, most = CASES[name]
    scheme = quantizers.scheme_of(name, options)
    method = BlockwiseQAT(
        {"quantizer": name, "quantizer_options": options, "epochs": 8, "learn_batch": 4, "weight_lr": 1e-3}
    )
    untrained = lost_by(first_values(method), scheme)
    trained = lost_by(method.process, scheme)
    assert all(now < most * before for now, before in zip(trained, untrained, strict=True)), (
        trained,
        untrained,
    )


def test_int4_is_closer_than_rounding_to_nearest():
    scheme = with_group(PRESETS["int4"], 64)
    name, options = quantizers.plain(scheme)
    method = BlockwiseQAT({"quantizer": name, "quantizer_options": options, "epochs": 4, "learn_batch": 4})
    rounded = lost_by(nearest, scheme)
    trained = lost_by(method.process, scheme)
    assert all(now < 0.8 * before for now, before in zip(trained, rounded, strict=True)), (trained, rounded)


def test_the_measure_is_the_mean_squared_error():
    class Fixed:
        module, device = torch.nn.Identity(), CPU

        def forward(self, chosen):
            return values[chosen[0]]

    values = [torch.randn(1, n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    aims = [torch.zeros_like(value) for value in values]
    wanted = torch.cat([value.flatten() for value in values]).double().square().mean().item()
    plain = torch.autocast("cpu", torch.bfloat16, enabled=False)
    assert mean_error(Fixed(), aims, plain) == pytest.approx(wanted, rel=1e-6)


def test_what_gets_worse_is_not_kept(monkeypatch):
    """With a rate that ruins every weight the first values remain."""
    scheme = quantizers.scheme_of("seq", {})
    method = BlockwiseQAT({"epochs": 1, "weight_lr": 10.0, "quant_lr": 10.0})
    assert lost_by(method.process, scheme) == lost_by(first_values(method), scheme)


# ---------------------------------------------------------------------------------------------- runs

FORMS = {
    "seq": ("seq_2bit_blocks", (), "angelslim packed (2 bit)"),
    "sherry": ("seq_2bit_blocks", (f"{SPECIAL}.quant_method=sherry",), "angelslim packed (1.25 bit)"),
    "tequila": ("seq_2bit_blocks", (f"{SPECIAL}.quant_method=tequila",), "angelslim packed (2 bit)"),
    "int": (INT4, (), "compressed-tensors (pack-quantized)"),
    "gptq": (INT4, ("compression.quantization.format=gptq",), "GPTQ layout (4 bit)"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_run_leaves_a_folder_that_opens(name, tiny_folder, texts, tmp_path):
    recipe, words, form = FORMS[name]
    job = job_of(tiny_folder, texts, recipe, *words)
    assert isinstance(job, Job)
    assert job.name == ("seq_2bit_blocks" if name == "seq" else "blockwise_qat")
    assert (job.config.dataset.num_samples, job.config.dataset.max_seq_length) == (6, 32)
    record = pipeline.run(job, tmp_path / "out")
    assert record.format == form and len(record.layers) == 14
    assert all("left out" in text for text in record.warnings)
    assert bool(record.warnings) == (name == "tequila")  # this family has no biases to put its own into
    with torch.inference_mode():
        assert load(tmp_path / "out")(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()


def test_killed_and_continued_it_learns_the_same(tiny_folder, texts, tmp_path, monkeypatch):
    pipeline.run(seq_job(tiny_folder, texts), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "write", dies_at(UnitWriter.write, 1, True))
        with pytest.raises(Killed):
            pipeline.run(seq_job(tiny_folder, texts), tmp_path / "out")
    pipeline.run(seq_job(tiny_folder, texts), tmp_path / "out")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")


def test_streamed_experts_are_trained_by_their_own_tokens(tmp_path):
    folder = tmp_path / "model"
    save_random("qwen3_moe", folder)
    byte_tokenizer().save_pretrained(folder)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "!!!!!!!!!!!!!!!"}\n' * 6)  # ids below the vocabulary of 96
    job = seq_job(folder, texts, f"{WORDS}.training_seqlen=16")
    plain = seq_job(
        folder, texts, f"{WORDS}.training_seqlen=16", f"{WORDS}.weight_lr=0", f"{WORDS}.quant_lr=0"
    )
    record, untrained = pipeline.run(job, tmp_path / "out"), pipeline.run(plain, tmp_path / "plain")
    experts = [layer for layer in record.layers if "experts" in layer.name]
    still = {layer.name: layer for layer in untrained.layers}
    assert experts and len(record.layers) == len(still)
    assert any(layer.relative_error != still[layer.name].relative_error for layer in experts)
    assert load(tmp_path / "out") is not None


def test_an_odd_group_is_one_clear_error(tiny_folder, texts, tmp_path):
    words = (f"{SPECIAL}.granularity=per-group", f"{SPECIAL}.group_size=48")
    with pytest.raises(SchemeError, match="48") as caught:
        pipeline.run(seq_job(tiny_folder, texts, *words), tmp_path / "out")
    assert "layers.0" in str(caught.value)


def test_words_that_only_the_whole_model_reads_are_reported(tiny_folder, texts):
    job = seq_job(tiny_folder, texts, f"{SECTION}.loss_type=kl", f"{WORDS}.val_size=8")
    assert sorted(job.resolved.warnings) == [
        "QAT.loss_type has no effect on blockwise_qat here.",
        "QAT.val_size has no effect on blockwise_qat here.",
    ]


def test_without_a_quantizer_two_bits_are_trained(tiny_folder, texts):
    job = job_of(tiny_folder, texts, {"compression": {"name": "QAT", "QAT": {"training_mode": "blockwise"}}})
    assert str(job.scheme) == "W seq2 per-channel (float16 scales)"
