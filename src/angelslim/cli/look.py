"""``inspect``, ``validate``, ``ls``, ``cp`` and ``env``: look before running."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base import console
from ..base.errors import EXIT_CODE, ConfigError, UserError

if TYPE_CHECKING:
    from ..config.validate import Report

GROUP = "Look"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "inspect", rich_help_panel=GROUP, epilog="[bold]Example[/bold]\n\n  angelslim inspect tiny-lm"
    )(inspect)
    app.command(
        "validate",
        rich_help_panel=GROUP,
        epilog="[bold]Example[/bold]\n\n  angelslim validate my-recipe.yaml",
    )(validate)
    app.command("ls", rich_help_panel=GROUP)(ls)
    app.command(
        "cp", rich_help_panel=GROUP, epilog="[bold]Example[/bold]\n\n  angelslim cp fp8_static my-recipe.yaml"
    )(cp)
    app.command("env", rich_help_panel=GROUP)(env)


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, hub id or built-in name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show a model's structure: blocks, groups, experts, towers, parameters, types. Loads no weights."""
    from ..models.loading import open_model
    from ..models.summary import summarize

    summary = summarize(open_model(model))
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    facts = [(key, value) for key, value in summary.items() if not isinstance(value, list)]
    console.out.print(console.table(model, ["", ""], facts))
    for title, rows in summary.items():
        if isinstance(rows, list) and rows:
            console.out.print(console.table(title, list(rows[0]), [list(row.values()) for row in rows]))


def validate(
    files: Annotated[list[str], typer.Argument(help="YAML files, or recipe names.", metavar="FILE...")],
) -> None:
    """Check configuration files of any dialect; the exit status is 2 when one is wrong."""
    reports = [_validated(file) for file in files]
    for report in reports:
        mark = "ok" if report.ok else "wrong"
        asks = "; ".join(report.asks_for)
        console.out.print(
            f"{mark:6} {report.path}" + (f"  ({report.dialect}: {asks})" if asks else ""),
            soft_wrap=True,
            markup=False,
        )
        for line in (
            *(f"warning: {text}" for text in report.warnings),
            *(f"error: {text}" for text in report.errors),
        ):
            console.out.print(f"       {line}", soft_wrap=True, markup=False)
    if not all(report.ok for report in reports):
        raise typer.Exit(EXIT_CODE)


def _validated(file: str) -> Report:
    """Check one file; the options of a curation's stages are known to the stages alone."""
    from ..config.curation import is_curation
    from ..config.validate import Report, validate_file

    if not is_curation(Path(file)):
        return validate_file(file)
    from ..data.curation.run import checked_steps

    try:
        _, steps = checked_steps(Path(file))
    except UserError as error:
        return Report(file, "curation", errors=[str(error)])
    return Report(file, "curation", asks_for=[name for name, _, _ in steps])


def ls() -> None:
    """List the recipes, methods, kinds of sparse attention, checkpoint formats, curation stages, built-in models and tasks."""
    from ..config.recipe import recipes
    from ..data.builtin import TASKS
    from ..data.curation.base import STAGES
    from ..export.base import FILES, FORMATS
    from ..methods.base import PTQ
    from ..methods.sparse.selectors.base import SELECTORS
    from ..models.builtin import BUILTIN

    console.out.print(console.table("Recipes", ["name", "what for"], list(recipes().items())))
    for title, registry in (
        ("Methods", PTQ),
        ("Sparse attention", SELECTORS),
        ("Formats", FORMATS),
        ("Files, made by export", FILES),
        ("Curation stages", STAGES),
    ):
        rows = [(name, registry.summary(name)) for name in registry]
        console.out.print(console.table(title, ["name", "summary"], rows))
    console.out.print(f"Built-in models: {', '.join(BUILTIN)}   Tasks: {', '.join(TASKS)}")


def cp(
    recipe: Annotated[str, typer.Argument(help="Recipe to copy.")],
    target: Annotated[Path | None, typer.Argument(help="File or folder (default: here).")] = None,
) -> None:
    """Copy a recipe to a file of your own, to edit."""
    from ..config.recipe import recipe_path

    source = recipe_path(recipe)
    destination = target or Path()
    destination = destination / source.name if destination.is_dir() else destination
    if destination.exists():
        raise ConfigError(f"{destination} already exists.", fix="Name another file.")
    shutil.copyfile(source, destination)
    console.out.print(f"Wrote {destination}", soft_wrap=True)


def env(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for bug reports.")] = False,
) -> None:
    """Show the versions and devices that matter in a bug report."""
    import torch

    from ..pipeline import PACKAGES, versions

    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions((*PACKAGES, "accelerate", "vllm", "llmcompressor")),
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    if markdown:
        lines = [
            "| what | value |",
            "| --- | --- |",
            *(f"| {key} | {value} |" for key, value in facts.items()),
        ]
        typer.echo("\n".join(lines))
        return
    console.out.print(console.table("", ["what", "value"], list(facts.items())))
