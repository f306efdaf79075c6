"""What four bits cost: rounding, GPTQ and GPTAQ on the built-in model, by KL divergence from the original.

Every checkpoint is written by an ordinary run and opened again, so what is measured is what engines load. Text is
Python's own, the evaluation split; calibration draws from the calibration split. KL is the mean over tokens of
``KL(original || compressed)`` in nats. Rounding needs no data; the others run once for each calibration seed, and
the bars compare means over seeds. Each bar's goal is on the ratio of two means measured in this run.

    python benchmarks/ptq_four_bits.py [--seeds 3] [--samples 64]
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import angelslim
from angelslim.config.recipe import load as load_recipe
from angelslim.data import builtin
from angelslim.job import prepare
from angelslim.models.loading import resolve
from angelslim.pipeline import run, tokenizer_of
from common import bar, write

MODEL, WINDOW, WINDOWS, CALIBRATION_TOKENS = "tiny-lm", 512, 64, 512
METHODS = {"RTN": "int4_rtn", "GPTQ": "int4_gptq", "GPTAQ": "int4_gptaq"}
GROUPS = (128, 32)


def held_out(windows: int) -> Tensor:
    """Return token ids ``[windows, WINDOW]`` of text that no calibration sample contains."""
    tokenizer = tokenizer_of(resolve(MODEL))
    text = "\n".join(builtin.text("evaluation", windows * WINDOW * 6))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(ids) >= windows * WINDOW, "not enough held-out text"
    return torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)


def logits(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Yield the log-probabilities ``[WINDOW, vocabulary]`` of one window after another, in float32."""
    with torch.inference_mode():
        for window in ids:
            yield model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)


def quality(model: Any, ids: Tensor, original: list[Tensor]) -> dict[str, float]:
    """Return KL to the original, agreement of the most likely token, and perplexity."""
    divergence = same = loss = 0.0
    for window, before, after in zip(ids, original, logits(model, ids), strict=True):
        before = before.float()
        divergence += (before.exp() * (before - after)).sum(-1).mean().item()
        same += (before.argmax(-1) == after.argmax(-1)).float().mean().item()
        loss += functional.nll_loss(after[:-1], window[1:]).item()
    count = len(ids)
    return {"kl": divergence / count, "top1": same / count, "perplexity": math.exp(loss / count)}


def measure(
    method: str, group: int, seed: int, samples: int, ids: Tensor, original: list[Tensor]
) -> dict[str, Any]:
    """Compress once and measure."""
    overrides = [
        f"compression.quantization.quant_method.group_size={group}",
        f"global.seed={seed}",
        f"dataset.num_samples={samples}",
        f"dataset.max_seq_length={CALIBRATION_TOKENS}",
        "evaluation.enabled=false",
    ]
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        record = run(prepare(load_recipe(METHODS[method], overrides), MODEL), Path(folder) / "out")
        cpu = time.process_time() - start
        found = quality(angelslim.load(Path(folder) / "out"), ids, original)
    return {
        "method": method,
        "group": group,
        "seed": seed,
        **found,
        "bits_per_weight": record.bits_per_weight,
        "cpu_seconds": round(cpu, 2),
        "peak_memory_bytes": record.peak_memory_bytes,
        "warnings": record.warnings,
    }


def main() -> None:
    """Measure every method at every group size, write the results and their bars."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = held_out(WINDOWS)
    original = [values.half() for values in logits(angelslim.load(MODEL), ids)]
    raw: list[dict[str, Any]] = []
    bars = []
    for group in GROUPS:
        mean = {}
        for method in METHODS:
            seeds = range(1 if method == "RTN" else options.seeds)
            rows = [measure(method, group, seed, options.samples, ids, original) for seed in seeds]
            raw += rows
            mean[method] = statistics.fmean(row["kl"] for row in rows)
            for row in rows:
                print(
                    f"g{group:<4} {method:6} seed {row['seed']}  KL {row['kl']:.5f}  top-1 {row['top1']:.4f}  "
                    f"perplexity {row['perplexity']:.3f}  CPU {row['cpu_seconds']:.1f} s",
                    flush=True,
                )
        name = f"group {group}: KL of"
        bars.append(bar(f"{name} GPTQ over RTN", mean["GPTQ"] / mean["RTN"], 0.75, at_most=True))
        bars.append(bar(f"{name} GPTAQ over GPTQ", mean["GPTAQ"] / mean["GPTQ"], 1.0, at_most=True))
    loss = [
        functional.nll_loss(before[:-1].float(), window[1:]).item()
        for before, window in zip(original, ids, strict=True)
    ]
    setting = {
        "model": MODEL,
        "tokens": ids.numel(),
        "samples": options.samples,
        "calibration_tokens": CALIBRATION_TOKENS,
    }
    write(
        "ptq_four_bits",
        {**setting, "perplexity_of_original": math.exp(statistics.fmean(loss)), "rows": raw},
        bars,
    )


if __name__ == "__main__":
    main()
