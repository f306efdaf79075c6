"""Static FP8 scales: what LeptoQuant gains over the ordinary ones, and what an FP8 key-value cache costs.

Models are the built-in one, as it is and with planted outliers (`angelslim.lab.outliers`: the same function, bit for
bit, with some channels of the norms' outputs so many times larger). Every checkpoint is written by an ordinary run and
opened again; the judge computes in float32, so that nothing but the compression differs. Figures are KL divergences
from the original in nats, on held-out text and on the calibration samples, for each calibration seed. CPU seconds are
those of the whole run, from reading to the written report.

    python benchmarks/fp8_scales.py [--seeds 3] [--factors 1,1024,4096,16384]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import angelslim
from angelslim.engine import compress
from angelslim.lab.outliers import plant_outliers
from angelslim.models.attention import watched
from angelslim.models.builtin import builtin_model
from angelslim.numerics.kv_cache import through_cache
from angelslim.numerics.scheme import FORMATS, PER_TENSOR, Quant
from angelslim.pipeline import tokenizer_of
from common import bar, write
from rivals import samples
from rivals.quality import in_float32, log_probabilities

SAMPLES, TOKENS, WINDOWS = 32, 256, 32
OBSERVER = "compression__quantization__observer"
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("fp8_static", {}),
    "static, percentile": ("fp8_static", {OBSERVER: "percentile"}),
    "static, mse": ("fp8_static", {OBSERVER: "mse"}),
    "lepto": ("fp8_lepto", {}),
    "lepto extended": ("fp8_lepto_extended", {}),
    "dynamic": ("fp8_dynamic", {}),
}
CACHE = "compression__quantization__quant_method__kv_cache"
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("fp8_static", {}),
    "static, cache per tensor": ("fp8_static_kv", {}),
    "static, cache per head": ("fp8_static_kv", {CACHE: "per-head"}),
}


class Judged:
    """A model, and what the original says on the held-out windows and on one calibration set."""

    def __init__(self, folder: Path, work: Path, seed: int) -> None:
        tokenizer = tokenizer_of(folder)
        self.folder, self.work = folder, work
        self.data = samples.write_calibration(
            work / f"ids-{seed}.safetensors", tokenizer, SAMPLES, TOKENS, seed
        )
        self.texts = {
            "held_out": samples.held_out(tokenizer, WINDOWS, TOKENS),
            "calibration": load_file(self.data)["input_ids"],
        }
        model = angelslim.load(in_float32(folder, work / "shadow"))
        self.original = {name: list(log_probabilities(model, ids)) for name, ids in self.texts.items()}

    def divergence(self, model: Any, text: str) -> float:
        """Return the mean KL divergence of a model from the original."""
        found = log_probabilities(model, self.texts[text])
        each = [
            (p.exp() * (p - q)).sum(-1).mean().item() for p, q in zip(self.original[text], found, strict=True)
        ]
        return statistics.fmean(each)

    def measure(self, recipe: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        """Compress once; return the figures and the folder."""
        out = Path(tempfile.mkdtemp(dir=self.work)) / "out"
        start = time.process_time()
        compress(
            str(self.folder), recipe, out=out, dataset__data_path=str(self.data), dataset__num_samples=SAMPLES,
            dataset__max_seq_length=TOKENS, evaluation__enabled=False, **settings,
        )  # fmt: skip
        cpu = time.process_time() - start
        model = angelslim.load(in_float32(out, self.work / "shadow"))
        layers = json.loads((out / "run.json").read_text("utf-8"))["layers"]
        choices = [layer["choice"] for layer in layers if layer.get("choice")]
        return {
            **{f"{text}_kl": self.divergence(model, text) for text in self.texts},
            "cpu_seconds": round(cpu, 2),
            "layers_changed": sum(not choice.startswith("alpha 0,") for choice in choices),
            "worst_block_error": max((float(choice.rpartition("x")[2]) for choice in choices), default=None),
        }, out


def cache_alone(judged: Judged, out: Path, roles: str) -> float:
    """Return the KL of the original model when only its keys and values (and queries) are rounded."""
    tensors, quant = load_file(out / "model.safetensors"), Quant(FORMATS["fp8_e4m3"], PER_TENSOR)
    model = angelslim.load(in_float32(judged.folder, judged.work / "shadow"))

    def rounded(module: Any, *states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            through_cache(x, tensors[f"model.layers.{module.layer_idx}.self_attn.{role}_scale"], quant)
            if role in roles
            else x
            for role, x in zip("qkv", states, strict=True)
        )
        return query, key, value

    with watched(model, rounded):
        return judged.divergence(model, "held_out")


def main() -> None:
    """Measure every recipe on every model and seed, write the results and their bars."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", default="1,1024,4096,16384")
    options = parser.parse_args()
    torch.set_num_threads(1)
    raw: list[dict[str, Any]] = []
    caches: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for factor in map(float, options.factors.split(",")):
            original = builtin_model("tiny-lm")
            model = (
                original
                if factor == 1
                else plant_outliers(original, work / f"times-{factor:g}", factor=factor)
            )
            for seed in range(options.seeds):
                judged = Judged(model, work, seed)
                for name, (recipe, settings) in RECIPES.items():
                    found = {
                        "factor": factor,
                        "recipe": name,
                        "seed": seed,
                        **judged.measure(recipe, settings)[0],
                    }
                    raw.append(found)
                    print(found, flush=True)
                for name, (recipe, settings) in CACHES.items() if factor == 1 else ():
                    found, out = judged.measure(recipe, settings)
                    if name.endswith("tensor"):
                        found |= {
                            f"only_{roles}_kl": cache_alone(judged, out, roles) for roles in ("kv", "qkv")
                        }
                    caches.append({"recipe": name, "seed": seed, **found})
                    print(caches[-1], flush=True)
    settings = {"model": "tiny-lm", "samples": SAMPLES, "tokens": TOKENS, "held_out_tokens": WINDOWS * TOKENS}
    write("fp8_scales", {**settings, "rows": raw, "caches": caches}, bars(raw, caches))


def bars(raw: list[dict[str, Any]], caches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare with the ordinary static scales: means over seeds, and medians of times."""

    def mean(rows: list[dict[str, Any]], name: str, figure: str, **given: Any) -> float:
        kept = [row for row in rows if row["recipe"] == name and given.items() <= row.items()]
        return statistics.fmean(row[figure] for row in kept)

    found = []
    for factor in dict.fromkeys(row["factor"] for row in raw):
        for name in ("lepto", "lepto extended"):
            for text in ("held_out", "calibration"):
                figures = [mean(raw, which, f"{text}_kl", factor=factor) for which in (name, "static")]
                words = f"outliers x{factor:g}, {text.replace('_', ' ')}: KL of {name} over static"
                found.append(bar(words, figures[0] / figures[1], 1.0, at_most=True))
    for name in ("lepto", "lepto extended"):
        own = [row for row in raw if row["recipe"] == name]
        worst = max(row["worst_block_error"] for row in own)
        found.append(bar(f"{name}: block error over static's, worst operator", worst, 1.0, at_most=True))
        plain = {(row["factor"], row["seed"]): row["cpu_seconds"] for row in raw if row["recipe"] == "static"}
        ratio = statistics.median(row["cpu_seconds"] / plain[row["factor"], row["seed"]] for row in own)
        found.append(bar(f"{name}: CPU time over static's", ratio, 3.0, at_most=True))
    for name in list(CACHES)[1:]:
        ratio = mean(caches, name, "held_out_kl") / mean(caches, "static", "held_out_kl")
        found.append(bar(f"KL of {name} over static", ratio, 2.0, at_most=True))
    return found


if __name__ == "__main__":
    main()
