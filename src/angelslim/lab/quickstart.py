"""The first thing a stranger runs: the built-in model in FP8, INT8 and INT4, compared with the original."""

from __future__ import annotations

from pathlib import Path

from .. import pipeline
from ..base.console import log
from ..config.recipe import load
from ..job import prepare
from ..report.html import write_html
from ..report.record import RunRecord

METHODS = ("fp8_dynamic", "fp8_static", "int8_dynamic", "int4_rtn")
SETTINGS = ("dataset.num_samples=64", "dataset.max_seq_length=512", "evaluation.samples=100")


def run_quickstart(out: Path, *, seed: int = 0) -> tuple[list[RunRecord], Path]:
    """Compress ``tiny-lm`` with each method into `out`; return the records and the path of the joint report.

    The original is measured once. Methods that are already finished in `out` are not run again.
    """
    out.mkdir(parents=True, exist_ok=True)
    records: list[RunRecord] = []
    for method in METHODS:
        log.info("[%d/%d] %s", len(records) + 1, len(METHODS), method)
        overrides = [*SETTINGS, f"global.seed={seed}"]
        job = prepare(load(method, overrides), "tiny-lm")
        command = f"angelslim run {method} tiny-lm {' '.join(SETTINGS)} --seed {seed}"
        before = records[0].before if records else None
        records.append(pipeline.run(job, out / method, command=command, before=before))
    page = out / "report.html"
    write_html(records, page)
    return records, page
