"""Train `tiny-lm`, the small language model that comes with the package, from nothing but Python itself.

Stages, each kept in ``<out>.partial`` so that the same command continues after a kill: the tokenizer, the
encoded corpus, the training (``angelslim.train``), the measuring. At the end the finished model folder is
renamed to `out`.

The figures of the architecture are multiples of 128 on purpose: every group size in use divides them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..base import console
from ..base.errors import ConfigError
from ..data import builtin
from ..train import StepRecord, TrainSettings, train
from .card import card, results_table, write_card
from .curriculum import Curriculum, Shares, shares_at, text_share, weighted_loss
from .rows import conversation, encode_corpus
from .score import exact_match, perplexity
from .tokenizer import END, TURN_END, VOCABULARY, save_tokenizer, train_tokenizer

CONTEXT = 2048
ALL_TEXT = 10**9  # characters; more than any standard library has
EVALUATION_SEED = 20_000
CPU_MINUTES = 50.0  # of training, unless told otherwise; enough for the tasks is not promised (the card was made on a GPU)


@dataclass(frozen=True)
class Plan:
    """The size of a run; kept beside its checkpoints, so that a restart continues the same run."""

    seed: int
    steps: int
    rows: int
    length: int
    lr: float
    bf16: bool
    compile: bool


@dataclass(frozen=True)
class Student:
    """What tells one model of the lab from another; the stages of the training are the same for all."""

    name: str
    vocabulary: int
    shares: Shares  # of the kinds of rows, over the run
    build: Callable[[int], Any]  # seed -> the untrained model
    plan: Callable[[str, int], Plan]  # device, seed -> the size of the run
    card: Callable[[dict[str, Any]], str]
    examples: int = 500  # of each task and mode, when it is measured
    probe: int = 24  # steps that are timed when the length of a run is given in minutes


def tiny_lm() -> Student:
    """Return what the model that comes with the package is made of."""
    return Student("tiny-lm", VOCABULARY, shares_at, build_model, default_plan, card)


def default_plan(device: str, seed: int) -> Plan:
    """Return the run for a kind of device; on a CPU the number of steps follows from `CPU_MINUTES`."""
    if device == "cuda":
        return Plan(seed, steps=4_000, rows=128, length=512, lr=2e-3, bf16=True, compile=True)
    return Plan(seed, steps=6_000, rows=16, length=256, lr=1.5e-3, bf16=False, compile=False)


def build_model(seed: int) -> Any:
    """Return the untrained model in float32: 5.8 million parameters with tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def train_tiny_lm(
    out: Path, *, seed: int = 0, minutes: float | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Train the model into the folder `out` and return what ``training.json`` holds.

    `minutes` sets the length of the training by a short measurement of the machine's speed; None takes the full
    length on a GPU and `CPU_MINUTES` on a CPU. `device` is ``auto``, ``cpu`` or ``cuda``. An `out` that exists
    and is no finished run of the same seed is a `ConfigError`.
    """
    return train_student(tiny_lm(), out, seed=seed, minutes=minutes, device=device)


def train_student(
    student: Student, out: Path, *, seed: int = 0, minutes: float | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Train a model of the lab; the arguments are those of `train_tiny_lm`."""
    if (finished := _finished(out, seed)) is not None:
        return finished
    device = _device(device)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's processes are parallel already
    work = out.with_name(out.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "model"
    documents = builtin.text("train", ALL_TEXT)
    tokenizer = _tokenizer(folder, documents, student.vocabulary)
    corpus = _corpus(work / "corpus.safetensors", tokenizer, documents)
    curriculum = Curriculum(tokenizer.backend_tokenizer, corpus, 0, 0, 0, seed, shares=student.shares)
    plan = _plan(work / "plan.json", student, seed, minutes, device, curriculum)
    model = student.build(seed)
    records = _train(student, model, curriculum, plan, work, device)
    _save_model(model, tokenizer, folder)
    record = {
        "model": student.name,
        "command": f"angelslim lab train {student.name} --seed {seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        **_training_facts(student, plan, records, device, len(documents), len(corpus)),
    }
    record.update(measure_tiny_lm(folder, count=student.examples, device=device))
    write_card(folder, record, student.card(record))
    folder.rename(out)
    shutil.rmtree(work)
    console.err.print(results_table(record))
    return record


def _finished(out: Path, seed: int) -> dict[str, Any] | None:
    if not out.exists():
        return None
    record_file = out / "training.json"
    record = json.loads(record_file.read_text("utf-8")) if record_file.is_file() else {}
    if record.get("seed") != seed:
        raise ConfigError(
            "The output folder exists already.", where=str(out), fix="Name another or remove it."
        )
    console.log.info("%s is already trained.", out)
    return dict(record)


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"Unknown device {device!r}.", fix="Use auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("No CUDA device is usable here.", fix="Use --device cpu.")
    return device


def _tokenizer(folder: Path, documents: list[str], vocabulary: int) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        chats = [
            "".join(text for text, _ in conversation([(example.messages[0]["content"], example.completion)]))
            for task in builtin.TASKS
            for example in builtin.examples(task, "train", 3_000)
        ]
        plain = [chat.replace("<|im_start|>", "").replace("<|im_end|>", "") for chat in chats]
        texts = [*documents, *plain, "system\n" * 100]
        save_tokenizer(train_tokenizer(texts, vocabulary, longest=CONTEXT), folder)
    return AutoTokenizer.from_pretrained(folder)


def _corpus(path: Path, tokenizer: Any, documents: list[str]) -> torch.Tensor:
    if not path.is_file():
        temporary = path.with_name(path.name + ".partial")
        encoded = torch.from_numpy(encode_corpus(tokenizer.backend_tokenizer, documents))
        save_file({"tokens": encoded}, temporary)
        temporary.replace(path)
    tokens: torch.Tensor = load_file(path)["tokens"]
    return tokens


def _plan(
    path: Path, student: Student, seed: int, minutes: float | None, device: str, curriculum: Curriculum
) -> Plan:
    if path.is_file():
        plan = Plan(**json.loads(path.read_text("utf-8")))
        if plan.seed != seed:
            raise ConfigError(
                f"A run with seed {plan.seed} was begun here.", where=str(path.parent), fix="Remove it first."
            )
        return plan
    plan = student.plan(device, seed)
    minutes = CPU_MINUTES if minutes is None and device == "cpu" else minutes
    if minutes is not None:
        seconds = _seconds_a_step(plan, student, curriculum, device)
        plan = replace(plan, steps=max(int(minutes * 60 / seconds), 1))
        console.chose(f"{plan.steps} steps", f"{minutes:g} minutes at {seconds:.3f} s a step")
    path.write_text(json.dumps(asdict(plan)), "utf-8")
    return plan


def _seconds_a_step(plan: Plan, student: Student, curriculum: Curriculum, device: str) -> float:
    """Time a few steps of a throw-away copy of the run, the first ones (which compile) left out."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        probe = replace(plan, steps=student.probe)
        records = _train(student, student.build(plan.seed), curriculum, probe, Path(folder), device)
    seconds = sorted(record.seconds for record in records[student.probe // 3 :])
    return sum(seconds) / len(seconds)


def _train(
    student: Student, model: Any, curriculum: Curriculum, plan: Plan, work: Path, device: str
) -> list[StepRecord]:
    batch_at = replace(curriculum, batches=plan.steps, rows=plan.rows, length=plan.length)
    settings = TrainSettings(
        steps=plan.steps,
        lr=plan.lr,
        warmup=min(200, plan.steps // 10),
        schedule="wsd",
        decay=0.3,
        lowest=0.02,
        weight_decay=0.1,
        seed=plan.seed,
        bf16=plan.bf16,
        compile=plan.compile,
        checkpoint_every=1000 if device == "cuda" else 50,
        workers=max((os.cpu_count() or 1) - 2, 0) if device == "cuda" else 0,
    )
    return train(
        model, batch_at, weighted_loss, settings, work / "training", device=device, title=student.name
    )


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    end, pad = tokenizer.convert_tokens_to_ids([TURN_END, END])
    model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id = end, pad, None
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)


def _training_facts(
    student: Student, plan: Plan, records: list[StepRecord], device: str, documents: int, corpus: int
) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU cores"
    every = max(len(records) // 200, 1)
    last = records[-100:]
    tokens = plan.steps * plan.rows * plan.length
    return {
        **asdict(plan),
        "data": f"{documents} files of the standard library of Python {platform.python_version()} "
        f"({corpus / 1e6:.1f} M tokens), generated additions and recall lists, repeated random tokens",
        "tokens": tokens,
        "text_passes": round(tokens * text_share(student.shares) / corpus, 1),
        "minutes": round(sum(record.seconds for record in records) / 60, 2),
        "device": name,
        "final_loss": round(sum(record.loss for record in last) / len(last), 4),
        "loss_curve": [
            {"step": record.step, "loss": round(record.loss, 4)}
            | {name: round(value, 4) for name, value in record.metrics.items()}
            for record in records[::every]
        ],
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    import accelerate
    import tokenizers
    import transformers

    modules = (torch, transformers, tokenizers, accelerate)
    return {module.__name__: str(module.__version__) for module in modules}


def measure_tiny_lm(folder: Path, *, count: int = 500, device: str = "cpu") -> dict[str, Any]:
    """Measure a trained folder on the evaluation split: `count` examples of each task and mode, and the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    results: dict[str, dict[str, float]] = {}
    for task in builtin.TASKS:
        for mode, thinking in (("thinking", True), ("direct", False)):
            examples = builtin.examples(task, "evaluation", count, EVALUATION_SEED, thinking)
            share = exact_match(model, tokenizer, examples, batch=125)
            results[f"{task}_{mode}"] = {"value": round(100 * share, 2), "samples": count}
            console.log.info("%s, %s: %.1f %% of %d", task, mode, 100 * share, count)
    value, tokens = perplexity(model, tokenizer, builtin.text("evaluation", ALL_TEXT))
    results["text_perplexity"] = {"value": round(value, 3), "samples": tokens}
    versions = _versions()
    measured = {
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    return {"results": results, "measured": measured}
