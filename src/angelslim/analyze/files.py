"""Write what was found to a folder: JSON, CSV and one HTML page, all or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from ..base.errors import ResourceError, UserError
from ..models.checkpoint import write_atomically
from ..report.analysis import analysis_html
from ..report.findings import Analysis

ANALYSIS = tuple(f"analysis.{ending}" for ending in ("json", "csv", "html"))


def analysis_files(found: Analysis) -> dict[str, str]:
    """Return the three files of an analysis, the page last."""
    return dict(zip(ANALYSIS, (found.to_json(), found.to_csv(), analysis_html(found)), strict=True))


def check_target(out: Path, overwrite: bool, names: Collection[str]) -> None:
    """Refuse a folder that exists, before any work; only an earlier analysis is ever replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{out} already exists.", fix="Choose another --out, or pass --overwrite.")
    if not out.is_dir() or {file.name for file in out.iterdir()} - set(names):
        raise UserError(f"{out} holds more than an analysis.", fix="Choose another --out.")


def write_folder(out: Path, files: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write the files (name -> text) to the folder `out`, which appears when complete."""
    check_target(out, overwrite, files)
    out = out.resolve()
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in files.items():
            write_atomically(partial / name, text.encode())
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(
            f"Writing to {out} failed ({error.strerror or error}).",
            fix="Free some disk space or choose another --out.",
        ) from error
