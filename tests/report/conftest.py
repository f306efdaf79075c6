"""Records made by hand: plausible figures, no model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache

import pytest

from angelslim.evaluate.base import Score
from angelslim.numerics.error import Histogram, LayerRecord
from angelslim.report.record import RunRecord

ROLES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
METHODS = {  # bits, SQNR of a typical layer, bytes, perplexity, addition, tokens/s, weight levels
    "fp8_static": (8.0, 31.5, 7_390_000, 9.871, 99.0, 219.0, 64),
    "int8_dynamic": (8.06, 39.4, 7_410_000, 9.858, 98.5, 204.0, 64),
    "int4_gptq": (4.25, 19.8, 4_900_000, 10.213, 93.5, 231.0, 16),
}


@cache
def bell(levels: int) -> Histogram:
    """A normal distribution before, and its mass on `levels` of the 64 bins after."""
    before = [round(20_000 * math.exp(-((index - 31.5) ** 2) / 98)) for index in range(64)]
    after = [0] * 64
    for index, count in enumerate(before):
        after[index * levels // 64 * 64 // levels] += count
    return Histogram(-0.21, 0.21, before, after)


def build(
    method: str = "fp8_static", blocks: int = 6, evaluated: bool = True, model: str = "lab/tiny-lm"
) -> RunRecord:
    bits, level, stored, perplexity, addition, speed, levels = METHODS[method]
    rng = random.Random(method)
    layers = []
    for block in range(blocks):
        for role, shape in ROLES.items():
            sqnr = level + rng.gauss(0, 0.7) - 0.3 * block - (2.5 if role == "mlp.down_proj" else 0)
            layers.append(
                LayerRecord(
                    name=f"model.layers.{block}.{role}",
                    block=block,
                    scheme="W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static",
                    shape=shape,
                    bits_per_weight=bits,
                    sqnr_db=sqnr,
                    relative_error=10 ** (-sqnr / 20),
                    weights=bell(levels),
                    activations=bell(64) if method == "fp8_static" else None,
                    input_scale=0.0123 * (block + 1) if method == "fp8_static" else None,
                )
            )
    before = [
        Score("perplexity", 9.842, "", "lower", 16383, 0.21),
        Score("addition", 99.5, "%", "higher", 200, 0.5),
        Score("recall", 100.0, "%", "higher", 200, 0.0),
        Score("decode", 246.0, "tokens/s", "higher", 3),
        Score("ttft", 31.2, "ms", "lower", 3),
    ]
    after = [
        Score("perplexity", perplexity, "", "lower", 16383, 0.22),
        Score("addition", addition, "%", "higher", 200, 1.1),
        Score("recall", 97.0, "%", "higher", 200, 1.2),
        Score("decode", speed, "tokens/s", "higher", 3),
        Score("ttft", 35.9, "ms", "lower", 3),
    ]
    return RunRecord(
        method=method,
        model=model,
        model_type="qwen3",
        scheme="W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static",
        format="compressed-tensors (float-quantized)",
        parameters=5_832_192,
        bytes_before=11_670_000,
        bytes_after=stored,
        bits_per_weight=bits,
        seconds=41.3,
        peak_memory_bytes=913_000_000,
        layers=layers,
        skipped={
            "lm_head": "shares its weight with the embedding",
            "model.embed_tokens": "not a linear layer",
        },
        before=before if evaluated else [],
        after=after if evaluated else [],
        config={
            "model": {"path": model, "dtype": "bfloat16"},
            "compression": {"name": "PTQ", "quantization": {"name": method, "ignore_layers": ["lm_head"]}},
            "dataset": {"num_samples": 64, "max_seq_length": 512},
        },
        provenance={
            "model.path": "override",
            "model.dtype": "default",
            "compression.quantization.name": f"recipes/{method}.yaml",
            "dataset.num_samples": "override",
        },
        command=f"angelslim run {method} {model} dataset.num_samples=64",
        seed=0,
        versions={"angelslim": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        hashes={"model.safetensors": "ab" * 32, "config.json": "cd" * 32},
        warnings=["2 of 64 samples were shorter than 16 tokens and were left out."],
    )


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    return build


@pytest.fixture
def record() -> RunRecord:
    return build()


@pytest.fixture
def three() -> list[RunRecord]:
    return [build(method) for method in METHODS]
