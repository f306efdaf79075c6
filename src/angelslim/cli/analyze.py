"""``analyze`` and ``sensitivity``: find the layers that went wrong, or that would."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base import console
from .compress import Recipe, Rest, Seed, prepared_job

GROUP = "Look"
OUTLIERS = 1  # exit status of --fail-on-outliers
Out = Annotated[
    Path | None, typer.Option(help="Folder for the page, the CSV and the JSON file (default: none).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier analysis in --out.")]
Top = Annotated[int, typer.Option(min=1, help="Layers in the terminal's table.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]

ANALYZE_EXAMPLES = """[bold]Examples[/bold]

  angelslim analyze tiny-fp8

  angelslim analyze tiny-lm tiny-fp8 --out fp8-weights

  angelslim analyze tiny-fp8 --scale-limit 2 --fail-on-outliers
"""
SENSITIVITY_EXAMPLES = """[bold]Examples[/bold]

  angelslim sensitivity int4_rtn tiny-lm

  angelslim sensitivity int4_rtn tiny-lm --kl --out int4-sensitivity

  angelslim sensitivity fp8_static tiny-lm dataset.num_samples=64 --keep 5
"""
SAMPLES = 16  # calibration samples, unless the command line names a number


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("analyze", rich_help_panel=GROUP, epilog=ANALYZE_EXAMPLES)(analyze)
    app.command("sensitivity", rich_help_panel=GROUP, epilog=SENSITIVITY_EXAMPLES)(sensitivity)


def analyze(
    first: Annotated[
        str, typer.Argument(help="A compressed folder; or the original model.", metavar="MODEL")
    ],
    second: Annotated[
        str | None, typer.Argument(help="The compressed copy of the original.", metavar="[COMPRESSED]")
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    top: Top = 10,
    scale_limit: Annotated[
        float, typer.Option(help="Flag weight and activation scales above this.", min=0)
    ] = 1.5,
    spread: Annotated[
        float, typer.Option(help="Flag figures so many robust deviations from those of the same role.", min=0)
    ] = 6.0,
    histograms: Annotated[int, typer.Option(help="Layers whose distributions are drawn.", min=0)] = 12,
    fail_on_outliers: Annotated[
        bool, typer.Option("--fail-on-outliers", help="Exit with status 1 if a layer is flagged.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at the scales and weights of every layer, and compare them with the original's if it is given.

    Reads one layer at a time. Layers whose scales are large, or whose figures are far from those of the layers with
    the same role, are flagged.
    """
    from ..analyze import files, weights
    from ..report.analysis import analysis_table, verdict

    if out is not None:
        files.check_target(out, overwrite, files.ANALYSIS)
    found = weights.analyze(first, second, scale_limit=scale_limit, spread=spread, histograms=histograms)
    if out is not None:
        files.write_folder(out, files.analysis_files(found), overwrite=overwrite)
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        console.out.print(analysis_table(found, top))
        for line in (*found.notes, *verdict(found, top)):
            console.out.print(line, soft_wrap=True, markup=False)
        if out is not None:
            console.out.print(f"Report: {out / 'analysis.html'}", soft_wrap=True, markup=False)
    if fail_on_outliers and found.flagged:
        raise typer.Exit(OUTLIERS)


def sensitivity(
    recipe: Recipe,
    rest: Rest = None,
    kl: Annotated[
        bool, typer.Option("--kl", help="Measure the effect on the next token too; loads the whole model.")
    ] = False,
    kl_samples: Annotated[int, typer.Option(min=1, help="Samples for --kl.")] = 8,
    keep: Annotated[int, typer.Option(min=0, help="Groups of layers that the suggestion spares.")] = 3,
    out: Out = None,
    overwrite: Overwrite = False,
    top: Top = 10,
    as_json: AsJson = False,
    seed: Seed = None,
) -> None:
    """Round each layer alone and measure what that does: which layers should a recipe spare?

    Takes the scheme, the layers and the calibration data of a recipe, 16 samples unless dataset.num_samples says
    otherwise. Nothing is compressed. The most sensitive layers come back as lines for a recipe.
    """
    from ..analyze import files
    from ..analyze.sensitivity import sensitivity as measure
    from ..report.sensitivity import advice, recipe_lines, remarks, sensitivity_html, sensitivity_table

    names = [f"sensitivity.{ending}" for ending in ("json", "csv", "html")]
    if out is not None:
        files.check_target(out, overwrite, names)
    words = list(rest or [])
    if not any(word.startswith("dataset.num_samples=") for word in words):
        words.append(f"dataset.num_samples={SAMPLES}")
    found = measure(prepared_job(recipe, words, seed), recipe=recipe, kl=kl, kl_samples=kl_samples, keep=keep)
    if out is not None:
        texts = (found.to_json(), found.to_csv(), sensitivity_html(found))
        files.write_folder(out, dict(zip(names, texts, strict=True)), overwrite=overwrite)
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    console.out.print(sensitivity_table(found, top))
    for line in remarks(found):
        console.out.print(line, soft_wrap=True, markup=False)
    if found.kept:
        console.out.print(advice(found), soft_wrap=True, markup=False)
        console.out.print(recipe_lines(found), soft_wrap=True, markup=False)
    if out is not None:
        console.out.print(f"Report: {out / 'sensitivity.html'}", soft_wrap=True, markup=False)
