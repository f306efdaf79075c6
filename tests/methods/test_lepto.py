"""LeptoQuant as a method: what it chooses, measured again by hand-written rounding on the block."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from angelslim import pipeline
from angelslim.base.errors import SchemeError
from angelslim.data.text import calibration_batches
from angelslim.methods.base import PTQ
from angelslim.methods.ptq.lepto import FEW, MARGIN, LeptoQuant, spread
from angelslim.models.activations import ActivationStore
from angelslim.models.block import Block
from angelslim.models.loading import open_model
from angelslim.models.select import groups_by_linear, select
from angelslim.models.walk import BlockStream
from angelslim.numerics.lepto import FLOOR
from angelslim.numerics.scheme import PRESETS
from angelslim.reopen import load
from families import save_random
from tiny import byte_tokenizer, fingerprints, job_for

CPU = torch.device("cpu")
SHORT = ("dataset.num_samples=6", "dataset.max_seq_length=48")
WATCHED = (1, 4, 5)  # blocks of the built-in model
MODES = {"paper": {"lepto_margin": 0}, "extended": {"lepto_margin": 0, "lepto_extended": True}, "careful": {}}


def test_it_is_a_method_with_declared_options():
    assert PTQ.get("lepto") is LeptoQuant and LeptoQuant.reads == {
        "lepto_extended",
        "lepto_margin",
        "lepto_accept",
    }
    assert not LeptoQuant({}).extended and LeptoQuant({"lepto_extended": True}).extended
    assert LeptoQuant({}).margin == MARGIN and LeptoQuant({"lepto_margin": 0}).margin == 0


@pytest.mark.parametrize("name", ["fp8_dynamic", "int4", "fp8_block"])
def test_schemes_without_static_fp8_inputs_are_refused(name):
    assert LeptoQuant({}).needs_data(PRESETS["fp8_static"])
    with pytest.raises(SchemeError, match=r"static per-tensor FP8 input scales.*fp8_static"):
        LeptoQuant({}).needs_data(PRESETS[name])


def test_samples_of_the_search_are_spread():
    assert spread(4, FEW) == [0, 1, 2, 3]
    assert spread(100, 10) == list(range(0, 100, 10))
    assert all(len(spread(count, 8)) <= 8 for count in range(1, 60))


# ------------------------------------------------------------------------------ on the built-in model's blocks


def rounding(scale: float):
    """What an engine does to the input of a linear, written out."""

    def hook(_module, args):
        codes = (args[0].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return ((codes.float() * scale).to(args[0].dtype),)

    return hook


def block_error(
    block: Block, scales: dict[str, float], original: list[torch.Tensor], relative: bool
) -> float:
    with ExitStack() as stack, torch.no_grad():
        for name, scale in scales.items():
            handle = block.source.model.get_submodule(name).register_forward_pre_hook(rounding(scale))
            stack.callback(handle.remove)
        outputs = [block.forward([sample]) for sample in range(block.samples)]
    return sum(
        ((out.double() - ref.double()).square().sum(-1) / (ref.double().square().sum(-1) if relative else 1))
        .sum()
        .item()
        for out, ref in zip(outputs, original, strict=True)
    )


def note_largest(largest: dict[str, float], name: str, values: torch.Tensor) -> None:
    largest[name] = max(largest[name], values.abs().max().item())


@pytest.fixture(scope="module")
def walked():
    """For each mode and block of tiny-lm: ordinary scales, chosen scales, the block's error with each, the records."""
    source = open_model("tiny-lm")
    ids = calibration_batches(pipeline.tokenizer_of(source.folder), None, samples=4, max_length=64)
    selection, groups = select(source, PRESETS["fp8_static"]), groups_by_linear(source)
    found = {}
    for mode, options in MODES.items():
        stream = BlockStream(source, ids, ActivationStore(source.folder, 1 << 30), CPU)  # nothing is spilled
        stream.prepare(0)
        for index in range(len(source.structure.blocks)):
            with stream.resident(index) as runner:
                block = Block(source, index, selection.in_block(index), groups, CPU, runner)
                if index not in WATCHED:
                    block.advance()
                    continue
                largest = {layer.name: 0.0 for layer in block.layers}
                block.collect({name: partial(note_largest, largest, name) for name in largest})
                with torch.no_grad():
                    original = [block.forward([sample]) for sample in range(block.samples)]
                LeptoQuant(options).process(block)
                plain = {name: value / 448 for name, value in largest.items()}
                chosen = {result.layer.name: result.input_scale.item() for result in block.results}
                relative = mode == "extended"
                errors = [block_error(block, scales, original, relative) for scales in (plain, chosen)]
                block.advance()
            found[mode, index] = (
                plain,
                chosen,
                errors,
                {each.layer.name: each.record for each in block.results},
            )
    return found


def test_no_block_loses_more_than_with_plain_static_scales(walked):
    for place, (_, _, (plain, chosen), _) in walked.items():
        assert chosen <= plain, place
        if place[0] == "careful":
            assert chosen == plain or chosen <= (1 - MARGIN) * plain * 1.001
    assert any(chosen < 0.97 * plain for _, _, (plain, chosen), _ in walked.values())


def test_the_recorded_gains_are_those_of_the_block(walked):
    for place, (_, _, (plain, chosen), records) in walked.items():
        product = 1.0
        for name, record in records.items():
            if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
                product *= float(record.choice.rpartition("x")[2])
        assert product == pytest.approx(chosen / plain, rel=2e-3), place


def test_scales_come_from_each_operators_own_input(walked):
    """Within the bounds of the candidates around its own range, and one for all members of a group."""
    for (mode, _), (plain, chosen, _, records) in walked.items():
        low = 1 if mode == "paper" else 0.5
        for name, scale in chosen.items():
            assert low * 0.9999 <= scale / plain[name] <= 448 / FLOOR * 1.0001, name
            if records[name].choice.startswith("alpha 0,"):
                assert scale == pytest.approx(plain[name])
        for members in (("q", "k", "v"), ("gate", "up")):
            kin = {
                scale for name, scale in chosen.items() if name.endswith(tuple(f".{x}_proj" for x in members))
            }
            assert len(kin) == 1


# ----------------------------------------------------------------------------------------------- whole runs


def test_the_checkpoint_is_that_of_fp8_static_but_for_the_input_scales(tiny_folder, texts, tmp_path):
    tensors = {}
    for recipe in ("fp8_static", "fp8_lepto", "fp8_lepto_extended"):
        job = job_for(tiny_folder, recipe, *SHORT, f"dataset.data_path={texts}")
        record = pipeline.run(job, tmp_path / recipe)
        assert record.warnings == []
        tensors[recipe] = load_file(tmp_path / recipe / "model.safetensors")
    plain = tensors["fp8_static"]
    for recipe in ("fp8_lepto", "fp8_lepto_extended"):
        assert (tmp_path / recipe / "config.json").read_text() == (
            tmp_path / "fp8_static/config.json"
        ).read_text()
        assert tensors[recipe].keys() == plain.keys()
        for name, value in tensors[recipe].items():
            assert value.dtype == plain[name].dtype and value.shape == plain[name].shape
            assert name.endswith("input_scale") or torch.equal(value.float(), plain[name].float())
    assert all(record.choice for record in record.layers)


def test_a_run_can_be_repeated(tiny_folder, texts, tmp_path):
    for name in "ab":
        pipeline.run(
            job_for(tiny_folder, "fp8_lepto_extended", *SHORT, f"dataset.data_path={texts}"), tmp_path / name
        )
    assert fingerprints(tmp_path / "a") == fingerprints(tmp_path / "b")


def test_streamed_experts_are_searched_one_by_one(tmp_path):
    save_random("qwen3_moe", tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text(
        '{"text": "!!#$%&!!!\'(!!!"}\n' * 2
    )  # ids below the vocabulary of 96
    words = (
        "dataset.num_samples=2",
        "dataset.max_seq_length=16",
        f"dataset.data_path={tmp_path / 'texts.jsonl'}",
    )
    record = pipeline.run(job_for(tmp_path / "model", "fp8_lepto_extended", *words), tmp_path / "out")
    experts = {layer.name: layer for layer in record.layers if ".experts." in layer.name}
    assert len(experts) == 24 and all(layer.choice and layer.input_scale for layer in experts.values())
    assert any(not layer.choice.startswith("alpha 0,") for layer in experts.values())
    with torch.no_grad():
        assert load(tmp_path / "out")(input_ids=torch.arange(3, 20)[None]).logits.isfinite().all()
