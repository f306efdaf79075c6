"""Learned rounding as a method: on the built-in model's blocks, killed and continued, refused where it cannot learn."""

from __future__ import annotations

import pytest
import torch

from angelslim import pipeline
from angelslim.base.errors import ConfigError, SchemeError
from angelslim.data.text import calibration_batches
from angelslim.methods.base import PTQ
from angelslim.methods.ptq.learned import FROM_CODES, Learned
from angelslim.models.activations import ActivationStore
from angelslim.models.block import Block
from angelslim.models.checkpoint import UnitWriter
from angelslim.models.loading import open_model
from angelslim.models.select import groups_by_linear, select
from angelslim.models.walk import BlockStream
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import PRESETS, with_group
from angelslim.reopen import load
from families import save_random
from tiny import Killed, byte_tokenizer, dies_at, fingerprints, job_for

CPU = torch.device("cpu")
SHORT = ("dataset.num_samples=6", "dataset.max_seq_length=32")
METHOD = "compression.quantization.quant_method"
FEW = (f"{METHOD}.iterations=6", f"{METHOD}.learn_batch=4")


def learned_job(model, texts, *overrides):
    return job_for(model, "int4_autoround", *SHORT, *FEW, f"dataset.data_path={texts}", *overrides)


def test_it_is_a_method_with_declared_options():
    assert PTQ.get("learned") is Learned and Learned.follows_original
    assert Learned({}).lr == 1 / Learned({}).iterations
    assert Learned({"learn_from": "gptq"}).lr == FROM_CODES
    for options in ({"learn_from": "best"}, {"lr": 2}, {"iterations": -1}, {"observer": "absmaxx"}):
        with pytest.raises(ConfigError):
            Learned(options)


@pytest.mark.parametrize("name", ["fp8_dynamic", "nvfp4", "fp8_block"])
def test_schemes_without_integer_rows_are_refused(name):
    assert Learned({}).needs_data(PRESETS["int4"])
    with pytest.raises(SchemeError, match="integer weights"):
        Learned({}).needs_data(PRESETS[name])


def walk_two_blocks(process):
    """Give `process` the first two blocks of tiny-lm and their samples; return what each block lost of its output."""
    source = open_model("tiny-lm")
    ids = calibration_batches(pipeline.tokenizer_of(source.folder), None, samples=12, max_length=96)
    selection = select(source, with_group(PRESETS["int4"], 64))
    stream = BlockStream(source, ids, ActivationStore(source.folder, 1 << 30), CPU, follow_original=True)
    stream.prepare(0)
    lost = []
    for index in range(2):
        with stream.resident(index) as runner:
            block = Block(source, index, selection.in_block(index), groups_by_linear(source), CPU, runner)
            aims = outputs(block)  # of the original weights, on the inputs that the block has now
            advance = block.advance

            def measured(block=block, aims=aims, advance=advance):
                found = zip(outputs(block), aims, strict=True)
                lost.append(sum((now - aim).square().sum().item() for now, aim in found))
                advance()

            block.advance = measured  # the inputs are gone afterwards
            process(block)
    return lost


def outputs(block):
    with torch.no_grad():
        return [block.forward([sample]).double() for sample in range(block.samples)]


def nearest(block):
    for layer in block.layers:
        weight = block.weight(layer)
        rounded = quantize(weight, layer.scheme.weight, weight.dtype)
        block.emit(layer, weight, rounded)
        block.replace(layer, rounded.dequantize())
    block.advance()


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_the_block_loses_less_than_by_rounding(start):
    rounded = walk_two_blocks(nearest)
    method = Learned({"iterations": 40, "learn_from": start})
    learned = walk_two_blocks(method.process)
    assert learned[0] < (0.75 if start == "nearest" else 0.6) * rounded[0]


def test_every_layer_takes_part_and_the_folder_opens(tiny_folder, texts, tmp_path):
    record = pipeline.run(learned_job(tiny_folder, texts), tmp_path / "learned")
    plain = pipeline.run(job_for(tiny_folder, "int4_rtn"), tmp_path / "plain")
    assert len(record.layers) == len(plain.layers) == 14 and record.warnings == []
    assert fingerprints(tmp_path / "learned") != fingerprints(tmp_path / "plain")
    with torch.inference_mode():
        assert load(tmp_path / "learned")(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()


@pytest.mark.parametrize("extra", [(), (f"{METHOD}.zero_point=true", f"{METHOD}.learn_from=gptq")])
def test_killed_and_continued_it_learns_the_same(extra, tiny_folder, texts, tmp_path, monkeypatch):
    pipeline.run(learned_job(tiny_folder, texts, *extra), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "write", dies_at(UnitWriter.write, 1, True))
        with pytest.raises(Killed):
            pipeline.run(learned_job(tiny_folder, texts, *extra), tmp_path / "out")
    pipeline.run(learned_job(tiny_folder, texts, *extra), tmp_path / "out")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")


def test_streamed_experts_learn_from_their_own_tokens(tmp_path):
    folder = tmp_path / "model"
    save_random("qwen3_moe", folder)
    byte_tokenizer().save_pretrained(folder)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "!!!!!!!!!!!!!!!"}\n' * 6)  # ids below the vocabulary of 96
    job = learned_job(folder, texts, f"{METHOD}.group_size=32", "dataset.max_seq_length=16")
    record = pipeline.run(job, tmp_path / "out")
    assert any("experts" in layer.name for layer in record.layers)
    assert all(0 < layer.relative_error < 0.5 for layer in record.layers)
