"""Peak memory of a run against the model's depth: it must not grow with the number of layers.

Makes random bfloat16 checkpoints on disk with the shape of a 2-billion-parameter Qwen3 (hidden 2048, feed-forward
6144, 16 query and 8 key-value heads, vocabulary 151 936, tied embeddings), sharded, at three depths, and sends
each through INT8 dynamic and FP8 static in a process of its own. The peak is the process's largest resident set,
libraries included;
the median of a few runs counts.

    python benchmarks/ptq_memory.py [--folder DIR] [--layers 9,17,34] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3Config

import angelslim
from angelslim.models.checkpoint import UnitWriter
from common import bar, write

METHODS = {
    "int8_dynamic": [],
    "fp8_static": ["dataset.num_samples=16", "dataset.max_seq_length=256"],
}
SHARD = 2 * 10**9


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write a random model of `layers` blocks; return its bytes."""
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        dtype="bfloat16", architectures=["Qwen3ForCausalLM"], eos_token_id=1,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(angelslim.builtin_model("tiny-lm") / name, folder / name)
    generator = torch.Generator().manual_seed(layers)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    writer = UnitWriter(folder / "units")
    ones = {
        "input_layernorm": 2048,
        "post_attention_layernorm": 2048,
        "self_attn.q_norm": 128,
        "self_attn.k_norm": 128,
    }
    shapes = {
        "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (1024, 2048), "self_attn.v_proj": (1024, 2048),
        "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (6144, 2048), "mlp.up_proj": (6144, 2048),
        "mlp.down_proj": (2048, 6144),
    }  # fmt: skip
    units = ["embed"]
    writer.write(
        "embed",
        {
            "model.embed_tokens.weight": normal(151_936, 2048),
            "model.norm.weight": torch.ones(2048, dtype=torch.bfloat16),
        },
    )
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"model.layers.{layer}.{name}.weight": torch.ones(size, dtype=torch.bfloat16)
            for name, size in ones.items()
        }
        units.append(f"block-{layer}")
        writer.write(units[-1], tensors)
    writer.finish(units, folder, SHARD)
    shutil.rmtree(folder / "units")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak_of(model: Path, method: str, settings: list[str]) -> dict[str, float]:
    """Compress in a fresh process; return its peak memory, time, and what `plan` predicted."""
    program = [sys.executable, "-c", "from angelslim.cli import main; main()", "-q"]
    plan = subprocess.run(
        [*program, "plan", method, str(model), *settings, "--json"], check=True, capture_output=True
    )
    out = model.parent / f"{model.name}-{method}"
    subprocess.run(
        [*program, "run", method, str(model), *settings, "--out", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    record = json.loads((out / "run.json").read_text())
    shutil.rmtree(out)
    return {
        "peak_bytes": record["peak_memory_bytes"],
        "planned_bytes": json.loads(plan.stdout)["peak_memory"],
        "seconds": record["seconds"],
        "planned_seconds": json.loads(plan.stdout)["seconds"],
        "bytes_after": record["bytes_after"],
    }


def main() -> None:
    """Measure every depth and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are made (default: a temporary folder)"
    )
    parser.add_argument(
        "--layers", default="9,17,34", help="depths; the last is the 2-billion-parameter model"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, whose median peak counts")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    raw = []
    try:
        for layers in map(int, arguments.layers.split(",")):
            model = folder / f"model-{layers}"
            size = make_checkpoint(model, layers)
            for method, settings in METHODS.items():
                runs = [peak_of(model, method, settings) for _ in range(arguments.repeats)]
                middle = sorted(runs, key=lambda run: run["peak_bytes"])[len(runs) // 2]
                found = {
                    "layers": layers,
                    "checkpoint_bytes": size,
                    "method": method,
                    "peaks": [run["peak_bytes"] for run in runs],
                    **middle,
                }
                raw.append(found)
                print(f"{layers:3} layers {size / 1e9:5.2f} GB {method:13} peak {found['peak_bytes'] / 1e9:5.2f} GB "
                      f"(planned {found['planned_bytes'] / 1e9:5.2f}) in {found['seconds']:.0f} s (planned {found['planned_seconds']:.0f})", flush=True)  # fmt: skip
            shutil.rmtree(model)
    finally:
        shutil.rmtree(folder)
    bars = []
    for method in METHODS:
        runs = [item for item in raw if item["method"] == method]
        limit = 0.25 * runs[-1]["checkpoint_bytes"] + 1.5e9
        bars.append(
            bar(f"{method}: peak bytes at the largest size", runs[-1]["peak_bytes"], limit, at_most=True)
        )
        growth = runs[-1]["peak_bytes"] / runs[0]["peak_bytes"]
        bars.append(
            bar(
                f"{method}: peak at {runs[-1]['layers']} layers / at {runs[0]['layers']}",
                growth,
                1.1,
                at_most=True,
            )
        )
    write("ptq_memory", raw, bars)


if __name__ == "__main__":
    main()
