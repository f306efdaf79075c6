"""``run``, ``plan`` and ``quickstart``: the main job."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base import console
from ..base.errors import ConfigError
from ..base.memory import collector_paused

if TYPE_CHECKING:
    from ..engine import AnyJob
    from ..job import Job
    from ..plan import Plan
    from ..prefill.plan import PrefillPlan
    from ..report.prefill import PrefillRecord
    from ..training.plan import TrainingPlan

GROUP = "Compress"
Recipe = Annotated[
    str, typer.Argument(help="Recipe file, or a method name (see `angelslim ls`).", metavar="RECIPE")
]
Rest = Annotated[
    list[str] | None,
    typer.Argument(
        help="The model (folder, hub id or 'tiny-lm'), then overrides key=value.",
        metavar="[MODEL] [KEY=VALUE]...",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice (default: the recipe's).")]

RUN_EXAMPLES = """[bold]Examples[/bold]

  angelslim run fp8_dynamic tiny-lm --out tiny-fp8

  angelslim run int4_rtn tiny-lm compression.quantization.quant_method.group_size=64 --out tiny-int4

  angelslim run fp8_static tiny-lm dataset.num_samples=32 --seed 1 --out tiny-fp8-static

  angelslim run tiny-fp8/run.yaml tiny-lm --out again
"""
PLAN_EXAMPLES = """[bold]Examples[/bold]

  angelslim plan fp8_static tiny-lm

  angelslim plan int4_rtn tiny-lm --json
"""


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("run", rich_help_panel=GROUP, epilog=RUN_EXAMPLES)(run)
    app.command("plan", rich_help_panel=GROUP, epilog=PLAN_EXAMPLES)(plan)
    app.command("quickstart", rich_help_panel=GROUP)(quickstart)


def run(
    recipe: Recipe,
    rest: Rest = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder (default: MODEL-RECIPE in global.save_path).")
    ] = None,
    seed: Seed = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder.")
    ] = False,
) -> None:
    """Compress a model and leave a complete model folder with a report.

    A recipe of sparse attention changes no weights and leaves settings with a report. The folder holds what engines load, report.html, a model card (README.md), run.yaml and run.json. A run that was
    killed continues where it stopped when the same command is given again.
    """
    with collector_paused():
        from .. import engine
        from ..report.prefill import PrefillRecord
        from ..report.summary import layers_table, results_table

        job = prepared(recipe, rest, seed)
    target = out or Path(job.config.global_.save_path) / f"{Path(job.source.name).name}-{job.name}"
    record = engine.carry_out(
        job, target, command=shlex.join(["angelslim", *sys.argv[1:]]), overwrite=overwrite
    )
    if isinstance(record, PrefillRecord):
        _print_prefill(record, target)
        return
    console.out.print(results_table([record]))
    if record.layers:
        console.out.print(layers_table(record))
    console.out.print(f"Model:  {target}", soft_wrap=True)
    console.out.print(f"Report: {target / 'report.html'}", soft_wrap=True)
    if (target / "analysis.html").exists():
        console.out.print(f"Layers: {target / 'analysis.html'}", soft_wrap=True)


def plan(
    recipe: Recipe,
    rest: Rest = None,
    seed: Seed = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a run would do and cost, and start nothing."""
    with collector_paused():
        from ..job import Job
        from ..plan import estimate

        job = prepared(recipe, rest, seed)
        if not isinstance(job, Job):
            _plan_other(job, json)
            return
        found = estimate(job)
    if json:
        typer.echo(found.to_json())
        return
    _print_plan(found)


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the compressed models and the report.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Seed of calibration and evaluation.")] = 0,
) -> None:
    """Compress the built-in model to FP8, INT8 and INT4, compare all with the original, write one report.

    Works offline; takes a minute or two on two cores.
    """
    from ..lab.quickstart import run_quickstart
    from ..report.summary import results_table

    records, page = run_quickstart(out, seed=seed)
    console.out.print(results_table(records))
    console.out.print(f"Report: {page}", soft_wrap=True)


def prepared_job(recipe: str, rest: list[str] | None, seed: int | None) -> Job:
    """Return the job of `prepared`, which must not be one that trains."""
    from ..job import Job

    job = prepared(recipe, rest, seed)
    if not isinstance(job, Job):
        raise ConfigError(
            "The recipe quantizes no finished model.", fix="Name a recipe of post-training quantization."
        )
    return job


def prepared(recipe: str, rest: list[str] | None, seed: int | None) -> AnyJob:
    """Return the job that a recipe, a model and overrides ask for, as the command line spells them."""
    from ..config.recipe import load
    from ..engine import prepare_any

    model, overrides = split(rest, seed)
    resolved = load(recipe, overrides)
    for warning in resolved.warnings:
        console.log.warning("%s", warning)
    return prepare_any(resolved, model)


def split(rest: list[str] | None, seed: int | None) -> tuple[str | None, list[str]]:
    """Return the model, if one is named first, and the overrides, that of the seed included."""
    words = list(rest or [])
    model = words.pop(0) if words and "=" not in words[0] else None
    stray = [word for word in words if "=" not in word]
    if stray:
        raise ConfigError(
            f"{stray[0]!r} is neither the model nor an override.",
            fix="Overrides look like dataset.num_samples=64.",
        )
    return model, [*words, *([f"global.seed={seed}"] if seed is not None else [])]


def _print_prefill(record: PrefillRecord, target: Path) -> None:
    from ..report.prefill import facts, lengths_table

    if record.lengths:
        console.out.print(lengths_table(record))
    console.out.print(console.table("Sparse attention", ["", ""], facts(record)))
    console.out.print(f"Settings: {target / 'sparse_attention.json'}", soft_wrap=True)
    console.out.print(f"Report:   {target / 'report.html'}", soft_wrap=True)


def _plan_other(job: AnyJob, json: bool) -> None:
    """Plan what quantizes no finished model: training, or sparse attention."""
    from ..prefill.job import PrefillJob
    from ..training.job import TrainingJob

    found: PrefillPlan | TrainingPlan
    if isinstance(job, PrefillJob):
        from ..prefill.plan import estimate as estimate_prefill

        found = estimate_prefill(job)
    else:
        from ..training.plan import estimate

        assert isinstance(job, TrainingJob)
        found = estimate(job)
    if json:
        typer.echo(found.to_json())
        return
    console.out.print(console.table("Plan", ["", ""], found.rows()))


def _print_plan(found: Plan) -> None:
    facts = asdict(found)
    gigabytes = ("bytes_before", "bytes_after", "peak_memory", "disk")
    rows = [
        ("model", f"{found.model} ({found.model_type}, {found.parameters / 1e6:,.1f} M parameters)"),
        ("method", found.method),
        ("scheme", found.scheme),
        ("format", f"{found.format}, {found.files} file(s)"),
        ("bits per weight", f"{found.bits_per_weight:.3f} (scales included)"),
        ("weights", " -> ".join(f"{facts[key] / 1e6:,.1f} MB" for key in gigabytes[:2])),
        ("peak memory", f"about {found.peak_memory / 1e9:.2f} GB"),
        ("disk while running", f"{found.disk / 1e6:,.1f} MB"),
        ("time", f"about {found.seconds / 60:.1f} minutes without evaluation"),
        (
            "calibration",
            f"{found.samples} samples of at most {found.max_length} tokens"
            if found.samples
            else "none needed",
        ),
    ]
    console.out.print(console.table("Plan", ["", ""], rows))
    layers = [(role, count) for role, count in sorted(found.layers.items())]
    if layers:
        console.out.print(console.table("Quantized", ["layer", "count"], layers))
    reasons: dict[str, list[str]] = {}
    for name, reason in found.skipped.items():
        reasons.setdefault(reason, []).append(name)
    kept = [(reason, len(names), names[0]) for reason, names in reasons.items()]
    if kept:
        title = "Kept as they are" if layers else "Not rounded"
        console.out.print(console.table(title, ["reason", "count", "such as"], kept))
