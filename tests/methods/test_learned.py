"""Learned rounding as a method: on the built-in model's blocks, killed and continued, refused where it cannot learn."""

from __future__ import annotations

import pytest
import torch

from angelslim import pipeline
from angelslim.base.errors import ConfigError, SchemeError
from angelslim.methods.base import PTQ
from angelslim.methods.ptq.learned import FROM_CODES, Learned
from angelslim.models.checkpoint import UnitWriter
from angelslim.numerics.scheme import PRESETS, with_group
from angelslim.reopen import load
from families import save_random
from tiny import Killed, byte_tokenizer, dies_at, fingerprints, job_for
from walks import nearest, outputs, walk_two_blocks

INT4 = with_group(PRESETS["int4"], 64)
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


def present(_stream, block):
    """The original weights' outputs on the inputs that the block has now."""
    return outputs(block)


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_the_block_loses_less_than_by_rounding(start):
    rounded = walk_two_blocks(nearest, INT4, present)
    method = Learned({"iterations": 40, "learn_from": start})
    learned = walk_two_blocks(method.process, INT4, present)
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
