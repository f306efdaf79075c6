"""Two processes share the samples and the rounding, and come to what one finds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from angelslim import pipeline
from angelslim.base import parallel
from angelslim.export._checkpoint import QuantizedCheckpoint, open_any
from families import save_random
from tiny import byte_tokenizer, job_for

GROUP = "compression.quantization.quant_method.group_size=32"
SEARCHED = ("compression.quantization.quant_method.lepto_margin=0", "compression.quantization.ignore_layers=[lm_head]")
JOBS = {
    "gptaq": ("int4_gptaq", GROUP),
    "awq": ("int4_awq", GROUP),  # with rounding to nearest, ranges clipped
    "smooth": ("int8_smooth_gptq", "compression.quantization.smooth_alpha=0.5"),
    "smooth_search": ("int8_smooth_gptq",),
    "kv_cache": ("fp8_static_kv", "compression.quantization.quant_method.kv_cache=per-head"),
    "lepto": ("fp8_lepto", *SEARCHED),
    "lepto_extended": ("fp8_lepto_extended", *SEARCHED),
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
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_any(folder).checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return {name: checkpoint.restore(name).weight.dequantize() for name in checkpoint.parts}


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """Everything stored as floats of at least 16 bits: scales, norms, what a transform rescaled."""
    found = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    return {name: x for name, x in found.items() if x.is_floating_point() and x.itemsize > 1}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A mixture, whose experts get tokens of some processes only."""
    folder = tmp_path_factory.mktemp("mixture")
    save_random("qwen3_moe", folder)
    byte_tokenizer().save_pretrained(folder)
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
def both(mixture, calibrated, tmp_path_factory) -> Path:
    """A folder with what two processes made of every job; they start once, as starting takes longest."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        [recipe, [*words, *calibrated], str(folder / name)] for name, (recipe, *words) in JOBS.items()
    ]
    plan = {"model": str(mixture), "said": str(folder / "said"), "jobs": jobs}
    (folder / "plan.json").write_text(json.dumps(plan))
    torchrun(str(Path(__file__).with_name("processes.py")), str(folder / "plan.json"))
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(name, both, mixture, calibrated, tmp_path):
    recipe, *words = JOBS[name]
    record = pipeline.run(job_for(mixture, recipe, *words, *calibrated), tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(both / name)
    assert one.keys() == two.keys()
    same = [float(torch.isclose(one[key], two[key], 1e-5, 1e-7).float().mean()) for key in one]
    print(name, min(same), sum(same) / len(same))
    assert sum(same) / len(same) > 0.99  # sums differ in rounding
    for key, value in numbers(tmp_path / "one").items():
        torch.testing.assert_close(numbers(both / name)[key], value, rtol=1e-5, atol=1e-7)
    theirs = json.loads((both / name / "run.json").read_text())
    ours = json.loads((tmp_path / "one" / "run.json").read_text())
    assert ours["experts"] == theirs["experts"]
    assert [layer["name"] for layer in ours["layers"]] == [layer["name"] for layer in theirs["layers"]]
    chosen = [[layer["choice"].partition(",")[0] for layer in each["layers"]] for each in (ours, theirs)]
    assert chosen[0] == chosen[1]
    print(chosen[0])
    assert "lepto" not in name or any(choice not in ("", "alpha 0") for choice in chosen[0])
