"""One process against two under torchrun, which share the samples, the experts and the rounding through NCCL.

A random Qwen3 mixture of experts is sent through static FP8 and GPTQ INT4, by one process on one GPU and by two on two
GPUs, from the same token ids. Compared are the written codes and scales, the seconds of the runs (both recipes in one
process each, so starting Python and CUDA is left out) and the largest GPU memory of each process. Ranges are the same
numbers. Sums over samples are rounded in another order; GPTQ passes such a difference on from column to column and block
to block, so that its codes may differ while its errors do not. Without two GPUs the same runs with gloo on the CPU, to
try the script.

    python benchmarks/ptq_two_gpus.py [--folder DIR] [--json results.json] [--small]

The results file is written again after every step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECIPES = {"fp8_static": 0.0, "int4_gptq": 0.01}  # -> share of codes that may differ
PROCESSES = 2
SAME_SCALES = 0.01  # largest relative difference of a static input scale


def make(folder: Path, *, small: bool) -> None:
    """Write the random mixture and the token ids."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import angelslim

    width = 256 if small else 1024
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=2 * width, moe_intermediate_size=width // 2,
        num_hidden_layers=2, num_attention_heads=4 if small else 16, num_key_value_heads=4,
        head_dim=width // (4 if small else 16), num_experts=4 if small else 32, num_experts_per_tok=4,
        tie_word_embeddings=False, dtype="bfloat16", eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # any will do: the samples are token ids
        shutil.copyfile(angelslim.builtin_model("tiny-lm") / name, folder / "model" / name)
    ids = torch.randint(0, 4096, (8, 128) if small else (64, 1024))
    save_file({"input_ids": ids}, folder / "ids.safetensors")


def work(folder: Path, name: str) -> None:
    """Compress with every recipe, alone or as one of torchrun's processes; write what this process measured."""
    import torch
    from safetensors.torch import load_file

    from angelslim.base import parallel
    from angelslim.engine import compress

    samples, tokens = load_file(folder / "ids.safetensors")["input_ids"].shape
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        compress(
            folder / "model", recipe, out=folder / f"{name}-{recipe}", global__device="cuda" if cuda else "cpu",
            dataset__data_path=str(folder / "ids.safetensors"), dataset__num_samples=samples,
            dataset__max_seq_length=tokens, evaluation__enabled=False,
        )  # fmt: skip
        found[recipe] = {
            "seconds": round(time.perf_counter() - start, 2),
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
            "world": parallel.world(),
        }
        (folder / f"{name}-{parallel.rank()}.json").write_text(json.dumps(found), "utf-8")


def compared(one: Path, two: Path) -> dict[str, Any]:
    """Return the share of codes that differ and the largest relative difference of each kind of scale."""
    import torch

    from angelslim.export._checkpoint import QuantizedCheckpoint, open_any

    sides = [open_any(folder).checkpoint for folder in (one, two)]
    codes = differing = 0
    worst = {"weight_scale": 0.0, "input_scale": 0.0}
    assert isinstance(sides[0], QuantizedCheckpoint) and isinstance(sides[1], QuantizedCheckpoint)
    assert sides[0].schemes.keys() == sides[1].schemes.keys()
    for layer in sides[0].schemes:
        a, b = (side.restore(layer) for side in sides)
        codes += a.weight.codes.numel()
        differing += int((a.weight.codes.float() != b.weight.codes.float()).sum())
        for name, x, y in (
            ("weight_scale", a.weight.scale, b.weight.scale),
            ("input_scale", a.input_scale, b.input_scale),
        ):
            if x is not None and y is not None:
                gap = ((x.float() - y.float()).abs() / x.float().abs().clamp(min=1e-30)).max()
                worst[name] = max(worst[name], float(gap))
    errors = [
        {layer["name"]: layer["relative_error"] for layer in json.loads((f / "run.json").read_text())["layers"]}
        for f in (one, two)
    ]  # fmt: skip
    ratio = torch.tensor([errors[1][name] / errors[0][name] for name in errors[0]])
    return {
        "layers": len(errors[0]),
        "codes_differing": differing / codes,
        **{f"{name}_difference": value for name, value in worst.items()},
        "relative_error_ratio": [float(ratio.min()), float(ratio.max())],
    }


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say what has to hold of the recipes that were compared."""
    from common import bar

    found = []
    for row in rows:
        name, most = row["recipe"], RECIPES[row["recipe"]]
        found.append(bar(f"{name}: share of codes that differ", row["codes_differing"], most, at_most=True))
        for kind in ("weight_scale", "input_scale"):
            value = row[f"{kind}_difference"]
            found.append(bar(f"{name}: relative difference of a {kind}", value, SAME_SCALES, at_most=True))
        worst = max(row["relative_error_ratio"])
        found.append(bar(f"{name}: error of a layer's weight over one process's", worst, 1.01, at_most=True))
        ratio = row["seconds_two"] / row["seconds_one"]
        found.append(bar(f"{name}: seconds of two processes over one", ratio, 1.0, at_most=True))
    return found


def main() -> None:
    """Make the model, run it both ways, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/angelslim-two-gpus"))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "ptq_two_gpus.json")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script anywhere")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.folder, options.worker)
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    make(options.folder, small=options.small)
    me = [str(HERE / "ptq_two_gpus.py"), "--folder", str(options.folder), "--worker"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    programs = {"one": [sys.executable, *me, "one"], "two": [sys.executable, *torchrun, *me, "two"]}
    state: dict[str, Any] = {}
    for name, program in programs.items():
        ended = subprocess.run(program, cwd=HERE, env=os.environ | {"NCCL_NVLS_ENABLE": "0"}, check=False)
        files = sorted(options.folder.glob(f"{name}-[0-9].json"))
        state[name] = [json.loads(file.read_text("utf-8")) for file in files]
        state[f"{name}_exit"] = ended.returncode
        report(options, state)
    shutil.rmtree(options.folder)


def report(options: argparse.Namespace, state: dict[str, Any]) -> None:
    """Write what is known so far."""
    from common import bar, write

    rows = []
    for recipe in RECIPES:
        runs = {
            name: [each[recipe] for each in state.get(name, ()) if recipe in each] for name in ("one", "two")
        }
        folders = [options.folder / f"{name}-{recipe}" for name in runs]
        if all(runs.values()) and all(folder.is_dir() for folder in folders):
            seconds = {f"seconds_{name}": max(x["seconds"] for x in found) for name, found in runs.items()}
            peaks = {
                f"gpu_peak_bytes_{name}": [x["gpu_peak_bytes"] for x in found] for name, found in runs.items()
            }
            rows.append({"recipe": recipe, **compared(*folders), **seconds, **peaks})
    exits = [bar(f"exit code of {x}", state[f"{x}_exit"], 0, at_most=True) for x in ("one", "two") if f"{x}_exit" in state]  # fmt: skip
    raw = {"rows": rows, "processes": state}
    path = write(options.json.stem, raw, [*bars_of(rows), *exits], options.json.resolve().parent)
    print(path.read_text("utf-8"), flush=True)


if __name__ == "__main__":
    main()
