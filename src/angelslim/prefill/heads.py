"""The search of head patterns in a model: MInference's offline calibration, one prompt and one forward.

The prompt lists keys and values and asks for an early one; the hook, with every block kept, hands over each layer's queries and
keys, and `methods.sparse._search` scores the candidates. Layers that are never sparse (sliding windows) get the default.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.console import log
from ..methods.sparse._patterns import HeadPattern, write_patterns
from ..methods.sparse._search import search_heads
from ..methods.sparse.assign import full
from ..methods.sparse.attach import attach
from ..methods.sparse.metadata import Metadata
from ..methods.sparse.plan import BlockPlan, Context
from .job import PrefillJob
from .measure import prefill_ms
from .prompts import retrieval_prompt

FILE = "heads.json"
ON_CPU, ON_GPU = 4096, 30_000  # tokens of the prompt; a head's whole map is in memory
DEFAULT = HeadPattern("vertical_and_slash", 1000, 6096)


def with_patterns(job: PrefillJob, model: Any, tokenizer: Any, folder: Path) -> Metadata:
    """Search the patterns, write them into `folder`, and return the settings that use them."""
    length = min(job.shape.longest, ON_GPU if job.device.type == "cuda" else ON_CPU)
    ids = retrieval_prompt(tokenizer, length, job.config.global_.seed).to(job.device)
    found: dict[int, tuple[HeadPattern, ...]] = {}

    def watch(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, ctx: Context) -> None:
        found[ctx.layer] = search_heads(q[0], k[0], ctx.scaling)

    settings = job.metadata.settings(crossover=0, measure=False)
    with attach(model, full, settings) as attached:
        attached.observer = watch
        prefill_ms(model, ids)
    shape = job.shape
    patterns = [found.get(layer, (DEFAULT,) * shape.heads) for layer in range(shape.layers)]
    log.info("Found the patterns of %d heads on %d tokens.", shape.heads * len(found), length)
    write_patterns(folder / FILE, patterns, job.metadata.model)
    rules = tuple(
        replace(rule, options={**rule.options, "patterns": FILE}) if rule.selector == "minference" else rule
        for rule in job.metadata.rules
    )
    return replace(job.metadata, rules=rules, folder=folder)
