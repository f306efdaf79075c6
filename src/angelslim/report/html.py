"""The report as one HTML file that needs nothing else: no network, no fonts, no scripts from elsewhere.

Everything the record holds is escaped by the template; only the style sheet, the script and the drawings that
this package made itself go in as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from ..base.errors import DataError
from ..models.checkpoint import write_atomically
from .page import context
from .record import RunRecord


def template(name: str) -> str:
    """Read a file of the package's ``templates`` folder."""
    return (files(__package__) / "templates" / name).read_text("utf-8")


def render_html(records: Sequence[RunRecord]) -> str:
    """Return the page for one run, or the comparison of several."""
    if not records:
        raise DataError("There is no run to report on.", fix="Give at least one output folder.")
    return render("report", context(records))


def render(page: str, shown: Mapping[str, Any]) -> str:
    """Fill the template called `page`; style sheet and script are put into it."""
    environment = Environment(
        loader=DictLoader({"page": template(f"{page}.html.j2")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assets = {name: Markup(template(f"report.{name}")) for name in ("css", "js")}  # noqa: S704  package files
    return environment.get_template("page").render(**shown, **assets)


def write_html(records: Sequence[RunRecord], path: Path) -> Path:
    """Write the page to `path`; equal records give equal bytes."""
    page = render_html(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path
