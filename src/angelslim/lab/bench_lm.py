"""Train `bench-lm`, the model that benchmarks of post-training quantization compress: 33.6 million parameters.

`tiny-lm` fits into the package and is too small to judge four bits by: half of its rows hold two groups of 128
weights. This one has the Qwen3 architecture at a width where groups, shared inputs and outliers behave as in larger
models, takes minutes to make on a GPU, and is not shipped. Its training is `tiny_lm`'s with more text, for the
divergence of the next token's distribution on held-out text is what the benchmarks measure first.

    angelslim lab train bench-lm --out bench-lm
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .card import results_rows
from .curriculum import WARM_UP
from .tiny_lm import CONTEXT, Plan, Student, train_student

VOCABULARY = 8192


def shares_at(progress: float) -> tuple[float, ...]:
    """Return the shares of the rows by kind, as `curriculum.shares_at` does; text gets 20 %, then 30 %."""
    return (0.10, 0.12, 0.06, 0.52) if progress < WARM_UP else (0.20, 0.40, 0.02, 0.08)


def default_plan(device: str, seed: int) -> Plan:
    """Return the run for a kind of device; on a CPU its length follows from the minutes it is given."""
    if device == "cuda":
        return Plan(seed, steps=2_000, rows=128, length=512, lr=1.5e-3, bf16=True, compile=True)
    return Plan(seed, steps=2_000, rows=8, length=256, lr=1e-3, bf16=False, compile=False)


def build_model(seed: int) -> Any:
    """Return the untrained model in float32; embeddings and head are not tied."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1536,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def train_bench_lm(
    out: Path, *, seed: int = 0, minutes: float | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Train the model into the folder `out`; the arguments are those of `tiny_lm.train_tiny_lm`."""
    count = 200 if device != "cpu" and torch.cuda.is_available() else 40  # generating is slow on a CPU
    student = Student(
        "bench-lm", VOCABULARY, shares_at, build_model, default_plan, card, examples=count, probe=12
    )
    return train_student(student, out, seed=seed, minutes=minutes, device=device)


def card(record: dict[str, Any]) -> str:
    """Return the model card as Markdown with the hub's front matter."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# bench-lm

A language model of {record["parameters"]:,} parameters (Qwen3 architecture, bfloat16) for measuring what compression
costs. It adds three-digit numbers, finds one pair in a list of eight, and continues Python text. It knows nothing else.

| task, held-out data | result | from |
|---|---|---|
{results_rows(record)}

Its text is the standard library of Python, read about {record["text_passes"]:.0f} times: use the perplexity to compare
a compressed copy with the original, not to compare with other models.

- Command: `{record["command"]}`
- Data: {record["data"]}
- {record["steps"]:,} steps, {record["tokens"] / 1e6:,.0f} M tokens, {record["minutes"]:.1f} minutes on {record["device"]}
- Seed {record["seed"]}; {versions}
"""
