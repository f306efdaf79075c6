"""The same samples as a folder of lm-eval tasks, so that the official harness scores what we score.

Each task and length becomes ``<name>.jsonl`` and ``<name>.yaml``, and the suite a group with the unweighted mean. The prompts
are written out with the tokenizer's chat format and the answer's beginning, so that the harness, run without
``--apply_chat_template``, reads the very tokens that we read. The scores are this package's, called through the folder's
``utils.py``::

    lm_eval --model hf --model_args pretrained=MODEL --include_path FOLDER --tasks angelslim_ruler
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...base.files import write_atomically
from . import longbench, scorers, small_language
from .base import Sample, written
from .suite import Suite, samples_of

UTILS = '''"""Scores of the tasks in this folder; angelslim must be installed."""

from angelslim.evaluate.suites.harness_tasks import process_results
'''
FUNCTION = "process_results: !function utils.process_results\n"


def export(suite: Suite, tokenizer: Any, folder: Path) -> list[str]:
    """Write the tasks of a suite into `folder` and return their names."""
    prepared = [(length, samples_of(suite, tokenizer, length)) for length in suite.lengths]
    folder.mkdir(parents=True, exist_ok=True)  # a length that is too short has been refused by now
    names = []
    for length, tasks in prepared:
        for task, found in tasks:
            name = f"angelslim_{suite.name}_{task.name}_{length}"
            metric = "small" if task.score is small_language.exact else task.name
            data = (folder / f"{name}.jsonl").resolve()
            texts = [written(tokenizer, sample, task.chat) for sample in found]
            write_atomically(data, _lines(texts, found, metric).encode())
            text = yaml.safe_dump(_task(name, data, task.new_tokens), sort_keys=False, allow_unicode=True)
            write_atomically(folder / f"{name}.yaml", (text + FUNCTION).encode())
            names.append(name)
    group = {
        "group": f"angelslim_{suite.name}",
        "task": names,
        "aggregate_metric_list": [{"metric": "score", "aggregation": "mean", "weight_by_size": False}],
        "metadata": {"version": 1.0},
    }
    write_atomically(folder / f"angelslim_{suite.name}.yaml", yaml.safe_dump(group, sort_keys=False).encode())
    write_atomically(folder / "utils.py", UTILS.encode())
    return names


def _lines(texts: Sequence[str], found: Sequence[Sample], metric: str) -> str:
    rows = (
        {
            "index": index,
            "input": text,
            "outputs": list(sample.answers),
            "classes": list(sample.classes),
            "metric": metric,
        }
        for index, (text, sample) in enumerate(zip(texts, found, strict=True))
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _task(name: str, data: Path, new_tokens: int) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(data.parent / ".cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "generation_kwargs": {"until": [], "max_gen_toks": new_tokens, "do_sample": False},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one reply of the harness."""
    sample = Sample(doc["input"], tuple(doc["outputs"]), classes=tuple(doc["classes"]))
    return {"score": _score(doc["metric"], results[0], sample)}


def _score(metric: str, reply: str, sample: Sample) -> float:
    if metric in longbench.TASKS:
        return longbench.score(metric, reply, sample)
    if metric == "small":
        return small_language.exact(reply, sample)
    return (scorers.string_match_part if metric.startswith("facts_") else scorers.string_match_all)(
        reply, sample
    )
