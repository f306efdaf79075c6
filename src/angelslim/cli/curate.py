"""``curate``: from raw text and conversation files to a curated, mixed training set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base import console

GROUP = "Data"
EXAMPLES = """[bold]Examples[/bold]

  angelslim curate recipe.yaml --out curated

  angelslim curate recipe.yaml --out curated --overwrite
"""


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("curate", rich_help_panel=GROUP, epilog=EXAMPLES)(curate)


def curate(
    recipe: Annotated[Path, typer.Argument(help="Curation recipe, a YAML file.", metavar="RECIPE")],
    out: Annotated[Path, typer.Option(help="Folder for the part files and the report.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier curated set, or another unfinished one.")
    ] = False,
) -> None:
    """Deduplicate, filter, clean, classify and mix documents; report what each stage dropped and why.

    The folder holds part-00000.jsonl and so on, report.html and report.json. A run that was killed continues where it
    stopped when the same command is given again, and leaves the same bytes.
    """
    from ..data.curation.run import curate as run
    from ..report.curation import curation_html, reasons_table, sources_table, stages_table
    from ..report.words import counted

    report = run(recipe, out, overwrite=overwrite, page=curation_html)
    for build in (stages_table, reasons_table, sources_table):
        console.out.print(build(report))
    for stage in report.stages:
        for note in stage.notes:
            console.out.print(f"{stage.name}: {note}", soft_wrap=True, markup=False)
    files = counted(len(report.shards), "part file")
    console.out.print(f"Set:    {out} ({files})", soft_wrap=True, markup=False)
    console.out.print(f"Report: {out / 'report.html'}", soft_wrap=True, markup=False)
