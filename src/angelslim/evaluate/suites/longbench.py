"""LongBench's 21 tasks (Bai et al., arXiv 2308.14508) from local files in the benchmark's own form.

A folder holds ``<task>.jsonl``, each line with ``input``, ``context``, ``answers``, ``all_classes``; files of the
benchmark's even-length edition (``<task>_e.jsonl``) are read if the others are missing. Prompts and answer lengths are
those published with it (MIT licence, ``longbench.json``). A prompt that is too long loses its middle, for
instructions stand at both ends; the tasks that continue a text (few-shot and code) are asked without a chat format.
"""

from __future__ import annotations

import json
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

from ...base.errors import ConfigError, DataError, did_you_mean
from . import scorers
from .base import Sample, tokens_of

FAMILIES = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
TASKS = tuple(task for family in FAMILIES.values() for task in family)
PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # without a chat format
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # of the reply is all that counts
CLASSES = ("trec", "lsht")  # named by the reply, one of a sample's list
CHINESE = {  # scored by words, which Chinese does not part
    "multifieldqa_zh": scorers.qa_f1_zh,
    "dureader": scorers.rouge_l_zh,
    "vcsum": scorers.rouge_l_zh,
}
METRICS = {
    **CHINESE,
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), scorers.rouge_l),
    **dict.fromkeys(FAMILIES["synthetic"], scorers.number_share),
    **dict.fromkeys(FAMILIES["code"], scorers.code_similarity),
}  # the others are F1 over words, or classes


def family_of(task: str) -> str:
    """Return the family of a task."""
    return next(name for name, members in FAMILIES.items() if task in members)


@cache
def published() -> dict[str, dict[str, Any]]:
    """Return the prompt and the answer's tokens of each task."""
    found: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("longbench.json").read_text("utf-8")
    )
    return found


def present(folder: Path, wanted: list[str] | None = None) -> list[str]:
    """Return the tasks whose files lie in `folder`, or those wanted, all of which must be there."""
    for name in wanted or []:
        if name not in TASKS:
            raise ConfigError(f"LongBench has no task {name!r}.", fix=did_you_mean(name, TASKS))
        if _file(folder, name) is None:
            raise DataError(f"There is no {name}.jsonl.", where=str(folder), fix="Put the task's file there.")
    found = wanted or [name for name in TASKS if _file(folder, name)]
    if not found:
        raise DataError(
            "No file of a LongBench task is here.",
            where=str(folder),
            fix=f"Put {TASKS[0]}.jsonl and the like there.",
        )
    return found


def files(folder: Path, wanted: list[str] | None = None) -> list[Path]:
    """Return the files of the tasks that are present."""
    return [path for name in present(folder, wanted) if (path := _file(folder, name))]


def _file(folder: Path, task: str) -> Path | None:
    names = (f"{task}.jsonl", f"{task}_e.jsonl")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read(folder: Path, task: str, count: int | None = None) -> list[Sample]:
    """Return the first `count` samples of a task, or all; there is at least one."""
    path, found = _file(folder, task), list[Sample]()
    assert path is not None
    try:
        lines = path.read_text("utf-8").split("\n")  # texts may hold other signs that end a line
    except UnicodeDecodeError as error:
        raise DataError(
            f"The file is not UTF-8 ({error}).", where=str(path), fix="Put the benchmark's own file there."
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or (count is not None and len(found) == count):
            continue
        try:
            found.append(_sample(task, json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Line {number} is no sample of LongBench: {error!r}.",
                where=str(path),
                fix="Each line has input, context, answers and all_classes.",
            ) from error
    if not found:
        raise DataError(
            "The file holds no sample.", where=str(path), fix="Put the benchmark's own file there."
        )
    return found


def _sample(task: str, row: Any) -> Sample:
    """Return a line of a file as a sample."""
    parts = re.split(r"\{(context|input)\}", published()[task]["prompt"])
    filled = "".join(row[part] if index % 2 else part for index, part in enumerate(parts))
    answers, classes = row["answers"], row.get("all_classes") or []
    for name, words in (("answers", answers), ("all_classes", classes)):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"{name} is no list of texts")
    if task in CLASSES and not classes:
        raise ValueError("all_classes is empty")
    return Sample(filled, tuple(answers), classes=tuple(classes))


def score(task: str, reply: str, sample: Sample) -> float:
    """Return the best score of the reply over the answers, from 0 to 1."""
    if task in FIRST_LINE:
        reply = reply.lstrip("\n").split("\n")[0]
    metric = METRICS.get(task, scorers.qa_f1)
    if task in CLASSES:
        metric = partial(scorers.classification, classes=sample.classes)
    return max((metric(reply, _target(task, answer)) for answer in sample.answers), default=0.0)


def _target(task: str, answer: str) -> str:
    """Return what counts of an answer: of ``Paragraph 7``, the number behind the word."""
    word = {"passage_retrieval_en": "Paragraph ", "passage_retrieval_zh": "段落"}.get(task)
    return answer.partition(word)[2] if word and word in answer else answer


def without_middle(tokenizer: Any, sample: Sample, most: int, chat: bool) -> Sample:
    """Cut the middle out of a prompt that has more than `most` tokens in its final form."""
    over = len(tokens_of(tokenizer, sample, chat)) - most
    if over <= 0:
        return sample
    ids = tokenizer(sample.prompt, add_special_tokens=False, verbose=False).input_ids
    half = (len(ids) - over) // 2
    if half < 1:
        raise DataError(f"No prompt fits into {most} tokens.", fix="Ask for a longer length.")
    ends = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:])]
    return Sample("".join(ends), sample.answers, sample.prefix, sample.classes)
