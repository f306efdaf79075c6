"""Layer 7: run a job: calibrate, quantize, write, check, measure, report. Knows no method's name.

Everything is built in ``OUT.partial`` and renamed to ``OUT`` at the end, so an output folder is complete or does
not exist. Each unit (a decoder block, or the tensors outside) is a checkpoint: the same command after a kill
continues with the first unit that is missing, and the weights come out byte for byte as if nothing had
happened. ``OUT.partial/job.json`` holds the fingerprint that ties the pieces to one recipe and one model.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .base import parallel
from .base.console import chose, log
from .base.errors import ModelError, ResourceError, UserError
from .base.memory import peak_resident
from .check import check
from .config.files import write_yaml
from .data import builtin
from .evaluate.base import Score
from .evaluate.suite import evaluate
from .job import KEPT_FILES, NEVER_COPIED, Job
from .models.builtin import BUILTIN
from .models.checkpoint import UnitWriter, write_atomically
from .models.select import kept_matrices
from .numerics.error import LayerRecord
from .plan import check_disk
from .reopen import load
from .report.card import write_card
from .report.html import write_html
from .report.record import RunRecord
from .work import Done, Workplace, compress_units, has_tokenizer, tokenizer_of

PACKAGES = ("angelslim", "torch", "transformers", "safetensors", "compressed-tensors")
SMALL_MODEL = 300_000_000  # parameters up to which a run measures perplexity unasked on a CPU


def run(
    job: Job,
    out: Path,
    *,
    command: str = "",
    overwrite: bool = False,
    before: Sequence[Score] | None = None,
    training: dict[str, Any] | None = None,
) -> RunRecord:
    """Carry out a job and leave a complete model folder in `out`; returns its record.

    `training` is the record of how the weights were made. `before` are scores of the original that a caller already has; without them the original is measured too.
    """
    started = time.perf_counter()
    out = out.resolve()  # a name is needed to put OUT.partial beside it, also for "."
    fingerprint = job.fingerprint()
    finished = _finished(job, out, fingerprint, overwrite)
    if finished is not None:
        return finished
    workplace = Workplace(out.with_name(out.name + ".partial"))
    with _writing_to(workplace.root):
        if not workplace.root.exists():
            check_disk(job, out)
        resumed = workplace.open(fingerprint)
        if resumed:
            log.info("Continuing the unfinished run in %s", workplace.root)
        try:
            done = compress_units(job, workplace)
            if parallel.first():
                _assemble(job, workplace)
                check(workplace.result, plain=not job.exporter.method)
        except UserError:
            if (
                not resumed and parallel.first()
            ):  # what has to be mended makes it another run, which could not continue this one
                shutil.rmtree(workplace.root)
            raise
        if not parallel.first():  # the first process writes, measures and reports
            parallel.wait()
            return RunRecord.load(out)
        record = _record(job, done, workplace, command, fingerprint)
        record.training = training
        _measure(job, workplace, record, before)
        before_that = float(training["seconds"]) if training else 0.0
        record.seconds = round(time.perf_counter() - started + before_that, 3)
        record.peak_memory_bytes = peak_resident()
        _describe(job, workplace, record)
        if out.exists():
            shutil.rmtree(out)
        workplace.result.rename(out)
        shutil.rmtree(workplace.root)
    parallel.wait()
    return record


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an error that says what to do; the work done so far stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"Writing to {folder} failed ({getattr(error, 'strerror', None) or error}).",
            fix="Free some disk space or choose another --out; the same command continues where it stopped.",
        ) from error


def _finished(job: Job, out: Path, fingerprint: str, overwrite: bool) -> RunRecord | None:
    """Return the record of this very result when `out` holds it; refuse to replace anything else unasked."""
    if job.source.folder.resolve().is_relative_to(out):
        raise UserError(f"{out} is, or holds, the model itself.", fix="Choose another --out.")
    if not out.exists() or (out.is_dir() and (overwrite or not any(out.iterdir()))):
        return None
    record = None
    with suppress(ModelError, OSError):
        record = RunRecord.load(out)
    if record is None or record.fingerprint != fingerprint:
        raise UserError(f"{out} already exists.", fix="Choose another --out, or pass --overwrite.")
    log.info("%s already holds this result; nothing to do.", out)
    return record


def _assemble(job: Job, workplace: Workplace) -> None:
    """Join the units into shards and write what makes them a model folder."""
    result = workplace.result
    code = ("*.py",) if job.config.model.trust_remote_code else ()
    for pattern in (*KEPT_FILES, *code):
        for file in job.source.folder.glob(pattern):
            if file.name not in NEVER_COPIED:
                shutil.copyfile(file, result / file.name)
    config = json.loads((job.source.folder / "config.json").read_text("utf-8"))
    schemes = {layer.name: layer.scheme for layer in job.selection.layers}
    config |= job.source.edits
    layers = job.selection.layers
    kept = kept_matrices(job.source, {name for layer in layers for name in (layer.module, layer.name)})
    if settings := job.exporter.config(schemes, kept):
        config["quantization_config"] = settings
    write_atomically(result / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    UnitWriter(workplace.units).finish(
        [unit.name for unit in job.units], result, job.config.global_.max_shard_size
    )


def _measure(job: Job, workplace: Workplace, record: RunRecord, before: Sequence[Score] | None) -> None:
    """Evaluate the original and the result, unless the recipe or the model's size says otherwise."""
    if not job.config.evaluation.enabled:
        return
    if record.parameters > SMALL_MODEL and job.device.type == "cpu":
        chose(
            "no evaluation",
            f"{record.parameters / 1e9:.1f} B parameters on a CPU; use `angelslim eval` later",
        )
        return
    if not has_tokenizer(job.source.folder):
        chose("no evaluation", "the model folder holds no tokenizer")
        return
    record.before = list(before) if before is not None else measure(job, job.source.folder)
    record.after = measure(job, workplace.result)


def measure(job: Job, folder: Path) -> list[Score]:
    """Evaluate the model in `folder` as the job's recipe asks: its own tasks by default for the built-in model."""
    settings = job.config.evaluation
    tasks = settings.tasks or (builtin.TASKS if job.source.name in BUILTIN else ())
    return evaluate(
        load(folder, device=job.device),
        tokenizer_of(job.source.folder),
        text=Path(settings.perplexity) if isinstance(settings.perplexity, str) else settings.perplexity,
        tasks=tasks,
        samples=settings.samples,
        seed=job.config.global_.seed,
    )


def _record(job: Job, done: Done, workplace: Workplace, command: str, fingerprint: str) -> RunRecord:
    layers = done.layers
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    bits = sum(x.bits_per_weight * x.shape[0] * x.shape[1] for x in layers)
    files = sorted(workplace.result.glob("*.safetensors"))
    return RunRecord(
        method=job.name,
        model=job.source.name,
        model_type=job.source.structure.model_type,
        scheme=job.rounds_to,
        format=job.written_as,
        parameters=job.source.checkpoint.parameters,
        bytes_before=job.source.checkpoint.nbytes,
        bytes_after=sum(file.stat().st_size for file in files),
        bits_per_weight=bits / weights if weights else 8.0 * job.source.dtype.itemsize,
        seconds=0.0,
        peak_memory_bytes=0,
        layers=layers,
        experts=done.experts,
        trial=None if done.trial is None else done.trial.to_dict(),
        skipped=job.selection.skipped,
        config=job.resolved.raw,
        provenance=job.resolved.provenance,
        command=command,
        seed=job.config.global_.seed,
        versions={"python": platform.python_version(), **versions(PACKAGES)},
        fingerprint=fingerprint,
        hashes={file.name: _sha256(file) for file in files},
        warnings=[*job.resolved.warnings, *_remarks(layers)],
    )


def _remarks(layers: list[LayerRecord]) -> list[str]:
    """Sum up what methods noted about layers, and say it aloud: one line for each thing noted."""
    noted: dict[str, list[str]] = {}
    for layer in layers:
        if layer.note:
            noted.setdefault(layer.note, []).append(layer.name)
    remarks = []
    for note, names in noted.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        remarks.append(f"{names[0]}{more}: {note}.")
        log.warning("%s", remarks[-1])
    return remarks


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(job: Job, workplace: Workplace, record: RunRecord) -> None:
    result = workplace.result
    write_atomically(result / "run.json", record.to_json().encode())
    settings = job.resolved.raw
    named = {**settings, "model": {**(settings.get("model") or {}), "model_path": job.source.name}}
    write_atomically(result / "run.yaml", write_yaml(named).encode())
    write_html([record], result / "report.html")
    write_card(record, result / "README.md")
