"""What several processes run, started by torchrun: the jobs of a plan one after another, then what they tell each other.

Usage: processes.py PLAN, a JSON file ``{"said": file, "jobs": [[model, recipe, words, out], ...]}``. Each process
writes what it got to know, and which values it gave to the parameters of its blocks, to ``said-RANK``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from angelslim import pipeline
from angelslim.base import parallel
from angelslim.models import experts
from angelslim.models.block import Block
from angelslim.numerics.kv_cache import HeadRanges
from tiny import job_for


def exchanged() -> dict[str, Any]:
    """Use every exchange with what differs between two processes; return what this one got to know."""
    rank = parallel.rank()
    own = {
        "fp8": torch.tensor([[0.5, 448.0]]).to(torch.float8_e4m3fn) if rank else torch.ones(1),
        "half": torch.full((2, 3), 0.1, dtype=torch.bfloat16).T,
        "one": torch.tensor(-7),
        "none": torch.empty(0, 4),
    }
    given = parallel.broadcast(own, 1)
    silent = HeadRanges()
    if rank:
        silent.update(torch.tensor([0.5, -2.0]).reshape(1, 2, 1, 1))
    silent.merge()
    return {
        "types": [[name, str(value.dtype), list(value.shape)] for name, value in given.items()],
        "values": [value.float().tolist() for value in given.values()],
        "gathered": [value.tolist() for value in parallel.gathered(torch.arange(rank))],
        "numbered": parallel.numbered(3 + rank),
        "share": parallel.share(range(5)),
        "spread": parallel.spread([lambda: 0.1 + rank, lambda: 0.1 + rank, lambda: float("inf")]),
        "owners": parallel.owners([1, 6, 2, 2]),
        "heads": silent.amax.tolist(),
    }


def noted(given: dict[str, float]) -> None:
    """Note the sum of every value that a parameter of a block is given, by its path and the number of the time."""
    assign = Block._assign

    def note(block: Block, path: str, value: torch.Tensor) -> None:
        times = sum(key.startswith(f"{path} ") for key in given)
        given[f"{path} {times}"] = float(value.double().sum())
        assign(block, path, value)

    Block._assign = note  # type: ignore[method-assign]


def main() -> None:
    """Run the plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    said: dict[str, Any] = {}
    for model, recipe, words, out in plan["jobs"]:
        given: dict[str, float] = {}
        original, usual = Block._assign, experts.ENOUGH
        noted(given)
        experts.ENOUGH = 1 if Path(model).name == "sparse" else usual
        pipeline.run(job_for(Path(model), recipe, *words), Path(out))
        Block._assign, experts.ENOUGH = original, usual  # type: ignore[method-assign]
        said[Path(out).name] = given
    parallel.start()
    Path(f"{plan['said']}-{parallel.rank()}").write_text(json.dumps([said, exchanged()]))
    parallel.wait()


if __name__ == "__main__":
    main()
