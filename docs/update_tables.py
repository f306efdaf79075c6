"""Fill the result tables of README.md and docs/*.md from the runs in ``quickstart/``.

A page marks the place with ``<!-- quickstart:begin -->`` and ``<!-- quickstart:end -->``. Every figure comes from
a ``run.json``; run ``angelslim quickstart`` first.

    python docs/update_tables.py [FOLDER] [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from angelslim.lab.quickstart import METHODS
from angelslim.models.checkpoint import write_atomically
from angelslim.report.record import RunRecord
from angelslim.report.summary import to_markdown

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"


def table(folder: Path) -> str:
    """Return the comparison of all quickstart runs as a markdown table, with what it was measured on."""
    records = [RunRecord.load(folder / method) for method in METHODS]
    tasks = [score for score in records[0].before if score.unit == "%"]
    counts = ", ".join(f"{score.metric} on {score.samples} questions" for score in tasks)
    tokens = next(score.samples for score in records[0].before if score.metric == "perplexity")
    versions = records[0].versions
    note = (
        f"`tiny-lm`; perplexity on {tokens:,} tokens of held-out text, {counts}, seed {records[0].seed}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}. After ± stands one standard error."
    )
    return f"{to_markdown(records)}\n{note}\n"


def filled(text: str, content: str) -> str:
    """Return `text` with everything between the markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{content}{end}{after}" if begin and end else text


def main() -> int:
    """Update the pages; with ``--check`` only say whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=ROOT / "quickstart", help="folder of the runs"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; status 1 when a page is out of date"
    )
    options = parser.parse_args()
    content = table(options.folder)
    stale = 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text("utf-8")
        new = filled(text, content)
        if new == text:
            continue
        stale += 1
        if not options.check:
            write_atomically(page, new.encode())
        sys.stdout.write(f"{'out of date' if options.check else 'updated'}: {page.relative_to(ROOT)}\n")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
