"""A curation as tables for the terminal and one HTML page: what each stage dropped, why, and what it looked like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..base import console
from ..data.curation.results import CurationReport, Flow, Reason, StageResult
from . import words
from .html import render
from .marks import Marks, stairs


def stages_table(report: CurationReport) -> Table:
    """Build the terminal's table of what went through each stage."""
    return console.table("Stages", [*_HEADINGS], [_row(stage.name, stage.flow) for stage in report.stages])


def reasons_table(report: CurationReport) -> Table:
    """Build the terminal's table of every reason that applied."""
    rows = [
        (f"{stage.name}: {escape(name)}", what, f"{reason.documents:,}", f"{reason.characters:,}")
        for stage in report.stages
        for what, reasons in (("dropped", stage.dropped), ("changed", stage.changed))
        for name, reason in reasons.items()
        if reason.documents
    ]
    return console.table("Reasons", ["reason", "documents were", "documents", "characters"], rows)


def sources_table(report: CurationReport) -> Table:
    """Build the terminal's table of what became of each source."""
    rows = [_row(escape(name), flow) for name, flow in through(report).items()]
    return console.table(
        "Sources",
        ["source", *_HEADINGS[1:], "share of the set"],
        [[*row, share] for row, share in zip(rows, _shares(report), strict=True)],
    )


_HEADINGS = ("stage", "documents in", "out", "characters in", "out", "kept")


def _row(name: str, flow: Flow) -> list[str]:
    kept = words.percent(flow.characters_out / flow.characters_in) if flow.characters_in else "–"
    counts = (flow.documents_in, flow.documents_out, flow.characters_in, flow.characters_out)
    return [name, *(f"{count:,}" for count in counts), kept]


def through(report: CurationReport) -> dict[str, Flow]:
    """Return the flow of each source from the first stage's door to the last one's."""
    first, last = report.stages[0].sources, report.stages[-1].sources
    return {
        name: Flow(
            first[name].documents_in,
            last[name].documents_out,
            first[name].characters_in,
            last[name].characters_out,
        )
        for name in first
    }


def _shares(report: CurationReport) -> list[str]:
    flows = through(report).values()
    total = max(sum(flow.characters_out for flow in flows), 1)
    return [words.percent(flow.characters_out / total) for flow in flows]


def curation_html(report: CurationReport) -> str:
    """Return the page."""
    first, last = report.stages[0].flow, report.stages[-1].flow
    return render(
        "curation",
        {
            "title": "Curated training set",
            "subtitle": " → ".join(stage.name for stage in report.stages),
            "tiles": _tiles(report, first, last),
            "headings": _HEADINGS,
            "stage_rows": [_row(stage.name, stage.flow) for stage in report.stages],
            "source_rows": [
                [*_row(name, flow), share]
                for (name, flow), share in zip(through(report).items(), _shares(report), strict=True)
            ],
            "lengths": lengths(report.lengths_before, report.lengths_after),
            "stages": [_stage(stage) for stage in report.stages],
        },
    )


def _tiles(report: CurationReport, first: Flow, last: Flow) -> list[dict[str, str]]:
    def tile(name: str, value: str, note: str) -> dict[str, str]:
        return {"name": name, "value": value, "note": note}

    kept = last.characters_out / max(first.characters_in, 1)
    return [
        tile("Documents", f"{last.documents_out:,}", f"of {first.documents_in:,}, repeats counted"),
        tile("Characters", f"{last.characters_out:,}", f"{words.percent(kept)} of {first.characters_in:,}"),
        tile("Size", words.megabytes(report.bytes), words.counted(len(report.shards), "part file")),
        tile("Sources", str(len(report.stages[0].sources)), f"{len(report.stages)} stages"),
    ]


def _stage(stage: StageResult) -> dict[str, Any]:
    return {
        "name": stage.name,
        "options": "\n".join(f"{key}: {value}" for key, value in stage.options.items()),
        "notes": stage.notes,
        "sources": [_row(name, flow) for name, flow in stage.sources.items()],
        "groups": [
            {"verb": verb, "reasons": [_reason(name, reason) for name, reason in reasons.items()]}
            for verb, reasons in (("Dropped", stage.dropped), ("Changed", stage.changed))
            if reasons
        ],
    }


def _reason(name: str, reason: Reason) -> dict[str, Any]:
    return {
        "name": name,
        "documents": f"{reason.documents:,}",
        "characters": f"{reason.characters:,}",
        "sources": ", ".join(f"{source} {count:,}" for source, count in reason.sources.items()),
        "examples": [
            {
                "place": f"{example.source}, document {example.document}",
                "note": example.note,
                "text": example.text,
            }
            for example in reason.examples
        ],
    }


def lengths(before: Sequence[int], after: Sequence[int]) -> str:
    """Draw the two histograms of length over powers of two: before filled, after as a line."""
    bins = max(len(before), len(after), 1)
    left, right, top, bottom = 64.0, 664.0, 10.0, 180.0
    marks = Marks(712, 226)
    most = max([*before, *after, 1])
    edges = [left + (right - left) * place / bins for place in range(bins + 1)]

    def heights(counts: Sequence[int]) -> list[float]:
        return [bottom - (bottom - top) * count / most for count in [*counts, *[0] * (bins - len(counts))]]

    for run in stairs(edges, heights(before), bottom):
        marks.area(run, "before")
    for run in stairs(edges, heights(after), bottom):
        marks.line(run, "after", 1.6)
    marks.line([(left, bottom), (right, bottom)], "line", 1)
    for place in range(0, bins + 1, max(1, -(-bins // 10))):
        marks.text(edges[place], bottom + 14, f"{2**place:,}", "muted", size=11, anchor="middle")
    marks.text(left, bottom + 34, "characters of a document", "muted", size=12)
    marks.text(left - 8, top, f"{most:,}", "muted", size=11, anchor="end")
    marks.text(left - 8, bottom, "0", "muted", size=11, anchor="end")
    return marks.svg("Lengths of the documents before and after curation")
