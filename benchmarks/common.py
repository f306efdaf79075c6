"""What every benchmark shares: the environment it ran in, and one results file with its bars."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from angelslim.pipeline import PACKAGES, versions

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions and hardware, for the reader of a figure."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **versions(PACKAGES),
    }


def bar(name: str, value: float, goal: float, *, at_most: bool) -> dict[str, Any]:
    """One figure that has to hold: `value` at most, or at least, `goal`."""
    return {"name": name, "value": value, "goal": goal, "holds": value <= goal if at_most else value >= goal}


def write(name: str, raw: Any, bars: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write ``results/NAME.json``, or NAME.json in another folder for a run that is only a part, and print the bars."""
    path = folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "bars": bars, "raw": raw}, indent=1) + "\n")
    for item in bars:
        print(
            f"{'ok  ' if item['holds'] else 'FAIL'} {item['name']}: {item['value']:.4g} (goal {item['goal']:.4g})"
        )
    return path
