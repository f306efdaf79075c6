"""What a fused rotation gains, and where it does not: KL to the original with and without `transform: SpinQuant`.

Every row is an ordinary run whose folder is opened again and judged in float32 on held-out text (`rivals/quality.py`).
`none` is the model as it is; `folded` only folds the norms' gains into the linears and unties the head
(rotation_mode Identity), which a rotation has to do first; `hadamard` and `random` rotate R1 and R2. Two models are bench-lm
given outliers without changing what it computes:

* `outliers` has a few channels of every norm's gain made 1024 times as large (`angelslim.lab.outliers`). Folding the gains
  undoes that by itself, so only the step from `folded` to `random` is the rotation's.
* `stream` has them in the residual stream, as large models do: it is rotated so that the four directions with most of the
  stream's energy are four channels.

    python -m angelslim lab train bench-lm --out bench-lm                # the model, once (minutes on a GPU)
    python benchmarks/ptq_rotation.py --bench-lm bench-lm [--work DIR] [--models tiny-lm,bench-lm,outliers,stream]

Finished rows stay in the work folder: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import angelslim
from angelslim.config.recipe import load
from angelslim.job import prepare
from angelslim.lab.outliers import plant_outliers
from angelslim.methods.rewrite.spin import Spin
from angelslim.models.builtin import builtin_model
from angelslim.models.loading import open_model
from angelslim.numerics.hadamard import Rotation
from angelslim.pipeline import run, tokenizer_of
from common import bar, write
from rivals.quality import Judge
from rivals.samples import held_out, write_calibration

PER_CHANNEL = "compression.quantization.quant_method.group_size=-1"
SCHEMES: dict[str, tuple[str, ...]] = {  # name -> recipe and overrides
    "W4 g128 RTN": ("int4_rtn",),
    "W4 g128 GPTQ": ("int4_gptq",),
    "W4 per channel RTN": ("int4_rtn", PER_CHANNEL),
    "W4 per channel GPTQ": ("int4_gptq", PER_CHANNEL),
    "W8A8 INT8 per token": ("int8_dynamic",),
    "W8A8 INT8 static": ("base", "compression.quantization.name=int8_static"),
    "W8A8 FP8 static": ("fp8_static",),
    "W4A8 INT8 per token": ("base", "compression.quantization.name=w4a8i8"),
    "W4A4 MXFP4": ("mxfp4",),
}
PLANTED = tuple(
    name for name in SCHEMES if "GPTQ" not in name and "MXFP4" not in name
)  # for models with outliers
BARS = (  # model, scheme, and what a rotation has to bring its KL down to, at most
    ("outliers", "W8A8 INT8 per token", 0.5),
    ("stream", "W4 per channel RTN", 0.85),
    ("stream", "W4 g128 RTN", 0.95),
    ("bench-lm", "W4 per channel GPTQ", 1.0),
    ("tiny-lm", "W4 per channel GPTQ", 1.0),
)
ROTATIONS: dict[str, tuple[str, int]] = {  # name -> rotation_mode and how many seeds it has
    "none": ("", 1),
    "folded": ("Identity", 1),
    "hadamard": ("Hadamard", 1),
    "random": ("Random", 2),
}


class Concentrate(Spin):
    """Rotates the stream so that its strongest directions become channels: a rotation for the worse."""

    def __init__(self, directions: Tensor) -> None:
        super().__init__({"rotation": ["R1"]})
        rest = torch.randn(len(directions), len(directions), generator=torch.Generator().manual_seed(0))
        basis, _ = torch.linalg.qr(torch.cat([directions, rest], 1)[:, : len(directions)].double())
        self.turn = Rotation((basis.contiguous(),), torch.ones(len(directions), dtype=torch.float64))

    def _rotation(self, name: str, size: int, seed: int) -> Rotation:
        return self.turn


def plant_in_stream(folder: Path, out: Path, ids: Tensor, channels: int = 4) -> None:
    """Write the model in `folder` with outlier channels in its residual stream."""
    with torch.no_grad():
        states = angelslim.load(folder)(input_ids=ids, output_hidden_states=True).hidden_states
    rows = torch.cat([state.flatten(0, 1).float() for state in states[1:-1]])
    rows = rows / rows.pow(2).mean(1, keepdim=True).sqrt()
    _, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    source = Concentrate(vectors[:, -channels:]).rewrite(open_model(folder))
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    config = json.loads((folder / "config.json").read_text("utf-8")) | source.edits
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = {name: source.checkpoint.read(name) for name in source.checkpoint.tensors}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def measure(
    model: Path, judge: Judge, scheme: str, rotation: str, seed: int, ids: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Compress once and judge."""
    recipe, *overrides = SCHEMES[scheme]
    overrides += [
        "evaluation.enabled=false",
        f"dataset.data_path={ids}",
        f"dataset.num_samples={options.samples}",
        f"dataset.max_seq_length={options.tokens}",
    ]
    mode = ROTATIONS[rotation][0]
    if mode:
        overrides += [
            "transform.name=SpinQuant",
            f"transform.spin_config.rotation_mode={mode}",
            f"transform.spin_config.seed={seed}",
        ]
    out: Path = options.work / "out"
    for folder in (out, out.with_name("out.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    record = run(prepare(load(recipe, overrides), model), out)
    found = judge.judge(out)
    return {"scheme": scheme, "rotation": rotation, "seed": seed, **found, "seconds": record.seconds}


def table(name: str, model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every scheme with every rotation on one model."""
    tokenizer = tokenizer_of(model)
    ids = write_calibration(
        options.work / f"{name}.safetensors", tokenizer, options.samples, options.tokens, 0
    )
    windows = held_out(tokenizer, options.windows, options.tokens)
    judge = Judge(model, tokenizer, windows, 0, options.work, f"{name}-{options.windows}x{options.tokens}")
    rows = []
    for scheme in SCHEMES if name in ("tiny-lm", "bench-lm") else PLANTED:
        for rotation, (_, seeds) in ROTATIONS.items():
            for seed in range(seeds):
                place = options.work / "rows" / f"{name}-{scheme}-{rotation}-{seed}.json".replace(" ", "_")
                if not place.is_file():
                    row = measure(model, judge, scheme, rotation, seed, ids, options)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_text(json.dumps({"model": name, **row}), "utf-8")
                rows.append(json.loads(place.read_text("utf-8")))
                print(f"{name:9} {scheme:20} {rotation:9} seed {seed}  KL {rows[-1]['kl']:.3e}", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return model -> scheme -> rotation -> mean KL over rotation seeds."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        schemes = found.setdefault(row["model"], {})
        schemes.setdefault(row["scheme"], {}).setdefault(row["rotation"], []).append(row["kl"])
    return {
        model: {
            scheme: {name: statistics.fmean(values) for name, values in rotations.items()}
            for scheme, rotations in schemes.items()
        }
        for model, schemes in found.items()
    }


def main() -> None:
    """Measure, and write the results with their bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bench-lm", type=Path, default=Path("bench-lm"), help="the trained model's folder")
    parser.add_argument("--models", default="tiny-lm,bench-lm,outliers,stream")
    parser.add_argument("--work", type=Path, default=Path(".rotation"), help="where finished rows are kept")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of a sample and of a held-out window")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        model = builtin_model(name) if name == "tiny-lm" else options.bench_lm
        if name == "outliers":
            model = options.work / "outliers-model"
            if not model.exists():
                plant_outliers(options.bench_lm, model)
        if name == "stream":
            model = options.work / "stream-model"
            if not model.exists():
                place = options.work / "bench-lm.safetensors"
                tokenizer = tokenizer_of(options.bench_lm)
                write_calibration(place, tokenizer, options.samples, options.tokens, 0)
                plant_in_stream(options.bench_lm, model, load_file(place)["input_ids"][:8])
        rows += table(name, model, options)
    means = summary(rows)
    bars = []
    for name, scheme, goal in BARS:
        if name in means:
            found = means[name][scheme]
            ratio = found["random"] / found["none"]
            bars.append(bar(f"{name}: KL of {scheme}, rotated over not", ratio, goal, at_most=True))
    settings = {key: getattr(options, key) for key in ("samples", "tokens", "windows", "threads")}
    write("ptq_rotation", {"settings": settings, "summary": means, "rows": rows}, bars)


if __name__ == "__main__":
    main()
