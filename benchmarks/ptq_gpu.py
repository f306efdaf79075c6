"""The same run on the CPU and on a GPU: do they give the same checkpoint, and does the GPU's evaluation agree?

Compresses the built-in model with every recipe on both devices and compares the stored tensors: codes that
differ, and the largest relative difference of a scale (static input scales come from forward passes whose
bfloat16 sums differ between devices). Needs a GPU.

    python benchmarks/ptq_gpu.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import angelslim
from angelslim.config.recipe import load, recipes
from angelslim.config.upstream import stages
from common import bar, write

SETTINGS = {
    "dataset__num_samples": 32,
    "dataset__max_seq_length": 512,
    "evaluation__samples": 50,
}


def compare(cpu: dict[str, torch.Tensor], gpu: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the share of codes that differ and the largest relative difference of a scale."""
    assert cpu.keys() == gpu.keys()
    codes = differing = 0
    scale = 0.0
    for name, tensor in cpu.items():
        a, b = tensor.float(), gpu[name].float()
        if "scale" in name:
            scale = max(scale, ((a - b).abs() / a.abs()).max().item())
        elif name.endswith(("weight", "weight_packed")):
            codes += a.numel()
            differing += int((tensor.view(torch.uint8) != gpu[name].view(torch.uint8)).sum())
    return {"codes_differing": differing / codes, "scale_difference": scale}


def main() -> None:
    """Run every recipe twice."""
    raw, bars = [], []
    with tempfile.TemporaryDirectory() as folder:
        rounding = [name for name in recipes() if stages(load(name).config)[-1].kind == "ptq"]
        for recipe in rounding:
            results = {}
            for device in ("cpu", "cuda"):
                out = Path(folder) / f"{recipe}-{device}"
                results[device] = angelslim.compress(
                    "tiny-lm", recipe, out=out, global__device=device, **SETTINGS
                )
            stored = [load_file(result.folder / "model.safetensors") for result in results.values()]
            scores = {
                device: {score.metric: score.value for score in result.report.after}
                for device, result in results.items()
            }
            found = {
                "recipe": recipe,
                **compare(*stored),
                "seconds": {device: result.report.seconds for device, result in results.items()},
                "scores": scores,
            }
            raw.append(found)
            print(found, flush=True)
            ratio = abs(scores["cuda"]["perplexity"] / scores["cpu"]["perplexity"] - 1)
            bars.append(
                bar(f"{recipe}: share of codes that differ", found["codes_differing"], 1e-3, at_most=True)
            )
            bars.append(
                bar(
                    f"{recipe}: relative difference of a scale", found["scale_difference"], 0.02, at_most=True
                )
            )
            bars.append(bar(f"{recipe}: perplexity, GPU against CPU", ratio, 0.01, at_most=True))
    write("ptq_gpu", raw, bars)


if __name__ == "__main__":
    main()
