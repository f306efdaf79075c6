"""``sweep`` and ``teacher``: what precedes a long training, which ``run`` starts like any other recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..base import console
from .compress import Recipe, Rest, Seed, split

GROUP = "Train"
SWEEP_EXAMPLES = """[bold]A plan[/bold] (YAML)

  search: {compression.QAT.hf_args.learning_rate: {log: [1.0e-5, 1.0e-3]}}

  trials: 12

  volumes: [0.3, 0.5, 0.7]

[bold]Examples[/bold]

  angelslim sweep seq_2bit tiny-lm --plan plan.yaml --out sweep

  angelslim sweep sherry MODEL dataset.data_path=train.jsonl --plan plan.yaml --out sweep

  angelslim run sweep/chosen.yaml MODEL --out trained
"""
TEACHER_EXAMPLES = """[bold]Examples[/bold]

  angelslim teacher tiny-lm --tokens 65536 --length 128 --out lessons

  angelslim teacher MODEL --data train.jsonl --k 64 --out lessons

  angelslim run seq_2bit MODEL dataset.data_path=train.jsonl compression.QAT.teacher_logits=lessons --out trained
"""


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("sweep", rich_help_panel=GROUP, epilog=SWEEP_EXAMPLES)(sweep)
    app.command("teacher", rich_help_panel=GROUP, epilog=TEACHER_EXAMPLES)(teacher)


def sweep(
    recipe: Recipe,
    plan: Annotated[Path, typer.Option(help="What is searched, a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for the chosen recipe, the page and the state.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that search, by turns on the GPUs.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Run the workers on a Ray cluster.")] = False,
    rest: Rest = None,
    seed: Seed = None,
) -> None:
    """Search hyper-parameters and the share of the data with short trainings; write the chosen recipe.

    Trials train on the smallest share of the plan; those whose held-back loss falls behind stop early. The best trains
    on every share. The folder holds chosen.yaml for `angelslim run`, sweep.html and sweep.json. A sweep that was killed
    continues with the same command. Needs the extra `sweep`; `--ray` the extra `ray`, and a folder that all machines see.
    """
    from ..report.sweep import sweep_table
    from ..sweep.run import CHOSEN, PAGE, run
    from ..sweep.space import read_plan
    from ..sweep.workers import Workers, require_ray
    from ..training.trials import SHARE, Trials

    model, words = split(rest, seed)
    if ray:
        require_ray()
    make = partial(Trials, recipe, model, words, read_plan(plan), out)
    trials = make()
    console.err.print(console.table("Plan", ["", ""], trials.announced()))
    found = run(
        trials.plan,
        trials,
        out,
        share_key=SHARE,
        merged=trials.chosen,
        of=trials.identity,
        workers=Workers(workers, make, ray) if workers > 1 or ray else None,
        title=f"{trials.base.name} of {trials.base.source.name}",
    )
    console.out.print(sweep_table(found))
    console.out.print(f"Share:  {found.share:.0%} of the data: {found.why}", soft_wrap=True, markup=False)
    console.out.print(f"Recipe: {out / CHOSEN}", soft_wrap=True, markup=False)
    console.out.print(f"Report: {out / PAGE}", soft_wrap=True, markup=False)


def teacher(
    model: Annotated[str, typer.Argument(help="Folder, hub id or built-in name of the teacher.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    data: Annotated[
        str | None,
        typer.Option(help="The training data, as in dataset.data_path (default: the built-in data)."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="How many of each token's largest logits are kept.")] = 64,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to read at most (default: the data once).")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: the accelerator when there is one).")
    ] = None,
) -> None:
    """Store a teacher's most likely next tokens, so that trainings need not run it in every step.

    A training takes the folder as teacher_logits, with the lengths and batches that were stored; rows that it holds
    back are not stored. A call that was killed continues at the first missing shard.
    """
    from ..training.lessons import store_lessons

    found = store_lessons(model, data, out, k=k, tokens=tokens, length=length, batch=batch, device=device)
    stored = found.batches * found.rows * found.length
    console.out.print(
        f"{stored:,} tokens, {found.bytes_a_token} bytes each, {found.shards} shards", markup=False
    )
    console.out.print(f"Logits: {out}", soft_wrap=True, markup=False)
