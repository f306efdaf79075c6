"""Four-bit GGUF files in stock llama.cpp: ours against those that llama.cpp's own quantizer makes.

The judge is llama.cpp itself: the KL divergence of its logits from the original model's in float32, in nats a token, and
the perplexity, on held-out text. Its quantizer works without data (no importance matrix); embeddings stay in 16 bits on
both sides. `gguf_q4_0_best` is calibrated on the built-in text with three seeds. Needs the environment that `make engines`
makes (`.venv-llama`).

    python benchmarks/gguf_four_bits.py [--model tiny-lm]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENGINE = HERE.parent / ".venv-llama" / "bin" / "python"
THEIRS = {"Q4_0": 2, "Q4_1": 3, "Q4_K_S": 14, "Q4_K_M": 15}  # llama.cpp's types of files
SEEDS, WINDOW, TOKENS = (0, 1, 2), 512, 8192
DATA = {"dataset__num_samples": 64, "dataset__max_seq_length": 512}
F16 = 1


def make(model: str, work: Path) -> list[str]:
    """Write the original and our files as GGUF, and what the original says of the held-out text."""
    import numpy as np
    import torch

    import angelslim
    from angelslim.convert import convert
    from angelslim.evaluate.perplexity import nll_per_token
    from angelslim.evaluate.suite import evaluation_text
    from angelslim.export.files.gguf import write_model
    from angelslim.models.loading import open_model
    from angelslim.pipeline import tokenizer_of

    source = open_model(model)
    write_model(source, work / "original.gguf", {})
    runs = [("gguf_q4_0", 0), *(("gguf_q4_0_best", seed) for seed in SEEDS)]
    for recipe, seed in runs:
        out = work / f"{recipe}-{seed}"
        angelslim.compress(model, recipe, out=out, global__seed=seed, evaluation__enabled=False, **DATA)
        convert(out, "gguf", out.with_name(f"{out.name}.gguf"))
    network, tokenizer = angelslim.load(model).float(), tokenizer_of(source.folder)
    scored = nll_per_token(
        network, tokenizer, evaluation_text(), window=WINDOW, stride=WINDOW, max_tokens=TOKENS
    )
    windows = [scored.ids[each.begin : each.end + 1] for each in scored.windows]
    with torch.no_grad():
        wanted = [network(ids[None, :-1]).logits[0].log_softmax(-1) for ids in windows]
    arrays = {f"ids{n}": ids.numpy() for n, ids in enumerate(windows)}
    np.savez(work / "wanted.npz", **arrays, **{f"log{n}": each.numpy() for n, each in enumerate(wanted)})
    return [f"{recipe}-{seed}" for recipe, seed in runs]


def judge(work: Path, ours: list[str], engine_of: Any) -> list[dict[str, Any]]:
    """Inside llama.cpp's environment: make its own files, then score all of them."""
    import ctypes

    import numpy as np

    for name, kind in THEIRS.items():
        asked = engine_of.llama_model_quantize_default_params()
        asked.ftype, asked.nthread, asked.token_embedding_type, asked.output_tensor_type = kind, 1, F16, F16
        source, target = (str(work / f"{stem}.gguf").encode() for stem in ("original", name))
        assert engine_of.llama_model_quantize(source, target, ctypes.byref(asked)) == 0, name
    wanted = np.load(work / "wanted.npz")
    count = sum(name.startswith("ids") for name in wanted.files)
    rows = []
    for name in ("original", *THEIRS, *ours):
        file = work / f"{name}.gguf"
        engine = engine_of.Llama(
            str(file), n_ctx=2 * WINDOW, n_batch=2 * WINDOW, n_threads=1, n_threads_batch=1,
            logits_all=True, verbose=False,
        )  # fmt: skip
        lost, likelihoods = [], []
        for number in range(count):
            ids, before = wanted[f"ids{number}"].tolist(), wanted[f"log{number}"].astype(np.float64)
            engine.reset()
            engine.eval(ids)
            after = np.asarray(engine.scores[: len(ids) - 1], dtype=np.float64)
            after -= after.max(axis=1, keepdims=True)
            after -= np.log(np.exp(after).sum(axis=1, keepdims=True))
            lost.append((np.exp(before) * (before - after)).sum(axis=1))
            likelihoods.append(-after[np.arange(len(ids) - 1), ids[1:]])
        figures = {
            "kl": float(np.concatenate(lost).mean()),
            "perplexity": float(np.exp(np.concatenate(likelihoods).mean())),
        }
        rows.append({"file": name, "bytes": file.stat().st_size, **figures})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Make the files, let llama.cpp judge them, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-lm")
    parser.add_argument("--judge", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge:
        import llama_cpp

        folder, *ours = options.judge
        rows = judge(Path(folder), ours, llama_cpp)
        (Path(folder) / "rows.json").write_text(json.dumps(rows), "utf-8")
        return
    from common import bar, write

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        ours = make(options.model, work)
        subprocess.run([ENGINE, HERE / "gguf_four_bits.py", "--judge", work, *ours], check=True)
        rows = json.loads((work / "rows.json").read_text("utf-8"))
    kl = {row["file"]: row["kl"] for row in rows}
    best = statistics.fmean(kl[f"gguf_q4_0_best-{seed}"] for seed in SEEDS)
    bars = [bar(f"KL of gguf_q4_0_best over {name}", best / kl[name], 1.0, at_most=True) for name in THEIRS]
    bars.append(bar("KL of gguf_q4_0 over Q4_0", kl["gguf_q4_0-0"] / kl["Q4_0"], 1.0, at_most=True))
    size = {row["file"]: row["bytes"] for row in rows}
    bars.append(bar("bytes of gguf_q4_0_best over Q4_K_S", size["gguf_q4_0_best-0"] / size["Q4_K_S"], 1.0, at_most=True))  # fmt: skip
    write("gguf_four_bits", {"model": options.model, "rows": rows}, bars)


if __name__ == "__main__":
    sys.exit(main())
