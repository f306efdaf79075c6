"""Layer 10: the command line. One file for each group of commands; heavy imports wait inside the commands.

A `UserError` prints as one line and exits with status 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import sys

import typer

from ..base import console
from ..base.errors import EXIT_CODE, UserError
from . import analyze, compress, curate, lab, look, ship, train

app = typer.Typer(
    name="angelslim",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make language, vision-language and speech models small and fast, and ship them.",
    epilog="Start with: [bold]angelslim quickstart[/bold]",
)
for module in (compress, train, curate, look, analyze, ship, lab):
    module.register(app)


@app.callback()
def options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show debug messages."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Show warnings and errors only."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of user errors."),
) -> None:
    """Options of every command; they stand before its name."""
    console.setup(verbose, quiet)
    del debug  # read from the arguments by main, which must know it even when parsing fails


def main() -> None:
    """Run the command line."""
    try:
        app()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        console.err.print(f"[bold red]error:[/bold red] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        console.err.print("Stopped. The same command continues where it stopped.")
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
