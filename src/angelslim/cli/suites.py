"""``eval --suite``: RULER or LongBench with every attention that is named, as tables, JSON and a page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base import console
from ..base.errors import ConfigError, UserError
from ..base.files import write_atomically

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ..evaluate.suites.run import AttentionFigures
    from ..evaluate.suites.suite import Suite


Block = Annotated[
    int | None, typer.Option(help="Side of a block of sparse attention, in tokens (default: 128).")
]
Name = Annotated[str, typer.Option(help="A suite of long prompts instead: ruler or longbench.")]
Lengths = Annotated[str, typer.Option(help="Lengths of the suite's prompts in tokens: 4k,8k.")]
Data = Annotated[Path | None, typer.Option(help="Folder of LongBench's jsonl files.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the suite's JSON and page; a killed run goes on there.")
]
Export = Annotated[Path | None, typer.Option(help="Only write the suite as lm-eval tasks into this folder.")]
Device = Annotated[str, typer.Option(help="Where the suite runs: cpu or cuda.")]
ONLY_HERE = ("lengths", "data", "out", "export_tasks", "device")
NOT_HERE = ("speed", "lm_eval", "include_path", "limit")
NOT_EXPORTED = ("attn", "density", "block", "out", "device", "as_json")


@dataclass(frozen=True)
class Request:
    """What the options of ``eval`` say about a suite; the words of options are still to be read."""

    suite: str
    lengths: str
    tasks: Sequence[str]
    samples: int
    text: Path | None
    data: Path | None
    out: Path | None
    export: Path | None
    attn: Sequence[str]
    density: float | None
    block: int | None
    device: str
    seed: int
    as_json: bool


def check_options(context: typer.Context) -> None:
    """Refuse options of ``eval`` that would have no effect: whoever gives one expects something of it."""
    params = context.params
    given = [
        name for name in params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    suite = params["suite"]
    idle: dict[str, tuple[str, ...]] = {}
    if not suite:
        idle["has no effect without --suite"] = ONLY_HERE
        if not params["lm_eval"]:
            idle["has no effect without --lm-eval"] = ("include_path", "limit")
    else:
        idle["has no effect on a suite"] = NOT_HERE
        idle[f"has no effect on the suite {suite}"] = {"ruler": ("data",), "longbench": ("text",)}.get(
            suite, ()
        )
        if params["export_tasks"]:
            idle["has no effect on --export-tasks, which measures nothing"] = NOT_EXPORTED
    for why, names in idle.items():
        for name in given:
            if name in names:
                option = "--json" if name == "as_json" else f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} {why}.", fix="Leave it out.")


def words(text: str) -> list[str]:
    """Read a list that commas part; a word that is named twice stands once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def request_of(params: dict[str, Any]) -> Request:
    """Return what the options of ``eval`` say, by their names there."""
    given = {**params, "tasks": words(params["tasks"]), "attn": words(params["attn"])}
    given["export"] = given["export_tasks"]
    return Request(**{each.name: given[each.name] for each in fields(Request)})


def run(models: Sequence[str], request: Request) -> None:
    """Measure the models one after another, or only write the tasks for lm-eval."""
    from ..evaluate.suites.harness_tasks import export
    from ..evaluate.suites.suite import Suite, lengths
    from ..models.loading import resolve
    from ..work import tokenizer_of

    if len(models) > 1 and (request.out or request.export):
        raise ConfigError("--out and --export-tasks take one model.", fix="Run the command for each.")
    for target in (request.out, request.export):
        if target is not None and target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file; a folder is written.", fix="Choose another name.")
    suite = Suite(
        request.suite,
        lengths(request.lengths),
        list(request.tasks),
        request.samples,
        request.data,
        request.text,
        request.seed,
    )
    if request.export is not None:
        names = export(suite, tokenizer_of(resolve(models[0])), request.export)
        console.out.print(f"Wrote {len(names)} tasks to {request.export}", soft_wrap=True)
        return
    for name in models:
        _measure(name, suite, request)


def _measure(name: str, suite: Suite, request: Request) -> None:
    from ..base.place import leave
    from ..evaluate.suites.kept import Kept
    from ..evaluate.suites.suite import run_suite
    from ..job import device_of
    from ..methods.sparse.using import attention_context, attentions
    from ..models.loading import resolve
    from ..reopen import load
    from ..report.suite import suite_tables
    from ..work import tokenizer_of

    folder, device = resolve(name), device_of(request.device)
    wanted = attentions(list(request.attn), folder, request.density, request.block)
    place = None if request.out is None else _open(request.out, folder, suite, wanted, request)

    def attend(attention: str) -> AbstractContextManager[AttentionFigures]:
        density = None if attention == "dense" else request.density
        return attention_context(model, attention, density, block=request.block)

    try:
        model = load(folder, device=device)
        kept = None if place is None else Kept(place)
        found = run_suite(model, tokenizer_of(folder), suite, wanted, attend, kept)
    except UserError:
        if place is not None:
            leave(place)
        raise
    found = {"model": name, "density": request.density, "block": request.block, **found}
    if request.out is not None and place is not None:
        _write(found, request.out, place)
    if request.as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for table in suite_tables(found):
        console.out.print(table)
    if request.out is not None:
        console.out.print(f"Report: {request.out / 'suite.html'}", soft_wrap=True)


def _open(out: Path, folder: Path, suite: Suite, wanted: Sequence[str], request: Request) -> Path:
    """Open the folder of unfinished work; that of another command is refused."""
    import torch

    from .. import __version__
    from ..base.place import fingerprint, open_place
    from ..methods.sparse.using import files_of

    facts = {
        **{"model": str(folder.resolve()), "suite": suite.facts(), "attentions": list(wanted)},
        **{"density": request.density, "block": request.block},
        **{"torch": torch.__version__, "device": request.device},
    }
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".html" and path.is_file()]
    files += [*suite.files(), *(path for name in wanted for path in files_of(name))]
    place = out.resolve()
    place = place.with_name(place.name + ".partial")
    open_place(
        place,
        fingerprint(facts, files, __version__),
        "an unfinished suite of another command, model or data",
        fix="Finish it with its own command, choose another --out, or delete that folder.",
    )
    return place


def _write(found: dict[str, Any], out: Path, place: Path) -> None:
    """Write the results; what was kept until now goes when they are complete."""
    from ..report.suite import suite_html

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "suite.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(out / "suite.html", suite_html(found).encode())
    shutil.rmtree(place)
