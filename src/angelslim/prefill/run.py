"""Carry out a run: search heads, measure, find the crossover, write the settings with a record and a page.

Everything is written to ``OUT.partial`` and renamed to ``OUT`` at the end, so a result is complete or not there. It holds
``sparse_attention.json`` (and ``heads.json`` where patterns belong to it), ``run.json``, ``run.yaml`` and ``report.html``.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..base.console import chose, log
from ..base.errors import ModelError, UserError
from ..base.memory import peak_resident
from ..base.place import MARKER
from ..config.files import write_yaml
from ..evaluate.base import Score
from ..evaluate.perplexity import perplexity, read_text
from ..evaluate.suite import DEFAULT_MAX_TOKENS, evaluation_text
from ..methods.sparse.attach import attach
from ..methods.sparse.metadata import Metadata
from ..models.checkpoint import write_atomically
from ..models.loading import torch_dtype
from ..pipeline import PACKAGES, SMALL_MODEL, versions
from ..report.prefill import PrefillRecord, prefill_html
from ..work import tokenizer_of
from .heads import FILE as HEADS
from .heads import with_patterns
from .job import PrefillJob
from .measure import crossover_of, first_tokens, head_losses
from .prompts import text_prompt


def run(job: PrefillJob, out: Path, *, command: str = "", overwrite: bool = False) -> PrefillRecord:
    """Do the work of a job and leave its result in `out`; returns its record."""
    from ..reopen import load

    started = time.perf_counter()
    out = out.resolve()
    finished = _finished(job, out, overwrite)
    if finished is not None:
        return finished
    partial = out.with_name(out.name + ".partial")
    if (partial / MARKER).exists() and not overwrite:  # ours have none: they are never gone on with
        raise UserError(
            f"{partial} holds the unfinished work of another command.",
            fix="Finish it with its own command, choose another --out, or pass --overwrite.",
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tokenizer = tokenizer_of(job.source.folder)
        model = load(job.source.name, device=job.device, trust_remote_code=job.config.model.trust_remote_code)
        torch.manual_seed(job.config.global_.seed)
        metadata = (
            with_patterns(job, model, tokenizer, partial) if job.search_heads else _with_files(job, partial)
        )
        record = _measured(job, model, tokenizer, metadata)
        record.command, record.seconds = command, round(time.perf_counter() - started, 3)
        record.peak_memory_bytes = max(
            peak_resident(), max((row.sparse_peak for row in record.lengths), default=0)
        )
        replace(metadata, crossover=record.crossover).write(partial)  # type: ignore[arg-type]
        _describe(job, record, partial)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record


def describe(metadata: Metadata) -> list[str]:
    """The rules in words, one a rule."""
    found = []
    for rule in metadata.rules:
        options = ", ".join(f"{key} {value}" for key, value in rule.options.items())
        places = [
            f"{what}{'s' * (len(numbers) > 1)} {_ranges(numbers)}"
            for what, numbers in (("layer", rule.layers), ("head", rule.heads))
            if numbers is not None
        ]
        found.append(
            rule.selector
            + (f" ({options})" if options else "")
            + (f" in {', '.join(places)}" if places else "")
        )
    return found


def _measured(job: PrefillJob, model: Any, tokenizer: Any, metadata: Metadata) -> PrefillRecord:
    measure = job.measure
    record = PrefillRecord(
        method=job.name,
        model=job.source.name,
        model_type=job.source.config.get_text_config().model_type,
        parameters=sum(math.prod(info.shape) for info in job.source.checkpoint.tensors.values()),
        rules=describe(metadata),
        block=metadata.block,
        crossover=metadata.crossover,
        crossover_from="as the recipe sets it"
        if metadata.crossover != "auto"
        else "measured at the first prompt",
        kernel=metadata.kernel,
        device=str(job.device),
        dtype=str(torch_dtype(job.source.config)).removeprefix("torch."),
        config=job.resolved.raw,
        provenance=job.resolved.provenance,
        seed=job.config.global_.seed,
        versions={"python": platform.python_version(), **versions(PACKAGES)},
        fingerprint=job.fingerprint(),
        warnings=list(job.resolved.warnings),
    )
    if not measure.enabled:
        return record
    record.lengths = first_tokens(
        job, model, metadata, lambda length: text_prompt(job, tokenizer, length, "calibration")
    )
    if metadata.crossover == "auto":
        record.crossover, record.crossover_from = crossover_of(record.lengths)
        chose(f"sparse from {record.crossover} tokens on", record.crossover_from)
    record.heads_tokens = min(measure.heads_length, max(job.lengths))
    ids = text_prompt(job, tokenizer, record.heads_tokens, "evaluation").to(job.device)
    record.heads = head_losses(model, metadata, ids)
    _say_what_stays_dense(record)
    record.before, record.after = _quality(job, model, tokenizer, metadata, record.heads_tokens)
    return record


def _quality(
    job: PrefillJob, model: Any, tokenizer: Any, metadata: Metadata, window: int
) -> tuple[list[Score], list[Score]]:
    """Perplexity in windows of as many tokens as the heads are compared on, dense and sparse."""
    settings = job.config.evaluation
    if not settings.enabled or settings.perplexity is False:
        return [], []
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > SMALL_MODEL and job.device.type == "cpu":
        chose("no evaluation", f"{count / 1e9:.1f} B parameters on a CPU; use `angelslim eval --attn` later")
        return [], []
    named = isinstance(settings.perplexity, str)
    passage = read_text(Path(str(settings.perplexity))) if named else evaluation_text()
    limits: Mapping[str, int] = {
        "window": window,
        "stride": window,
        "max_tokens": max(DEFAULT_MAX_TOKENS, window + 1),
    }
    dense = perplexity(model, tokenizer, passage, device=job.device, **limits)
    with attach(model, metadata.make_rules(), metadata.settings(crossover=0, measure=False)):
        sparse = perplexity(model, tokenizer, passage, device=job.device, **limits)
    return [dense], [sparse]


def _say_what_stays_dense(record: PrefillRecord) -> None:
    """A run in which nothing was sparse is said aloud; each reason is in the record."""
    if not any(row.calls for row in record.lengths):
        reasons = ", ".join(sorted(record.fallbacks)) or "no layer attends through the interface"
        text = f"No layer was sparse: {reasons}."
        log.warning("%s", text)
        record.warnings.append(text)


def _with_files(job: PrefillJob, folder: Path) -> Metadata:
    """Copy the pattern files that options name into the result, so that it can be moved as a whole."""
    rules, copied = [], dict[str, str]()
    for rule in job.metadata.rules:
        path = rule.options.get("patterns")
        if path:
            name = copied.setdefault(str(path), HEADS if not copied else f"heads-{len(copied)}.json")
            shutil.copyfile(str(path), folder / name)
            rule = replace(rule, options={**rule.options, "patterns": name})
        rules.append(rule)
    return replace(job.metadata, rules=tuple(rules), folder=folder)


def _describe(job: PrefillJob, record: PrefillRecord, folder: Path) -> None:
    write_atomically(folder / "run.json", record.to_json().encode())
    settings = job.resolved.raw
    named = {**settings, "model": {**(settings.get("model") or {}), "model_path": job.source.name}}
    write_atomically(folder / "run.yaml", write_yaml(named).encode())
    write_atomically(folder / "report.html", prefill_html(record).encode())


def _finished(job: PrefillJob, out: Path, overwrite: bool) -> PrefillRecord | None:
    """The record of this very run when `out` holds it; anything else there is replaced only if asked."""
    if job.source.folder.resolve().is_relative_to(out):
        raise UserError(
            f"{out} is, or holds, the model itself.",
            fix="Choose another --out, then copy sparse_attention.json.",
        )
    if not out.exists() or (out.is_dir() and (overwrite or not any(out.iterdir()))):
        return None
    record = None
    with suppress(ModelError):
        record = PrefillRecord.load(out)
    if record is None or record.fingerprint != job.fingerprint():
        raise UserError(f"{out} already exists.", fix="Choose another --out, or pass --overwrite.")
    log.info("%s already holds this result; nothing to do.", out)
    return record


def _ranges(numbers: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` as ``0-2, 5``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
