"""``eval``, ``export`` and ``serve``: measure a result, convert it, put it to work."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..base import console
from ..base.errors import ConfigError

GROUP = "Measure and ship"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "eval",
        rich_help_panel=GROUP,
        epilog="[bold]Examples[/bold]\n\n  angelslim eval tiny-lm --tasks addition,recall --samples 40\n\n  angelslim eval tiny-lm --text README.md --speed",
    )(evaluate)
    app.command(
        "export",
        rich_help_panel=GROUP,
        epilog="[bold]Example[/bold]\n\n  angelslim export tiny-int4 --format gptq --out tiny-gptq\n\n  angelslim export tiny-q4 --format gguf --out tiny-q4.gguf",
    )(export)
    app.command(
        "serve", rich_help_panel=GROUP, epilog="[bold]Example[/bold]\n\n  angelslim serve tiny-fp8 --dry-run"
    )(serve)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders (compressed or not), hub ids or built-in names.", metavar="MODEL..."),
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text file for perplexity (default: built-in text).")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Generated tasks, comma-separated: addition,recall.")] = "",
    samples: Annotated[int, typer.Option(min=1, help="Examples per task.")] = 100,
    speed: Annotated[bool, typer.Option("--speed", help="Measure generation speed too.")] = False,
    lm_eval: Annotated[
        str, typer.Option(help="lm-eval tasks, comma-separated (needs the extra `eval`).")
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder of local lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per lm-eval task (default: all).")] = None,
    seed: Annotated[int, typer.Option(help="Seed that draws the examples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Measure perplexity, tasks, speed and size of models, side by side."""
    from ..evaluate.harness import run_harness
    from ..evaluate.size import size_scores
    from ..evaluate.suite import evaluate as run_suite
    from ..models.loading import resolve
    from ..reopen import load
    from ..work import tokenizer_of

    found = {}
    for name in models:
        folder = resolve(name)
        model, tokenizer = load(folder), tokenizer_of(folder)
        scores = run_suite(
            model,
            tokenizer,
            text=text,
            tasks=_words(tasks),
            samples=samples,
            speed=speed,
            seed=seed,
        )
        if lm_eval:
            scores += run_harness(model, tokenizer, _words(lm_eval), include_path=include_path, limit=limit)
        found[name] = scores + size_scores(folder, sum(p.numel() for p in model.parameters()))
    if as_json:
        typer.echo(
            json.dumps(
                {name: [asdict(score) for score in scores] for name, scores in found.items()}, indent=1
            )
        )
        return
    first = next(iter(found.values()))
    rows = [
        [f"{score.metric} {'(lower is better)' if score.better == 'lower' else ''}".strip()]
        + [f"{scores[index].value:.4g} {scores[index].unit}".strip() for scores in found.values()]
        for index, score in enumerate(first)
    ]
    console.out.print(console.table("", ["metric", *found], rows))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def export(
    folder: Annotated[Path, typer.Argument(help="A compressed model folder, or a .gguf file.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Format to write (see `angelslim ls`), as gguf, or gguf:tq1_0 for one of its types.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder or file to write.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only decode every layer and report.")] = False,
) -> None:
    """Rewrite a compressed model in another checkpoint format, bit for bit, or check it."""
    if check:
        from ..check import check as decode

        console.out.print(f"{folder}: {decode(folder)} layers decode, all finite.", soft_wrap=True)
        return
    if format_ is None or out is None:
        raise ConfigError("export needs --format and --out, or --check.")
    from ..convert import convert

    convert(folder, format_, out)
    console.out.print(f"Wrote {out}", soft_wrap=True)


def serve(
    folder: Annotated[Path, typer.Argument(help="A model folder or a .gguf file.")],
    engine: Annotated[
        str, typer.Option(help="vllm, sglang or llama.cpp (default: chosen from the folder).")
    ] = "auto",
    port: Annotated[int, typer.Option(help="Port of the OpenAI-compatible server.")] = 8000,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and do not start it.")
    ] = False,
) -> None:
    """Print and run the command that serves a model with vLLM, SGLang or llama.cpp."""
    from ..serve import launch, plan_launch

    plan = plan_launch(folder, engine, port)
    console.chose(f"engine {plan.engine}", plan.because)
    typer.echo(str(plan))
    console.err.print(f"Ask it with: {plan.request}", soft_wrap=True, markup=False)
    if not dry_run:
        raise typer.Exit(launch(plan))
