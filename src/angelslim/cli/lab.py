"""``lab``: train the small models: the built-in one again, and those that benchmarks need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base import console
from ..base.errors import ConfigError, did_you_mean

GROUP = "Lab"
MODELS = ("tiny-lm", "bench-lm", "tiny-long")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    lab = typer.Typer(no_args_is_help=True, help="Train the small models, from nothing.")
    lab.command("train", epilog="[bold]Example[/bold]\n\n  angelslim lab train tiny-lm --out my-tiny-lm")(
        train
    )
    lab.callback()(_about)
    app.add_typer(lab, name="lab", rich_help_panel=GROUP)


def _about() -> None:
    """Train the small models, from nothing."""


def train(
    name: Annotated[str, typer.Argument(help="Which model: tiny-lm, bench-lm or tiny-long.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the trained model (default: its name).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this time (default: until trained).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    size: Annotated[str, typer.Option(help="Of tiny-long: base, or small for a CPU.")] = "base",
) -> None:
    """Train a small model on generated tasks and the Python library's own text.

    A killed training continues where it stopped when the same command is given again.
    """
    if name not in MODELS:
        raise ConfigError(f"The lab has no model {name!r}.", fix=did_you_mean(name, MODELS))
    folder = out or Path(name)
    if name == "tiny-long":
        from ..lab.tiny_long import train_tiny_long

        results = train_tiny_long(folder, seed=seed, minutes=minutes, device=device, size=size)
    else:
        from ..lab.bench_lm import train_bench_lm
        from ..lab.tiny_lm import train_tiny_lm

        make = train_tiny_lm if name == "tiny-lm" else train_bench_lm
        results = make(folder, seed=seed, minutes=minutes, device=device)
    rows = [(key, value) for key, value in results.items() if isinstance(value, (int, float, str))]
    console.out.print(console.table(str(folder), ["", ""], rows))
