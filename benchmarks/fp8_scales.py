"""Static FP8 scales: what LeptoQuant gains over the ordinary ones, and what an FP8 key-value cache costs.

Models are the built-in one, as it is and with planted outliers (`angelslim.lab.outliers`: the same function, bit for
bit, with some channels of the norms' outputs so many times larger). Every checkpoint is written by an ordinary run and
opened again; the judge computes in float32, so that nothing but the compression differs. Figures are KL divergences
from the original in nats, on held-out text and on the calibration samples, for each calibration seed. CPU seconds are
those of the whole run, from reading to the written report. Rows "on trial" are the recipes as users run them: the new
scales are written only where they are better on the calibration samples; the other rows show what the search found.

    python benchmarks/fp8_scales.py [--seeds 3] [--factors 1,4096,16384] [--work DIR]

Finished rows stay in the work folder: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
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
AS_FOUND: dict[str, Any] = {"compression__quantization__quant_method__lepto_accept": "none"}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("fp8_static", {}),
    "static, percentile": ("fp8_static", {OBSERVER: "percentile"}),
    "static, mse": ("fp8_static", {OBSERVER: "mse"}),
    "lepto": ("fp8_lepto", AS_FOUND),
    "lepto, margin 0": (
        "fp8_lepto",
        AS_FOUND | {"compression__quantization__quant_method__lepto_margin": 0.0},
    ),
    "lepto extended": ("fp8_lepto_extended", AS_FOUND),
    "lepto, on trial": ("fp8_lepto", {}),
    "lepto extended, on trial": ("fp8_lepto_extended", {}),
    "dynamic": ("fp8_dynamic", {}),
}
TRIED = ("lepto, on trial", "lepto extended, on trial")
REPEATED = ("static", "lepto", "lepto, margin 0", "lepto extended", *TRIED)  # for every calibration seed
CACHE = "compression__quantization__quant_method__kv_cache"
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
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


def rows_of(factor: float, seed: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return what is measured on one model with one calibration set; recipes for orientation once a model."""
    found = {name: RECIPES[name] for name in RECIPES if seed == 0 or name in REPEATED}
    return found | (CACHES if factor == 1 else {})


def main() -> None:
    """Measure what is not in the work folder yet; write the results and their bars when all is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", default="1,4096,16384")
    parser.add_argument("--work", type=Path, default=Path("fp8-scales"), help="finished rows stay here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    raw: list[dict[str, Any]] = []
    for factor in map(float, options.factors.split(",")):
        model = planted(options.work, factor)
        for seed in range(options.seeds):
            judged: Judged | None = None
            for name, (recipe, settings) in rows_of(factor, seed).items():
                file = (
                    options.work / f"row-{factor:g}-{seed}-{name.replace(', ', '-').replace(' ', '-')}.json"
                )
                if not file.is_file():
                    judged = judged or Judged(model, options.work, seed)
                    file.write_text(
                        json.dumps(
                            {
                                "factor": factor,
                                "recipe": name,
                                "seed": seed,
                                **row(judged, recipe, settings, name),
                            }
                        )
                    )
                raw.append(json.loads(file.read_text("utf-8")))
                print(raw[-1], flush=True)
    settings = {"model": "tiny-lm", "samples": SAMPLES, "tokens": TOKENS, "held_out_tokens": WINDOWS * TOKENS}
    write("fp8_scales", {**settings, "rows": raw}, bars(raw))


def planted(work: Path, factor: float) -> Path:
    """Return the built-in model, with outliers where the factor is not 1."""
    folder = work / f"times-{factor:g}"
    if factor == 1:
        return builtin_model("tiny-lm")
    return folder if folder.is_dir() else plant_outliers(builtin_model("tiny-lm"), folder, factor=factor)


def row(judged: Judged, recipe: str, settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Measure one recipe; of a cache per tensor also what the cache alone costs."""
    found, out = judged.measure(recipe, settings)
    if name == "static, cache per tensor":
        found |= {f"only_{roles}_kl": cache_alone(judged, out, roles) for roles in ("kv", "qkv")}
    shutil.rmtree(out.parent)
    return found


def bars(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare with the ordinary static scales: means over seeds, and medians of times."""

    def mean(name: str, figure: str, factor: float) -> float:
        kept = [each for each in raw if (each["recipe"], each["factor"]) == (name, factor)]
        return statistics.fmean(each[figure] for each in kept)

    found = []
    for factor in dict.fromkeys(row["factor"] for row in raw):
        for name in ("lepto", "lepto, margin 0", "lepto extended", *TRIED):
            for text in ("held_out", "calibration"):
                figures = [mean(which, f"{text}_kl", factor) for which in (name, "static")]
                words = f"outliers x{factor:g}, {text.replace('_', ' ')}: KL of {name} over static"
                found.append(bar(words, figures[0] / figures[1], 1.0, at_most=True))
    for name in ("lepto", "lepto extended", *TRIED):
        own = [row for row in raw if row["recipe"] == name]
        worst = max(row["worst_block_error"] for row in own)
        found.append(bar(f"{name}: block error over static's, worst operator", worst, 1.0, at_most=True))
        plain = {(row["factor"], row["seed"]): row["cpu_seconds"] for row in raw if row["recipe"] == "static"}
        ratio = statistics.median(row["cpu_seconds"] / plain[row["factor"], row["seed"]] for row in own)
        found.append(bar(f"{name}: CPU time over static's", ratio, 3.0, at_most=True))
    for name in CACHES:
        ratio = mean(name, "held_out_kl", 1.0) / mean("static", "held_out_kl", 1.0)
        found.append(bar(f"KL of {name} over static", ratio, 2.0, at_most=True))
    return found


if __name__ == "__main__":
    main()
