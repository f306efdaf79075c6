"""Two processes share the samples and round as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from angelslim import pipeline
from angelslim.base import parallel
from angelslim.export._checkpoint import QuantizedCheckpoint, open_any
from families import save_random
from test_work import GROUP, SHORT, texts
from tiny import byte_tokenizer, job_for


def test_alone_there_is_nothing_to_exchange():
    assert (parallel.world(), parallel.rank(), parallel.first()) == (1, 0, True)
    value = torch.tensor([1.0, 2.0])
    assert parallel.total(value) is value and parallel.highest(value) is value
    assert parallel.share([1, 2, 3]) == [1, 2, 3]
    assert parallel.spread([lambda: 1, lambda: 2]) == [1, 2]


def torchrun(words: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "angelslim", *words], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_any(folder).checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return {name: checkpoint.restore(name).weight.dequantize() for name in checkpoint.parts}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    save_random("qwen3_moe", folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["fp8_static", "int4_gptaq"])
def test_two_processes_equal_one(recipe, mixture, tmp_path):
    words = [*SHORT, texts(tmp_path), *([GROUP] if "int4" in recipe else [])]
    pipeline.run(job_for(mixture, recipe, *words), tmp_path / "one")
    done = torchrun(["run", recipe, str(mixture), *words, "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "two.partial").exists()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    same = [float((one[name] == two[name]).float().mean()) for name in one]
    assert (
        min(same) == 1.0 if recipe == "fp8_static" else sum(same) / len(same) > 0.99
    )  # sums differ in rounding
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert records[0]["experts"] == records[1]["experts"]
    scales = [[layer["input_scale"] or 0.0 for layer in record["layers"]] for record in records]
    assert scales[0] == pytest.approx(
        scales[1], rel=1e-5
    )  # products of other sizes differ in their last bits
