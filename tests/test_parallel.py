"""Two processes share the samples and the rounding, and come to what one finds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from angelslim import pipeline
from angelslim.base import parallel
from angelslim.export._checkpoint import QuantizedCheckpoint, open_any
from families import save_random
from tiny import byte_tokenizer, job_for

METHOD = "compression.quantization.quant_method"
GROUP, MARGIN = f"{METHOD}.group_size=32", f"{METHOD}.lepto_margin=0"
# Each job's model, recipe and further words. Of the mixture every expert is shown every token.
JOBS: dict[str, tuple[str, ...]] = {
    "gptaq": ("mixture", "int4_gptaq", GROUP),
    "sequential": ("dense", "int4_gptq", GROUP, f"{METHOD}.true_sequential=true"),
    "awq": ("dense", "int4_awq", GROUP),  # with rounding to nearest, ranges clipped
    "smooth": ("mixture", "int8_smooth_gptq", "compression.quantization.smooth_alpha=0.5"),
    "smooth_search": ("mixture", "int8_smooth_gptq"),
    "kv_cache": ("mixture", "fp8_static_kv", f"{METHOD}.kv_cache=per-head"),
    "lepto": ("mixture", "fp8_lepto", MARGIN),
    "lepto_extended": ("mixture", "fp8_lepto_extended", MARGIN),
}
# Here many experts are sent tokens in one process only.
SPARSE: dict[str, tuple[str, ...]] = {
    "awq_sparse": ("sparse", "int4_awq", GROUP),
    "smooth_sparse": ("sparse", "int8_smooth_gptq"),
    "learned_sparse": ("sparse", "int4_autoround", GROUP, f"{METHOD}.iterations=4"),
    "blocks_sparse": ("sparse", "seq_2bit_blocks", "compression.QAT.block_wise_config.epochs=1"),
    "lepto_sparse": ("sparse", "fp8_lepto_extended", MARGIN),
}


def test_alone_there_is_nothing_to_exchange():
    assert (parallel.world(), parallel.rank(), parallel.first()) == (1, 0, True)
    value = torch.tensor([1.0, 2.0])
    assert parallel.total(value) is value and parallel.highest(value) is value
    assert parallel.broadcast({"a": value}, 0)["a"] is value and parallel.gathered(value)[0] is value
    assert parallel.share([1, 2, 3]) == [1, 2, 3] and parallel.numbered(3) == (0, 3)
    assert parallel.spread([lambda: 1.0, lambda: 2.0]) == [1, 2] and parallel.owners([3, 1]) == [0, 0]


def torchrun(*words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as runs:
        try:
            said = runs.communicate(timeout=300)[1]  # processes that disagree would wait for each other
        except subprocess.TimeoutExpired:
            runs.terminate()  # torchrun ends its processes
            raise
    assert runs.returncode == 0, said[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_any(folder).checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return {name: checkpoint.restore(name).weight.dequantize() for name in checkpoint.parts}


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """Everything stored as floats of at least 16 bits: scales, norms, what a transform rescaled."""
    found = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    return {name: x for name, x in found.items() if x.is_floating_point() and x.itemsize > 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    few = {"num_experts": 16, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    for name, family, changes in (
        ("dense", "qwen3", {}),
        ("mixture", "qwen3_moe", {}),
        ("sparse", "qwen3_moe", few),
    ):
        save_random(family, folder / name, **changes)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> tuple[str, ...]:
    """Five samples: one process gets two, the other three. Their ids lie below the tiny vocabulary of 96."""
    file, draw = tmp_path_factory.mktemp("texts") / "texts.jsonl", random.Random(0)
    lines = ["".join(chr(draw.randrange(33, 122)) for _ in range(length)) for length in (24, 20, 24, 9, 17)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = ("dataset.num_samples=5", "dataset.max_seq_length=24", "evaluation.enabled=false")
    return (f"dataset.data_path={file}", *settings)


@pytest.fixture(scope="module")
def both(models, calibrated, tmp_path_factory) -> Path:
    """A folder with what two processes made of every job; they start once, as starting takes longest."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        [str(models / model), recipe, [*words, *calibrated], str(folder / name)]
        for name, (model, recipe, *words) in (JOBS | SPARSE).items()
    ]
    (folder / "plan.json").write_text(json.dumps({"said": str(folder / "said"), "jobs": jobs}))
    torchrun(str(Path(__file__).with_name("processes.py")), str(folder / "plan.json"))
    return folder


def said(both: Path) -> list[Any]:
    return [json.loads((both / f"said-{rank}").read_text()) for rank in (0, 1)]


def assert_same(one: Path, two: Path) -> dict[str, Any]:
    """Compare two results, sums being rounded in another order; return the first one's record."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    same = [torch.isclose(first[name], second[name], 1e-5, 1e-7).float().mean() for name in first]
    assert sum(same) / len(same) > 0.99
    other = numbers(two)
    for name, value in numbers(one).items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (one, two))
    assert ours["experts"] == theirs["experts"]
    for key in ("name", "note"):
        assert [layer[key] for layer in ours["layers"]] == [layer[key] for layer in theirs["layers"]]
    chosen = [[layer["choice"].partition(",")[0] for layer in each["layers"]] for each in (ours, theirs)]
    assert chosen[0] == chosen[1]
    return ours


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(name, both, models, calibrated, tmp_path):
    model, recipe, *words = JOBS[name]
    pipeline.run(job_for(models / model, recipe, *words, *calibrated), tmp_path / "one")
    record = assert_same(tmp_path / "one", both / name)
    if "lepto" in name:
        assert any(layer["choice"].partition(",")[0] not in ("", "alpha 0") for layer in record["layers"])
    if name == "kv_cache":
        assert any(key.endswith(".k_scale") for key in numbers(both / name))


@pytest.mark.parametrize("name", [*JOBS, *SPARSE])
def test_processes_give_their_blocks_the_same_values(name, both):
    first, second = (given[name] for given, _ in said(both))
    assert first == second
    assert bool(first) == ("lepto" not in name and "kv" not in name)  # these change no parameter


def test_a_process_without_tokens_of_an_expert_takes_part(both):
    used = json.loads((both / "lepto_sparse" / "run.json").read_text())["experts"]
    assert len(used) == 16 and min(use["tokens"] for use in used) == 0  # shown one of the others'
    for name in SPARSE:
        assert all(value.isfinite().all() for value in weights(both / name).values())


def test_the_command_runs_in_two_processes(models, calibrated, tmp_path):
    pipeline.run(job_for(models / "mixture", "fp8_static", *calibrated), tmp_path / "one")
    torchrun(
        "-m",
        "angelslim",
        "run",
        "fp8_static",
        str(models / "mixture"),
        *calibrated,
        "--out",
        str(tmp_path / "two"),
    )
    assert not (tmp_path / "two.partial").exists()
    assert_same(tmp_path / "one", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_processes_tell_each_other(both):
    (_, first), (_, second) = said(both)
    assert first["types"] == second["types"] == [
        ["fp8", "torch.float8_e4m3fn", [1, 2]], ["half", "torch.bfloat16", [3, 2]], ["one", "torch.int64", []],
        ["none", "torch.float32", [0, 4]],
    ]  # fmt: skip
    assert first["values"] == second["values"] and first["values"][0] == [[0.5, 448.0]]
    assert first["gathered"] == second["gathered"] == [[], [0]]
    assert (first["numbered"], second["numbered"]) == ([0, 7], [3, 7])
    assert (first["share"], second["share"]) == ([0, 1], [2, 3, 4])
    assert first["spread"] == second["spread"] == [0.1, 1.1, float("inf")]
    assert first["owners"] == second["owners"] == [1, 0, 1, 1]
    assert first["heads"] == second["heads"] == [0.5, 2.0]
