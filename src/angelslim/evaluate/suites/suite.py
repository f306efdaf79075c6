"""The suites by name: what to measure, checked first, then measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...base import console
from ...base.errors import ConfigError, did_you_mean
from ..perplexity import read_text
from ..suite import evaluation_text
from . import longbench, ruler, scorers
from .base import Sample, Task, samples
from .kept import Kept
from .means import averages, families
from .run import Attend, Reader, run_task
from .word_lists import source

SUITES = ("ruler", "longbench")


@dataclass(frozen=True)
class Suite:
    """Which suite, at which lengths, on what: `data` is LongBench's folder, `text` the file that RULER's needles hide in."""

    name: str
    lengths: tuple[int, ...]
    tasks: list[str] = field(default_factory=list)  # all if empty
    count: int = 20  # samples of a task and length
    data: Path | None = None
    text: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.name not in SUITES:
            raise ConfigError(f"There is no suite {self.name!r}.", fix=did_you_mean(self.name, SUITES))
        if not self.lengths:
            raise ConfigError("A suite needs lengths.", fix="Give --lengths, for example 4k,8k.")
        if self.name == "longbench" and self.data is None:
            raise ConfigError("LongBench reads local files.", fix="Name their folder with --data.")
        if self.data is not None and self.name == "longbench":
            if set(longbench.CHINESE) & set(longbench.present(self.data, self.tasks)):
                scorers.check_chinese()
        elif self.name == "ruler":
            ruler.known(self.tasks)

    def facts(self) -> dict[str, Any]:
        """Return what its prompts depend on, as plain values, but for the contents of `files`."""
        words = source() if self.name == "ruler" else ""
        return {**asdict(self), "data": str(self.data), "text": str(self.text), "words": words}

    def files(self) -> list[Path]:
        """Return the files that its prompts come from."""
        if self.name == "ruler":
            return [] if self.text is None else [self.text]
        assert self.data is not None
        return longbench.files(self.data, self.tasks)


def lengths(words: str) -> tuple[int, ...]:
    """Read lengths in tokens: ``4k,8k`` is 4096 and 8192; one that is named twice is measured once."""
    found = []
    for word in filter(None, (part.strip().lower() for part in words.split(","))):
        match = re.fullmatch(r"(\d+)(k?)", word)
        if match is None or int(match[1]) == 0:
            raise ConfigError(f"{word!r} is no length in tokens.", fix="Write 4096 or 4k.")
        found.append(int(match[1]) * (1024 if match[2] else 1))
    return tuple(dict.fromkeys(found))


def samples_of(suite: Suite, tokenizer: Any, length: int) -> list[tuple[Task, list[Sample]]]:
    """Return the tasks of one length with their samples."""
    if suite.name == "ruler":
        text = evaluation_text() if suite.text is None else read_text(suite.text)
        return [
            (task, samples(task, tokenizer, length, suite.count, suite.seed))
            for task in ruler.tasks(tokenizer, length, text, suite.tasks)
        ]
    assert suite.data is not None
    found = []
    for name in longbench.present(suite.data, suite.tasks):
        task = longbench_task(name)
        kept = [
            longbench.without_middle(tokenizer, sample, length - task.new_tokens, task.chat)
            for sample in longbench.read(suite.data, name, suite.count)
        ]
        found.append((task, kept))
    return found


def longbench_task(name: str) -> Task:
    """Return a task of LongBench; its samples come from a file, so it builds none."""

    def build(_rng: Any, _size: int) -> Sample:
        raise AssertionError("LongBench's samples are read, not built")

    def score(reply: str, sample: Sample) -> float:
        return longbench.score(name, reply, sample)

    return Task(
        name, build, longbench.published()[name]["new_tokens"], score, chat=name not in longbench.PLAIN
    )


def run_suite(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    attentions: Sequence[str],
    attend: Attend,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Measure and return plain values: a row for each task, length and attention, and the averages.

    `kept` holds the prompts that an earlier run of the same command answered, and takes the new ones.
    """
    reader = Reader(model, tokenizer, attend)
    _say_what_is_too_long(model, suite)
    prepared = [(length, samples_of(suite, tokenizer, length)) for length in suite.lengths]
    total = sum(len(found) for _, tasks in prepared for _, found in tasks)
    if kept:
        kept.say(total)
    rows = []
    with console.bar("prompts", total) as progress:
        for length, tasks in prepared:
            for task, found in tasks:
                made = run_task(reader, task, found, length, attentions, kept, progress)
                family = longbench.family_of(task.name) if suite.name == "longbench" else ""
                rows += [{**row, "family": family} for row in made]
    return {
        "suite": suite.name,
        "lengths": list(suite.lengths),
        "attentions": list(attentions),
        "seed": suite.seed,
        "samples": suite.count,
        "words": source() if suite.name == "ruler" else "",
        "rows": rows,
        "averages": averages(rows),
        "families": families(rows),
    }


def _say_what_is_too_long(model: Any, suite: Suite) -> None:
    """Prompts behind a model's last position are asked, for some models stretch theirs, but not silently."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and max(suite.lengths) > positions:
        console.log.warning(
            "The model has positions for %d tokens; scores at %d tokens say little of it.",
            *(positions, max(suite.lengths)),
        )
