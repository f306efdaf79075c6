"""Run a curation: read, stage after stage, write; resume where a killed run stopped.

Every choice and refusal comes first (`prepare`), then one pass per stage over what is left. A stage's decisions are
committed as files (see `work`); the same command after a kill loads the finished stages and goes on at the first missing
one. The result appears under its name when it is complete.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base import console
from ...base.errors import ConfigError, DataError, ResourceError, UserError
from ...base.files import write_atomically
from ...base.place import fingerprint
from ...config.curation import Curation, checked, load_curation
from ...config.fields import Section
from ...config.files import write_yaml
from .base import STAGES, Context, Stage
from .corpus import Corpus, SourceFiles, read_sources, resolve
from .ledger import Ledger
from .results import CurationReport, Example, Reason, Sizes, StageResult, flows, length_histogram
from .shards import write_shards
from .texts import snippet
from .work import READ, REPORT, Workplace, finished

VERSION = "1"  # of the stages' behaviour: a partial folder of another version is not continued
EMPTY = "empty"
State = tuple[Sizes, Sizes]  # how often each document is taken, its characters


@dataclass(frozen=True)
class Plan:
    """A checked recipe: everything is known but the documents."""

    config: Curation
    sources: list[SourceFiles]
    stages: list[tuple[str, dict[str, Any], Stage]]  # "02-fuzzy", its options, the stage
    mark: str

    @property
    def names(self) -> list[str]:
        """The sources' names."""
        return [source.name for source in self.sources]


def checked_steps(recipe: Path) -> tuple[Curation, list[tuple[str, Section, str]]]:
    """Read a recipe and check every stage's options: the recipe, and each stage's name, options and place."""
    config = load_curation(recipe)
    given = config.steps()
    steps: list[tuple[str, Section, str]] = []
    for number, (name, raw) in enumerate(given, start=1):
        kind = STAGES.get(name)
        where = f"{recipe}, stage {number} ({name})"
        if kind.last and number < len(given):
            fix = "Move it to the end."
            raise ConfigError(
                "No stage can follow this one: it chooses among what is left.", where=where, fix=fix
            )
        steps.append((name, checked(kind.section, raw, where), where))
    return config, steps


def prepare(recipe: Path, workplace: Workplace) -> Plan:
    """Make every stage and find every file; what cannot work is refused here."""
    config, steps = checked_steps(recipe)
    names = [source.name for source in config.sources]
    stages: list[tuple[str, dict[str, Any], Stage]] = []
    for number, (name, options, where) in enumerate(steps, start=1):
        stem = f"{number:02d}-{name}"
        stage = STAGES.get(name)(options, Context(where, config.seed, names, workplace.kept / stem))
        stages.append((stem, options.model_dump(mode="json"), stage))
    sources = resolve(config.sources, str(recipe))
    files = [path for source in sources for path in source.paths]
    files += [str(path) for _, _, stage in stages for path in stage.reads()]
    return Plan(config, sources, stages, fingerprint(config.given(), files, VERSION))


def curate(
    recipe: Path,
    out: Path,
    *,
    overwrite: bool = False,
    page: Callable[[CurationReport], str] | None = None,
) -> CurationReport:
    """Carry out `recipe` and leave the curated set in the folder `out`; returns its report.

    `page` draws ``report.html`` from the report. A run that was killed continues when it is called again.
    """
    out = out.resolve()
    workplace = Workplace(out)
    plan = prepare(recipe, workplace)
    done = finished(out, plan.mark, overwrite)
    if done is not None:
        workplace.clear(plan.mark)
        console.log.info("%s is this curated set already; nothing to do.", out)
        return done
    try:
        resumed = workplace.open(plan.mark, overwrite)
        if resumed:
            console.log.info("Continuing the unfinished run in %s", workplace.root)
        try:
            report = _carry_out(plan, workplace, page)
        except UserError:
            if not resumed:  # what has to be mended makes it another run, which could not continue this one
                shutil.rmtree(workplace.root)
            raise
        if out.exists():
            shutil.rmtree(out)
        workplace.result.rename(out)
        shutil.rmtree(workplace.root)
    except OSError as error:
        raise ResourceError(
            f"Writing to {error.filename or workplace.root} failed ({error.strerror or error}).",
            fix="Free some disk space or choose another --out; the same command continues.",
        ) from error
    return report


def _carry_out(
    plan: Plan, workplace: Workplace, page: Callable[[CurationReport], str] | None
) -> CurationReport:
    """Do everything that is not done yet; the result is complete in the working folder then."""
    first, state, sources = _read(plan, workplace)
    results: list[StageResult] = [first]
    spool: Path | None = None
    for step in plan.stages:
        state, result = _step(plan, workplace, step, state, sources, spool)
        spool = workplace.spool(step[0]) if step[2].changes else spool
        results.append(result)
        _nothing_left(result)
    report = _write(plan, workplace, results, state, spool)
    if page is not None:
        write_atomically(workplace.result / "report.html", page(report).encode())
    write_atomically(workplace.result / REPORT, report.to_json().encode())
    return report


def _read(plan: Plan, workplace: Workplace) -> tuple[StageResult, State, NDArray[np.uint16]]:
    """Read everything once: how many documents, how long, from which source; empty ones are left out."""
    done = workplace.load(READ)
    if done is not None:
        return done[1], done[0], workplace.sources()
    sizes, sources, empty = array("q"), array("H"), Reason()
    for document in read_sources(plan.sources):
        text = document.text
        full = bool(text.strip())
        if not full:
            empty.count(len(text), Example(plan.names[document.source], document.index, snippet(text)))
        sizes.append(len(text) if full else 0)
        sources.append(document.source)
    length, numbers = np.array(sizes, dtype=np.int64), np.array(sources, dtype=np.uint16)
    for number, source in enumerate(plan.sources):
        if not length[numbers == number].any():
            raise DataError(
                f"The source {source.name!r} has no document with text in it.",
                where=", ".join(source.paths[:3]),
                fix="Name files with text, or remove the source.",
            )
    every, state = np.ones(len(length), dtype=np.int64), ((length > 0).astype(np.int64), length)
    flow, each = flows(plan.names, numbers, (every, length), state)
    result = StageResult("read", {}, flow, each, {EMPTY: empty}, {}, [])
    workplace.save_reading(numbers, state, result)
    return result, state, numbers


def _step(
    plan: Plan,
    workplace: Workplace,
    step: tuple[str, dict[str, Any], Stage],
    state: State,
    sources: NDArray[np.uint16],
    spool: Path | None,
) -> tuple[State, StageResult]:
    """Run one stage, or load it when it is done."""
    stem, options, stage = step
    done = workplace.load(stem)
    if done is not None:
        return done
    name = stem.partition("-")[2]
    stream = workplace.open_spool(stem) if stage.changes else None
    with Ledger(plan.names, *state, stream) as ledger:
        stage.run(Corpus(plan.sources, state[0], spool), ledger)
    after = (ledger.times, ledger.sizes)
    flow, each = flows(plan.names, sources, state, after)
    result = StageResult(name, options, flow, each, ledger.dropped, ledger.changed, ledger.notes)
    workplace.save(stem, ledger, result, older=spool if stage.changes else None)
    console.log.info("%s: %s documents in, %s out", name, f"{flow.documents_in:,}", f"{flow.documents_out:,}")
    return after, result


def _nothing_left(result: StageResult) -> None:
    if result.flow.documents_out:
        return
    reasons = ", ".join(
        f"{reason} {found.documents}" for reason, found in result.dropped.items() if found.documents
    )
    raise DataError(
        f"Nothing is left: the stage {result.name} dropped all {result.flow.documents_in} documents ({reasons}).",
        fix="Loosen its thresholds.",
    )


def _write(
    plan: Plan, workplace: Workplace, results: Sequence[StageResult], state: State, spool: Path | None
) -> CurationReport:
    """Write the shards and what else belongs to the result; returns the report."""
    shutil.rmtree(workplace.result, ignore_errors=True)
    if workplace.kept.exists():
        shutil.copytree(workplace.kept, workplace.result)
    workplace.result.mkdir(exist_ok=True)
    start = workplace.load(READ)
    assert start is not None
    times, sizes = state
    written = write_shards(
        Corpus(plan.sources, times, spool),
        plan.names,
        times,
        sizes,
        workplace.result,
        size=plan.config.output.shard_size,
        shuffle=plan.config.seed if plan.config.output.shuffle else None,
    )
    recipe = plan.config.given()
    write_atomically(workplace.result / "recipe.yaml", write_yaml(recipe).encode())
    return CurationReport(
        plan.mark,
        recipe,
        list(results),
        length_histogram(*start[0]),
        length_histogram(times, sizes),
        written.names,
        written.bytes,
    )
