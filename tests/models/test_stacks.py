"""Experts stored as one stack are the matrices that a loop cuts out of it, read one stretch of bytes at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import angelslim
from angelslim.models.loading import open_model
from angelslim.models.rules import transposed
from angelslim.models.stacks import stacks_of, unstacked
from families import random_model, save_random
from tiny import byte_tokenizer

STACKED = {"qwen3_vl_moe": "model.language_model.layers.0.mlp", "llama4_text": "model.layers.1.feed_forward"}
QUIET = {"evaluation__enabled": False}


def cut(gate_up: torch.Tensor, down: torch.Tensor, expert: int) -> dict[str, torch.Tensor]:
    """Gate, up and down of one expert, element by element, from stacks that hold ``[in, out]``."""
    hidden, width = gate_up.shape[1], down.shape[1]
    found = {
        "gate_proj": torch.empty(width, hidden),
        "up_proj": torch.empty(width, hidden),
        "down_proj": torch.empty(hidden, width),
    }
    for row in range(width):
        for column in range(hidden):
            found["gate_proj"][row, column] = gate_up[expert, column, row]
            found["up_proj"][row, column] = gate_up[expert, column, width + row]
            found["down_proj"][column, row] = down[expert, row, column]
    return found


def turn(folder: Path) -> None:
    """Store the stacks the other way around, as Qwen3-VL-MoE was published; transformers saves them unturned."""
    stored = load_file(folder / "model.safetensors")
    stacks = {name: value.transpose(1, 2).contiguous() for name, value in stored.items() if value.dim() == 3}
    save_file(stored | stacks, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family, turned", [*((family, False) for family in STACKED), ("qwen3_vl_moe", True)])
def test_every_expert_is_what_a_loop_cuts_out(family, turned, tmp_path):
    save_random(family, tmp_path)
    if turned:
        turn(tmp_path)
    source = unstacked(open_model(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    path = f"{STACKED[family]}.experts"
    for expert in (0, 3):
        stacks = [stored[f"{path}.{name}"] for name in ("gate_up_proj", "down_proj")]
        if family == "qwen3_vl_moe" and not turned:
            stacks = [stack.transpose(1, 2) for stack in stacks]
        expected = cut(stacks[0], stacks[1], expert)
        for name, matrix in expected.items():
            tensor = f"{path}.{expert}.{name}.weight"
            assert torch.equal(source.checkpoint.read(tensor), matrix)
            assert source.checkpoint.tensors[tensor].shape == tuple(matrix.shape)


@pytest.mark.parametrize("family, turned", [*((family, False) for family in STACKED), ("qwen3_vl_moe", True)])
def test_the_stacks_come_back_from_their_parts(family, turned, tmp_path):
    model = save_random(family, tmp_path)
    if turned:
        turn(tmp_path)
    source = unstacked(open_model(tmp_path))
    filled = source.materialize("", torch.device("cpu"))
    for (name, ours), (_, theirs) in zip(filled.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_one_expert_is_read_not_the_stack_ahead_of_time_too(tmp_path):
    save_random("llama4_text", tmp_path)
    source = unstacked(open_model(tmp_path))
    names = [name for names in stacks_of(source).values() for name in names]
    for name in names:
        (stretch,) = source.checkpoint.sources(name)
        assert stretch.nbytes == 64 * 48 * 4 * (1 if "down" in name else 2)
    expected = [source.checkpoint.read(name) for name in names]
    source.checkpoint.ahead(names)
    assert all(torch.equal(source.checkpoint.read(name), e) for name, e in zip(names, expected, strict=True))


def test_two_shapes_tell_which_way_a_stack_lies():
    for hidden in range(2, 40, 2):
        for width in range(2, 40, 2):
            assert transposed((4, 2 * width, hidden), (4, hidden, width)) is False
            assert transposed((4, hidden, 2 * width), (4, width, hidden)) is True
    assert transposed((4, 10, 6), (4, 6, 6)) is None and transposed((4, 8, 6), (3, 6, 4)) is None


def test_interleaved_stacks_with_biases_stay_and_the_report_says_why(tmp_path):
    save_random("gpt_oss", tmp_path / "model")
    result = angelslim.compress(tmp_path / "model", "fp8_dynamic", out=tmp_path / "out", **QUIET)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert "one stack" in result.report.skipped[name] and len(result.report.layers) == 8
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    assert torch.equal(before[name], after[name])
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(4)} <= set(ignored)


@pytest.mark.parametrize("family", [*STACKED, "qwen3_moe"])
def test_ignored_experts_stay_as_they_are_stored_and_engines_are_told(family, tmp_path):
    save_random(family, tmp_path / "model")
    ignore = {"compression__quantization__ignore_layers": ["experts"]}
    angelslim.compress(tmp_path / "model", "fp8_dynamic", out=tmp_path / "out", **QUIET, **ignore)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    stored = [name for name in before if ".experts." in name]
    assert stored and all(torch.equal(before[name], after[name]) for name in stored)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    path = STACKED.get(family, "model.layers.0.mlp")
    names = {f"{path}.experts.{e}.{part}_proj" for e in range(4) for part in ("gate", "up", "down")}
    assert names <= set(ignored)


@pytest.mark.parametrize("recipe", ["int8_dynamic", "fp8_static"])
def test_a_run_writes_each_expert_by_itself_and_the_folder_opens_again(recipe, tmp_path):
    save_random("llama4_text", tmp_path / "model", vocab_size=272)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = {"dataset__num_samples": 4, "dataset__max_seq_length": 32}
    result = angelslim.compress(tmp_path / "model", recipe, out=tmp_path / "out", **QUIET, **data)
    names = {layer.name for layer in result.report.layers}
    path = "model.layers.1.feed_forward.experts"
    assert {f"{path}.{e}.{part}_proj" for e in range(4) for part in ("gate", "up", "down")} <= names
    assert f"{path.removesuffix('experts')}router" not in names
    assert sum(use.tokens for use in result.report.experts) == (128 if recipe == "fp8_static" else 0)
    model = angelslim.load(tmp_path / "out")
    original = random_model("llama4_text", vocab_size=272)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 0.07 * theirs.abs().max(), name
