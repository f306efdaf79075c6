"""Peak memory of a run against the model's depth, and against what `angelslim plan` says of it beforehand.

Makes random bfloat16 checkpoints on disk with the shape of a 2-billion-parameter Qwen3 (hidden 2048, feed-forward
6144, 16 query and 8 key-value heads, vocabulary 151 936, tied embeddings), sharded, at three depths, and sends
each through INT8 dynamic and FP8 static in a process of its own. The peak must not grow with the number of layers. A
mixture follows, layers of 64 experts of 768 channels (0.6 GB a layer, as in Qwen3-30B-A3B), whose experts are
streamed one at a time: two and six layers stored one by one, and two as one stack each, as Qwen3-VL-MoE is published. The peak is
the process's largest resident set, libraries included; the median of a few runs counts.

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
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3MoeConfig, Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

import angelslim
from angelslim.models.checkpoint import UnitWriter
from common import bar, write

METHODS = {
    "int8_dynamic": [],
    "fp8_static": ["dataset.num_samples=16", "dataset.max_seq_length=256"],
}
MIXED = {
    "int8_dynamic": [],
    "fp8_static": ["dataset.num_samples=16", "dataset.max_seq_length=256"],
}
EXPERTS, WIDTH = 64, 768
MIXTURES = [("mixture", 2), ("mixture", 6), ("stacks", 2)]
SHARD = 2 * 10**9
WITHIN = 0.2  # of the measured peak, the plan has to be


def config_of(kind: str, layers: int) -> Any:
    """Return the configuration of a dense model, a mixture, or a mixture whose experts are stacked."""
    text = {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "dtype": "bfloat16", "eos_token_id": 1,
    }  # fmt: skip
    if kind == "dense":
        return Qwen3Config(**text, architectures=["Qwen3ForCausalLM"])
    text |= {"num_experts": EXPERTS, "num_experts_per_tok": 4, "moe_intermediate_size": WIDTH}
    if kind == "mixture":
        return Qwen3MoeConfig(**text, norm_topk_prob=True, architectures=["Qwen3MoeForCausalLM"])
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [24, 20, 20]}
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 2048,
              "deepstack_visual_indexes": [], "num_position_embeddings": 16}  # fmt: skip
    return Qwen3VLMoeConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen3VLMoeForConditionalGeneration"],
    )


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Return the matrices of one block."""
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (2048, 2048), "self_attn.k_proj.weight": (1024, 2048),
        "self_attn.v_proj.weight": (1024, 2048), "self_attn.o_proj.weight": (2048, 2048),
    }  # fmt: skip
    if kind == "dense":
        pairs = {"gate_proj": (6144, 2048), "up_proj": (6144, 2048), "down_proj": (2048, 6144)}
        return shapes | {f"mlp.{name}.weight": shape for name, shape in pairs.items()}
    shapes["mlp.gate.weight"] = (EXPERTS, 2048)
    if kind == "stacks":
        stacks = {"gate_up_proj": (EXPERTS, 2048, 2 * WIDTH), "down_proj": (EXPERTS, WIDTH, 2048)}
        return shapes | {f"mlp.experts.{name}": shape for name, shape in stacks.items()}
    for expert in range(EXPERTS):
        pairs = {"gate_proj": (WIDTH, 2048), "up_proj": (WIDTH, 2048), "down_proj": (2048, WIDTH)}
        shapes |= {f"mlp.experts.{expert}.{name}.weight": shape for name, shape in pairs.items()}
    return shapes


def make_checkpoint(folder: Path, layers: int, kind: str = "dense") -> int:
    """Write a random model of `layers` blocks; return its bytes."""
    config = config_of(kind, layers)
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
    decoder = "model.language_model" if kind == "stacks" else "model"
    units = ["embed"]
    writer.write(
        "embed",
        {
            f"{decoder}.embed_tokens.weight": normal(151_936, 2048),
            f"{decoder}.norm.weight": torch.ones(2048, dtype=torch.bfloat16),
        },
    )
    if kind == "stacks":
        tower = Qwen3VLMoeVisionModel._from_config(config.vision_config, dtype=torch.bfloat16)
        writer.write("tower", {f"model.visual.{name}": value for name, value in tower.state_dict().items()})
        units.append("tower")
    for layer in range(layers):
        tensors = {f"{decoder}.layers.{layer}.{name}": normal(*s) for name, s in shapes_of(kind).items()}
        tensors |= {
            f"{decoder}.layers.{layer}.{name}.weight": torch.ones(size, dtype=torch.bfloat16)
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


def measured(
    model: Path, kind: str, layers: int, size: int, method: str, settings: list[str], repeats: int
) -> dict[str, Any]:
    """Run a method a few times; return the run of the median peak, and print it."""
    runs = [peak_of(model, method, settings) for _ in range(repeats)]
    middle = sorted(runs, key=lambda run: run["peak_bytes"])[len(runs) // 2]
    found = {"model": kind, "layers": layers, "checkpoint_bytes": size, "method": method,
             "peaks": [run["peak_bytes"] for run in runs], **middle}  # fmt: skip
    print(f"{kind:8} {layers:3} layers {size / 1e9:5.2f} GB {method:13} peak {found['peak_bytes'] / 1e9:5.2f} GB "
          f"(planned {found['planned_bytes'] / 1e9:5.2f}) in {found['seconds']:.0f} s (planned {found['planned_seconds']:.0f})", flush=True)  # fmt: skip
    return found


def main() -> None:
    """Measure every depth and method, and the mixtures."""
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
    depths = [("dense", layers) for layers in map(int, arguments.layers.split(","))]
    raw = []
    try:
        for kind, layers in [*depths, *MIXTURES]:
            model = folder / f"{kind}-{layers}"
            size = make_checkpoint(model, layers, kind)
            for method, settings in (METHODS if kind == "dense" else MIXED).items():
                raw.append(measured(model, kind, layers, size, method, settings, arguments.repeats))
            shutil.rmtree(model)
    finally:
        shutil.rmtree(folder)
    bars = []
    for method in METHODS:
        runs = [item for item in raw if item["method"] == method and item["model"] == "dense"]
        limit = 0.25 * runs[-1]["checkpoint_bytes"] + 1.5e9
        bars.append(
            bar(f"{method}: peak bytes at the largest size", runs[-1]["peak_bytes"], limit, at_most=True)
        )
        for name in ("dense", "mixture"):
            found = [item for item in raw if item["method"] == method and item["model"] == name]
            few, many = found[0], found[-1]
            words = f"{method}: {name}, peak at {many['layers']} layers / at {few['layers']}"
            bars.append(bar(words, many["peak_bytes"] / few["peak_bytes"], 1.1, at_most=True))
    worst = max(abs(item["planned_bytes"] / item["peak_bytes"] - 1) for item in raw)
    bars.append(bar("the plan's peak against the measured one, worst of all", worst, WITHIN, at_most=True))
    write("ptq_memory", raw, bars)


if __name__ == "__main__":
    main()
