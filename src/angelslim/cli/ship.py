"""``eval``, ``export`` and ``serve``: measure a result, convert it, put it to work."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base import console
from ..base.errors import ConfigError
from . import suites
from .suites import words

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..evaluate.base import Score
    from ..methods.sparse.using import AttentionStats

GROUP = "Measure and ship"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "eval",
        rich_help_panel=GROUP,
        epilog="[bold]Examples[/bold]\n\n  angelslim eval tiny-lm --tasks addition,recall --samples 40\n\n  angelslim eval tiny-lm --text README.md --speed\n\n  angelslim eval tiny-lm --attn dense,stem,union --density 0.3\n\n  angelslim eval tiny-lm --suite ruler --lengths 1k --samples 5 --attn dense,union",
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
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(help="Folders (compressed or not), hub ids or built-in names.", metavar="MODEL..."),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file for perplexity, or for RULER's needles to hide in (default: built-in text)."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Generated tasks, comma-separated: addition,recall; or tasks of the suite.")
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Examples per task.")] = 100,
    speed: Annotated[bool, typer.Option("--speed", help="Measure generation speed too.")] = False,
    lm_eval: Annotated[
        str, typer.Option(help="lm-eval tasks, comma-separated (needs the extra `eval`).")
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder of local lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per lm-eval task (default: all).")] = None,
    attn: Annotated[
        str,
        typer.Option(
            help="Attention of the prefill, comma-separated: dense, stem, union, ..., or a folder with sparse_attention.json."
        ),
    ] = "",
    density: Annotated[
        float | None,
        typer.Option(help="Share of the causal area that sparse attention reads (default: its own budget)."),
    ] = None,
    block: suites.Block = None,
    suite: suites.Name = "",
    lengths: suites.Lengths = "4k",
    data: suites.Data = None,
    out: suites.Out = None,
    export_tasks: suites.Export = None,
    device: suites.Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed that draws the examples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Measure perplexity, tasks, speed and size of models, side by side; with --attn for each kind of attention."""
    suites.check_options(context)
    if suite:
        return suites.run(models, suites.request_of(context.params))
    from ..evaluate.harness import run_harness
    from ..evaluate.suite import evaluate as run_suite

    def measure(model: Any, tokenizer: Any) -> list[Score]:
        scores = run_suite(
            model, tokenizer, text=text, tasks=words(tasks), samples=samples, speed=speed, seed=seed
        )
        if lm_eval:
            scores += run_harness(model, tokenizer, words(lm_eval), include_path=include_path, limit=limit)
        return scores

    found = [_with_attention(name, words(attn), density, block, measure) for name in models]
    _print_scores({label: scores for each in found for label, scores in each.items()}, as_json)


def _with_attention(
    name: str,
    attn: list[str],
    density: float | None,
    block: int | None,
    measure: Callable[[Any, Any], list[Score]],
) -> dict[str, list[Score]]:
    """Measure one model with every attention that is asked for, or that its folder says; a column each."""
    from ..evaluate.size import size_scores
    from ..methods.sparse.using import attention_context, attentions
    from ..models.loading import resolve
    from ..reopen import load
    from ..work import tokenizer_of

    folder = resolve(name)
    wanted = attentions(attn, folder, density, block)
    model, tokenizer, found = load(folder), tokenizer_of(folder), dict[str, "list[Score]"]()
    for attention in wanted:
        asked = None if attention == "dense" else density
        with attention_context(model, attention, asked, block=block) as stats:
            scores = measure(model, tokenizer)
        scores += size_scores(folder, sum(parameter.numel() for parameter in model.parameters()))
        if wanted == ["dense"]:
            return {name: scores}
        label = "sparse" if attention == str(folder) else attention
        found[f"{name} {label}"] = scores + _attention_scores(stats)
    return found


def _print_scores(found: dict[str, list[Score]], as_json: bool) -> None:
    if as_json:
        lists = {name: [asdict(score) for score in scores] for name, scores in found.items()}
        typer.echo(json.dumps(lists, indent=1))
        return
    columns = [{score.metric: score for score in scores} for scores in found.values()]
    every = {metric: score for column in columns for metric, score in column.items()}
    rows = [
        [
            f"{metric} {'(lower is better)' if score.better == 'lower' else ''}".strip(),
            *(
                f"{column[metric].value:.4g} {column[metric].unit}".strip() if metric in column else "–"
                for column in columns
            ),
        ]
        for metric, score in every.items()
    ]
    console.out.print(console.table("", ["metric", *found], rows))


def _attention_scores(stats: AttentionStats) -> list[Score]:
    """What the attention read and how often it was dense, and why, for the foot of the table; decoding always is."""
    from ..evaluate.base import Score

    reasons = {reason: count for reason, count in sorted(stats.fallbacks.items()) if reason != "decode"}
    read = [] if stats.density is None else [Score("attention density", stats.density, "", "lower")]
    return [
        *read,
        Score("selector", stats.selector_ms, "ms", "lower"),
        Score("dense calls", sum(reasons.values()), "", "lower"),
        *(Score(f"dense calls: {reason}", count, "", "lower") for reason, count in reasons.items()),
    ]


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
    attn: Annotated[
        str | None,
        typer.Option(
            help="Sparse prefill in vLLM: a selector, a folder with sparse_attention.json, or dense."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and do not start it.")
    ] = False,
) -> None:
    """Print and run the command that serves a model with vLLM, SGLang or llama.cpp."""
    from ..serve import launch, plan_launch, with_attention

    plan = with_attention(plan_launch(folder, engine, port), attn)
    console.chose(f"engine {plan.engine}", plan.because)
    typer.echo(str(plan))
    console.err.print(f"Ask it with: {plan.request}", soft_wrap=True, markup=False)
    if not dry_run:
        raise typer.Exit(launch(plan))
