"""The curves of `sparse_quality.py` as one SVG file: right answers against density, one line a selector.

python benchmarks/sparse_quality_figure.py benchmarks/results/sparse_quality_cuda.json docs/sparse-quality.svg
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

SHOWN = {  # the others lie between these, near uniform
    "oracle": "black",
    "union": "C3",
    "tri_shape": "C0",
    "flashprefill": "C2",
    "minference": "C1",
    "flexprefill": "C4",
    "xattention": "C5",
    "vecattention": "C6",
    "stem": "C9",
    "uniform": "0.5",
}


def curves(raw: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return (density, average over the counted families in percent) of each selector at equal densities."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in raw["rows"]:
        if row["budget"].replace(".", "").isdigit():
            values = [row["families"][family]["value"] for family in raw["counted_families"]]
            found.setdefault(row["name"], []).append((float(row["budget"]), sum(values) / len(values)))
    return found


def draw(raw: dict[str, Any], path: Path) -> None:
    """Write the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    found = curves(raw)
    for name, colour in SHOWN.items():
        densities, averages = zip(*found[name], strict=True)
        style = {"oracle": "--", "uniform": ":"}.get(name, "-")
        axes.plot(densities, averages, style, color=colour, marker="o", markersize=4, label=name)
    axes.set_ylim(0, 103)
    axes.set_xticks(densities, [f"{density:g}" for density in densities])
    axes.set_xlabel("density: share of the causal area that is read")
    axes.set_ylabel(f"right answers at {raw['length']:,} tokens, %")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    text = re.sub(
        r"\s*<metadata>.*?</metadata>|<!DOCTYPE.*?>\s*|<!--.*?-->\s*", "", path.read_text("utf-8"), flags=re.S
    )
    path.write_text(text, "utf-8")  # the data alone


def main() -> None:
    """Read the arguments, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text("utf-8"))["raw"], arguments.figure)


if __name__ == "__main__":
    main()
