"""Tasks of the LM Evaluation Harness (Gao et al., 2021), run through its library on a model in memory.

The harness is the field's common yardstick, so its own code builds the prompts, picks the answers and averages
the metrics; this module only wraps the loaded model and keeps everything local. By default nothing is fetched:
the hub clients are switched to offline for the length of the call, and a task has to name local data files.
`write_builtin_task` writes such a task from the package's own generator: a YAML file and a JSON lines file.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..base.errors import DataError, MissingExtra, did_you_mean
from ..data import builtin
from ..data.offline import hub_offline
from ..models.checkpoint import write_atomically
from .base import Score
from .inference import device_of, stop_tokens

BUILTIN_TASK = "angelslim_addition"
NOT_METRICS = ("alias", "sample_len", "sample_count", "name")


def run_harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat: bool = True,
    thinking: bool = False,
    seed: int = 0,
    offline: bool = True,
) -> list[Score]:
    """Score `tasks` with ``lm_eval.simple_evaluate``; `include_path` is a folder of local task files.

    `chat` formats prompts with the tokenizer's chat template, `thinking` lets the model think first (its
    thoughts are cut off before the harness looks for the answer).
    """
    for package in ("lm_eval", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package.replace("_", "-"), "eval", "The evaluation harness")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with hub_offline(offline), _quiet():
        folder = str(include_path) if include_path else None
        # The harness's own tasks need the hub: without it, only the local folder is worth indexing.
        manager = TaskManager(include_path=folder, include_defaults=not (offline and folder))
        _check_names(tasks, manager.all_tasks)
        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=str(device_of(model)),
            enable_thinking=thinking,
            think_end_token="</think>" if thinking else None,
        )
        output = simple_evaluate(
            wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat and bool(tokenizer.chat_template),
            gen_kwargs={"eos_token_id": stop_tokens(model, tokenizer)},
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert output is not None  # only on a rank other than 0
    return to_scores(output)


def to_scores(output: Mapping[str, Any]) -> list[Score]:
    """Turn the harness's result table into scores named ``task/metric``, or ``task/metric/filter``."""
    scores = []
    for task, row in output["results"].items():
        samples = output.get("n-samples", {}).get(task, {}).get("effective", 0)
        better = output.get("higher_is_better", {}).get(task, {})
        for key, value in row.items():
            metric, _, filter_name = key.partition(",")
            if metric in NOT_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" + (f"/{filter_name}" if filter_name not in ("", "none") else "")
            stderr = row.get(f"{metric}_stderr,{filter_name}")
            higher = better.get(metric, True)
            scores.append(
                Score(
                    name,
                    float(value),
                    better="higher" if higher else "lower",
                    samples=samples,
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                )
            )
    return scores


def write_builtin_task(folder: Path, samples: int = 200, seed: int = 0, thinking: bool = False) -> str:
    """Write the addition task as a local harness task into `folder` and return its name.

    The data file's path is written in full, because the harness resolves paths against the working folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / "addition.jsonl").resolve()
    items = builtin.examples("addition", "evaluation", samples, seed=seed, thinking=thinking)
    lines = [{"question": item.messages[-1]["content"], "answer": item.answer} for item in items]
    write_atomically(data, "".join(json.dumps(line) + "\n" for line in lines).encode())
    task = {
        "task": BUILTIN_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder.resolve() / ".cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 192, "do_sample": False},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(?s)^(?:.*</think>)?\s*(\S.*?)\s*$"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    write_atomically(folder / "addition.yaml", yaml.safe_dump(task, sort_keys=False).encode())
    return BUILTIN_TASK


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    if not tasks:
        raise DataError("No harness task was named.", fix=f"Known: {', '.join(known[:20])}.")
    for task in tasks:
        if task not in known:
            raise DataError(f"The harness knows no task {task!r}.", fix=did_you_mean(task, known))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's own log below warnings, and the data library's progress bars."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
