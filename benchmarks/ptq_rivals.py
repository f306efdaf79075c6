"""Post-training quantization against the tools that people use for it: quality, time and memory, side by side.

Every tool compresses the same model with the same token ids, in a process and an environment of its own
(`rivals/run_TOOL.py`), and one judge opens what it wrote (`rivals/quality.py`): KL to the original on held-out text,
top-1, perplexity, accuracy. Within a seed the tools of a recipe run one after another, in an order that turns from seed
to seed; bars compare means over seeds (quality) or medians of the ratios within seeds (time, memory). Our call is a whole
run, reading the model and writing the result included; the other tools' calls (`call_seconds`) are the call alone,
`work_seconds` has their loading and saving, `seconds` the whole process.

    python benchmarks/ptq_rivals.py --setup .rivals                      # the environments, once (also: make rivals)
    python -m angelslim lab train bench-lm --out bench-lm                # the model, once (minutes on a GPU)
    python benchmarks/ptq_rivals.py --rivals .rivals --bench-lm bench-lm [--work DIR] [--only bench-lm/llmcompressor:gptq]

Finished rows stay in the work folder: the same command goes on where it stopped. `--only` takes parts of
MODEL/TOOL:RECIPE, separated by commas, and leaves the rest out; bars without all their figures are left out too, and what
is only a part is written into the work folder instead of `results/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from angelslim.lab.outliers import plant_outliers
from angelslim.models.builtin import builtin_model
from common import RESULTS, write
from rivals import environments
from rivals.bars import all_bars, gains, summary
from rivals.measure import Bench, Entry, Settings, Subject

LC, GM, PUBLISHED, OURS = "llmcompressor", "gptqmodel", "published", "angelslim"

MODELS = ("bench-lm", "tiny-lm", "outliers")
GROUPS = (  # what is compared with one another runs together
    (Entry(LC, "rtn_w4"), Entry(OURS, "rtn_w4")),
    (
        Entry(LC, "gptq_w4"),
        Entry(GM, "gptq_w4"),
        Entry(GM, "gptq_w4_mse"),
        Entry(OURS, "gptq_w4"),
        Entry(OURS, "gptq_w4_plain"),
    ),
    (
        Entry(GM, "gptaq_w4"),
        Entry(GM, "gptaq_w4_mse"),
        Entry(OURS, "gptaq_w4"),
        Entry(OURS, "gptaq_w4_plain"),
    ),
    (Entry(LC, "awq_w4"), Entry(OURS, "awq_w4")),
    (
        Entry(LC, "autoround_w4"),
        Entry(OURS, "autoround_w4"),
        Entry(OURS, "best_w4"),
        Entry(OURS, "best_asym_w4"),
    ),
    (Entry(LC, "smooth_gptq_w8a8"), Entry(OURS, "smooth_gptq_w8a8")),
    (Entry(LC, "fp8_static"), Entry(PUBLISHED, "fp8_static"), Entry(OURS, "fp8_static")),
    (
        Entry(LC, "fp8_dynamic"),
        Entry(LC, "fp8_dynamic_model_free"),
        Entry(PUBLISHED, "fp8_dynamic"),
        Entry(OURS, "fp8_dynamic_first"),
        Entry(OURS, "fp8_dynamic"),
    ),
)
OUTLIERS = (  # on the model with planted outliers: ours against ours
    (Entry(OURS, "int8_dynamic"), Entry(OURS, "int8_smooth")),
    (Entry(OURS, "fp8_static"), Entry(OURS, "fp8_lepto"), Entry(OURS, "fp8_lepto_extended")),
)


def subjects(options: argparse.Namespace, settings: Settings) -> list[tuple[Subject, Any]]:
    """Return each model with the groups that it is measured on."""
    work: Path = options.work
    found: list[tuple[Subject, Any]] = []
    names = options.models.split(",")
    if "tiny-lm" in names:
        found.append((Subject("tiny-lm", builtin_model("tiny-lm"), work, settings), GROUPS))
    if "bench-lm" in names:
        trained = options.bench_lm.name  # bench-lm, or another training of it: rows of two must not meet
        found.append((Subject(trained, options.bench_lm, work, settings), GROUPS))
    if "outliers" in names:
        planted = work / "outliers"
        if not planted.exists():
            plant_outliers(options.bench_lm, planted)
        found.append((Subject("outliers", planted, work, settings, on_calibration=True), OUTLIERS))
    return found


def run(bench: Bench, subject: Subject, groups: Any, seeds: range, only: list[str]) -> list[dict[str, Any]]:
    """Measure a model's groups, seed by seed, and return the rows."""
    rows = []
    for seed in seeds:
        for group in groups:
            turn = seed % len(group)
            for entry in (*group[turn:], *group[:turn]):
                name = f"{subject.name}/{entry}"
                if only and not any(part in name for part in only):
                    continue
                row = bench.measure(subject, entry, seed)
                rows.append(row)
                print(f"{name:42} seed {seed}  {told(row)}", flush=True)
    return rows


def told(row: dict[str, Any]) -> str:
    """Write a row as one line."""
    if "error" in row:
        return f"FAILED: {row['error'][-300:]}"
    return (
        f"KL {row['kl']:.3e}  top-1 {row['top1']:.4f}  perplexity {row['perplexity']:.3f}  "
        f"call {row['call_seconds']:.1f} s ({row['call_cpu_seconds']:.1f} CPU)  work {row['work_seconds']:.1f}  process {row['seconds']:.1f} s "
        f"({row['cpu_seconds']:.1f} CPU)  {row['peak_bytes'] / 2**20:.0f} MiB"
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setup", type=Path, help="make the other tools' environments in this folder, and stop"
    )
    parser.add_argument("--rivals", type=Path, default=Path(".rivals"), help="the folder of --setup")
    parser.add_argument("--bench-lm", type=Path, default=Path("bench-lm"), help="the trained model's folder")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--work", type=Path, default=Path(".rivals/work"), help="where finished rows are kept"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="calibration seeds, and repetitions of the times"
    )
    parser.add_argument("--first-seed", type=int, default=0, help="leave out the seeds before this one")
    parser.add_argument(
        "--untimed", action="store_true", help="the machine is busy: use these rows for quality only"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of a sample and of a held-out window")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows")
    parser.add_argument("--examples", type=int, default=200, help="questions of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="parts of MODEL/TOOL:RECIPE, separated by commas")
    return parser.parse_args()


def main() -> None:
    """Make the environments, or measure what is asked for, and write the results with their bars."""
    options = arguments()
    if options.setup:
        environments.make(options.setup)
        return
    torch.set_num_threads(options.threads)
    options.work, options.bench_lm = options.work.resolve(), options.bench_lm.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    settings = Settings(options.samples, options.tokens, options.windows, options.examples)
    bench = Bench(options.work, options.rivals.resolve(), options.threads, timed=not options.untimed)
    only = [part for part in options.only.split(",") if part]
    rows: list[dict[str, Any]] = []
    originals = {}
    for subject, groups in subjects(options, settings):
        originals[subject.name] = subject.judge.scores
        rows += run(bench, subject, groups, range(options.first_seed, options.seeds), only)
    raw = {
        "settings": {**vars(settings), "seeds": options.seeds, "threads": options.threads},
        "originals": originals,
        "summary": summary(rows),
        "gains": gains(rows),
        "rows": rows,
    }
    for line in raw["gains"]:
        print(line)
    whole = (
        not only
        and not options.first_seed
        and not any("error" in row for row in rows)
        and {*originals} == {*MODELS}
    )
    write("ptq_rivals", raw, all_bars(rows), RESULTS if whole else options.work)
    if not whole:
        print(f"Only a part was measured; it stands in {options.work / 'ptq_rivals.json'}.")


if __name__ == "__main__":
    main()
