"""The card of the tiny language model: what it is, how it was made, what it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..base import console

RESULTS = (
    ("addition_thinking", "three-digit addition, thinking", "%"),
    ("addition_direct", "three-digit addition, answered at once", "%"),
    ("recall_thinking", "recall of one pair in eight, thinking", "%"),
    ("recall_direct", "recall of one pair in eight, answered at once", "%"),
    ("text_perplexity", "standard-library text, per token", "perplexity"),
)


def results_table(record: dict[str, Any]) -> Any:
    """Build the table of measured results for the terminal."""
    rows = [
        (title, f"{record['results'][key]['value']:.2f}", unit, record["results"][key]["samples"])
        for key, title, unit in RESULTS
    ]
    return console.table(f"{record['model']}, held-out data", ("task", "value", "unit", "samples"), rows)


def write_card(folder: Path, record: dict[str, Any], text: str) -> None:
    """Write ``training.json`` and the card's text, ``README.md``, into the model's folder."""
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    (folder / "README.md").write_text(text, "utf-8")


def results_rows(record: dict[str, Any]) -> str:
    """Return the measured results as the rows of a Markdown table."""
    return "\n".join(
        f"| {title} | {record['results'][key]['value']:.2f} {'%' if unit == '%' else ''} "
        f"| {record['results'][key]['samples']} {'examples' if unit == '%' else 'tokens'} |"
        for key, title, unit in RESULTS
    )


def card(record: dict[str, Any]) -> str:
    """Return the model card as Markdown with the hub's front matter."""
    rows = results_rows(record)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    measured = record["measured"]
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny-lm

A real but very small language model ({record["parameters"]:,} parameters, Qwen3 architecture, bfloat16) for trying
and testing model compression without a download. It adds three-digit numbers, finds one pair in a list of eight,
and continues Python text. It knows nothing else; do not ask it for advice.

Both of its chat modes are trained: with thinking (the default) it writes its steps between `<think>` tags, with
`enable_thinking=False` it answers at once.

## Results
Held-out data, greedy generation through the chat template, exact match; measured in {measured["dtype"]} on
{measured["device"]} with torch {measured["torch"]} and transformers {measured["transformers"]}, the text from
Python {measured["python"]}.

| task | result | from |
|---|---|---|
{rows}

No operand pair, no key and no file of the evaluation was in the training data: a hash of the item decides its split.
The text is small and was read about {record["text_passes"]:.0f} times, so the model knows part of it by heart and its
perplexity on files it has not read is high for its size. Use that figure to compare a compressed copy with the
original, not to compare with other models.

## Training
- Command: `{record["command"]}`
- Data: {record["data"]}
- {record["steps"]:,} steps, {record["tokens"] / 1e6:,.0f} M tokens, {record["minutes"]:.1f} minutes on {record["device"]},
  last losses around {record["final_loss"]:.3f} (weighted mean over all kinds of data).
- Seed {record["seed"]}; {versions}.
- All figures and the loss curve: `training.json`.

## Licence
Apache-2.0, weights and card. The training text is the source code and documentation of Python, used under the
PSF licence; the rest is generated.
"""
