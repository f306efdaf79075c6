"""What sparse attention loses, on `tiny-long`, every selector at the same densities and with its paper's own budget.

    python benchmarks/sparse_quality.py src/angelslim/assets/tiny-long --device cuda

Families of tasks and their scores are the model's own (`angelslim.lab.long.score`): each row is read in one sparse forward pass
and an answer is right if all of its tokens are. Rows are the same for every selector, so differences are taken row by row.
The average is over the families that dense attention answers to at least `SOLVED` percent; the others are shown and say nothing
about sparsity. Text is shown as perplexity and is not in the average.

Blocks are smaller than the model's own kernel would like (`BLOCK`): with 64 tokens a block and density .05 every selector
keeps little more than the blocks that all of them must keep. Finished rows are kept in `--work` and not measured again.

Nothing is tuned on these rows: selectors' constants are what they are in the package, and `SEED` is used nowhere else.
The oracle knows the true mass of every block, which costs as much as attention; it bounds what a choice by mass can keep.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from angelslim.base.console import setup
from angelslim.data import builtin
from angelslim.lab.long.score import FAMILIES, TEXT, Result, rows_of, score
from angelslim.lab.long.tokens import Tokens, encode
from angelslim.methods.sparse.attach import Settings, attach
from angelslim.methods.sparse.selectors.base import SELECTORS
from common import bar, write

SEED = 77_000
BLOCK = 32
DENSITIES = (0.05, 0.10, 0.20, 0.30)
SOLVED = 80.0  # percent that dense attention must reach for a family to count
RESAMPLES = 2000
ROWS = {"cuda": 100, "cpu": 12}
LAST = ("union", "uniform", "oracle")  # in the table
VARIANTS = {"stem without TPD": {"tpd": False}, "stem without OAM": {"oam": False}}
NATIVE = "own budget"


@dataclass
class Row:
    """One selector with one budget: a result for each family."""

    name: str
    budget: str  # "0.10", or NATIVE
    density: float | None = None  # what was read
    seconds: float = 0.0
    results: dict[str, Result] = field(default_factory=dict)

    def average(self, families: list[str]) -> float:
        """The mean over families, in percent."""
        return float(np.mean([self.results[family].value for family in families]))

    @classmethod
    def read(cls, line: str) -> Row:
        """Read what `line` wrote."""
        raw = json.loads(line)
        results = {
            family: Result(family, length, tuple(each))
            for family, (length, each) in raw.pop("results").items()
        }
        return cls(**raw, results=results)

    def line(self) -> str:
        """One line of the work file."""
        results = {family: (result.length, result.each) for family, result in self.results.items()}
        facts = {"name": self.name, "budget": self.budget, "density": self.density, "seconds": self.seconds}
        return json.dumps({**facts, "results": results})

    def plain(self) -> dict[str, Any]:
        """Plain values for the JSON."""
        return {
            "name": self.name,
            "budget": self.budget,
            "density": self.density,
            "seconds": round(self.seconds, 2),
            "families": {
                family: {"value": round(result.value, 3), "stderr": round(result.stderr, 3)}
                for family, result in self.results.items()
            },
        }


def configurations(
    densities: tuple[float, ...], names: list[str]
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield name, budget, selector and options of every row but dense."""
    budgets: list[tuple[str, dict[str, Any]]] = [
        (f"{density:.2f}", {"density": density}) for density in densities
    ]
    for name in names:
        for budget, options in [*budgets, (NATIVE, {})]:
            yield name, budget, name, options
    if "stem" in names:
        for variant, switched in VARIANTS.items():
            for budget, options in budgets:
                yield variant, budget, "stem", {**options, **switched}


def draw(
    tokens: Tokens, corpus: torch.Tensor, length: int, rows: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Draw the rows of every family."""
    return {
        family: rows_of(family, tokens, corpus, length, rows, SEED + number)
        for number, family in enumerate((*FAMILIES, TEXT))
    }


def measure(
    model: Any, row: Row, drawn: dict[str, Any], selector: str, options: dict[str, Any], block: int
) -> Row:
    """Score every family with one selector, or with dense attention."""
    context: AbstractContextManager[Any] = nullcontext()
    if selector != "dense":
        context = attach(model, SELECTORS.get(selector)(options).select, Settings(block=block, crossover=0))
    begun = time.perf_counter()
    with context as attached:
        for family, (tokens, weights) in drawn.items():
            row.results[family] = score(model, family, tokens, weights)
        row.density = 1.0 if selector == "dense" else attached.total()["density"]
    row.seconds = time.perf_counter() - begun
    return row


def difference(one: list[Row], other: list[Row], families: list[str]) -> tuple[float, float, float]:
    """Return the mean difference of two lists of rows over families and budgets, and its 95 % interval, in points."""
    rng = np.random.default_rng(0)
    means, drawn = [], np.zeros(RESAMPLES)
    for a, b in zip(one, other, strict=True):
        for family in families:
            apart = 100 * (np.asarray(a.results[family].each) - np.asarray(b.results[family].each))
            means.append(apart.mean())
            drawn += rng.choice(apart, (RESAMPLES, len(apart))).mean(1)
    drawn /= len(means)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.mean(means)), float(low), float(high)


def compare(rows: list[Row], densities: tuple[float, ...], families: list[str]) -> dict[str, Any]:
    """Compare at equal density: stem with uniform, union with every other that is no oracle."""

    def at(name: str, budgets: list[str]) -> list[Row]:
        return [next(row for row in rows if (row.name, row.budget) == (name, budget)) for budget in budgets]

    every = [f"{density:.2f}" for density in densities]
    names = {row.name for row in rows if row.budget in every}
    pairs = [("stem", name) for name in ("uniform", *VARIANTS) if {"stem", name} <= names]
    if "union" in names:
        pairs += [("union", name) for name in sorted(names - {"union", "oracle"})]
    found: dict[str, Any] = {}
    for one, other in pairs:
        found[f"{one} - {other}"] = {
            budget or "all": dict(
                zip(
                    ("points", "low", "high"),
                    difference(at(one, chosen), at(other, chosen), families),
                    strict=True,
                )
            )
            for budget, chosen in [("", every), *((budget, [budget]) for budget in every)]
        }
    return found


def markdown(rows: list[Row], families: list[str]) -> str:
    """Return the table."""
    every = [*FAMILIES, TEXT]
    heads = [family if family in families or family == TEXT else f"({family})" for family in every]
    lines = [
        "| selector | budget | density | " + " | ".join(heads) + " | average |",
        "|---" * (len(every) + 4) + "|",
    ]
    for row in rows:
        values = [f"{row.results[f].value:.1f} ± {row.results[f].stderr:.1f}" for f in every]
        density = "–" if row.density is None else f"{row.density:.3f}"
        average = f"{row.average(families):.1f}" if families else "–"
        lines.append(f"| {row.name} | {row.budget} | {density} | {' | '.join(values)} | {average} |")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Measure everything; return the raw figures, the bars and the table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((arguments.model / "training.json").read_text("utf-8"))
    device, dtype = arguments.device, torch.bfloat16 if arguments.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    corpus = encode(tokenizer, builtin.text("evaluation", 10**9)).to(device)
    length = arguments.length or max(result["length"] for result in record["results"])
    drawn = draw(Tokens(**record["language"]), corpus, length, arguments.rows or ROWS[device])
    names = arguments.selectors or [*sorted(set(SELECTORS) - set(LAST)), *LAST]
    block = arguments.block
    kept = _kept(arguments.work)

    def measured(row: Row, selector: str, options: dict[str, Any]) -> Row:
        if (row.name, row.budget) not in kept:
            kept[row.name, row.budget] = measure(model, row, drawn, selector, options, block)
            if arguments.work is not None:
                with arguments.work.open("a", encoding="utf-8") as file:
                    file.write(kept[row.name, row.budget].line() + "\n")
        return kept[row.name, row.budget]

    dense = measured(Row("dense", "–"), "dense", {})
    families = [family for family in FAMILIES if dense.results[family].value >= SOLVED]
    rows = [dense]
    for name, budget, selector, options in configurations(arguments.densities, names):
        row = measured(Row(name, budget), selector, options)
        rows.append(row)
        print(
            f"{name}, {budget}: density {row.density}, {row.average(families) if families else 0:.1f}, {row.seconds:.1f} s",
            flush=True,
        )
    found = compare(rows, arguments.densities, families) if families else {}
    bars = [
        bar(f"{pair}, points at equal density", found[pair]["all"]["points"], 0.0, at_most=False)
        for pair in found
        if pair == "stem - uniform" or pair.startswith("union")
    ]
    raw = {
        "model": {key: record[key] for key in ("command", "parameters", "size", "device")},
        "length": length,
        "block": block,
        "rows_a_family": len(dense.results[TEXT].each),
        "seed": SEED,
        "counted_families": families,
        "differences": found,
        "rows": [row.plain() for row in rows],
    }
    return raw, bars, markdown(rows, families)


def _kept(work: Path | None) -> dict[tuple[str, str], Row]:
    if work is None or not work.exists():
        return {}
    rows = [Row.read(line) for line in work.read_text("utf-8").splitlines()]
    return {(row.name, row.budget): row for row in rows}


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of tiny-long")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--length", type=int, help="tokens (default: the longest the model was scored at)")
    parser.add_argument("--rows", type=int, help="of each family")
    parser.add_argument("--block", type=int, default=BLOCK, help="tokens on a block's side")
    parser.add_argument(
        "--work", type=Path, help="file of finished rows, of one setting; a killed run goes on"
    )
    parser.add_argument("--selectors", nargs="*", help="default: all")
    parser.add_argument("--densities", type=float, nargs="*", default=DENSITIES)
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: benchmarks/results)")
    arguments = parser.parse_args()
    arguments.densities = tuple(arguments.densities)
    setup(quiet=True)
    raw, bars, table = run(arguments)
    print(table)
    name = f"sparse_quality_{arguments.device}"
    print(write(name, raw, bars, *([arguments.out] if arguments.out else [])))


if __name__ == "__main__":
    main()
