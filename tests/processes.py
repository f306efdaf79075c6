"""What several processes run, started by torchrun: the jobs of a plan one after another, then what they tell each other.

Usage: processes.py PLAN, a JSON file ``{"model": folder, "said": file, "jobs": [[recipe, words, out], ...]}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from angelslim import pipeline
from angelslim.base import parallel
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


def main() -> None:
    """Run the plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for recipe, words, out in plan["jobs"]:
        pipeline.run(job_for(Path(plan["model"]), recipe, *words), Path(out))
    parallel.start()
    Path(f"{plan['said']}-{parallel.rank()}").write_text(json.dumps(exchanged()))
    parallel.wait()


if __name__ == "__main__":
    main()
