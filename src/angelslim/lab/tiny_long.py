"""Train `tiny-long`, a small model that looks things up in texts of 4096 tokens: what sparse attention is measured on.

Whether a sparse pattern loses what a model needs shows only where a model needs far tokens. `tiny-long` is the
smallest that does: 4 layers, 4 query heads on 2 key-value heads of width 64, four million parameters, a vocabulary of whole
words. Its rows are generated on the device (`long.rows`), its stages grow from 256 tokens to 4096 (`long.stages`), and a
GPU makes it in minutes. The size `small` is for a machine without one: a million parameters, rows of 1024 tokens, heads of
width 32, blocks of 16 tokens.

    angelslim lab train tiny-long --device cuda --out tiny-long

Work lies in ``<out>.partial``: vocabulary, corpus, a checkpoint of the running stage, the weights after each finished
stage. The same command goes on there after a kill.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base import console
from ..base.errors import ConfigError, did_you_mean
from ..data import builtin
from ..data.statements import END, PAD
from ..train import Batch, TrainSettings, stepwise
from .long.score import FAMILIES, TEXT, rows_of, score
from .long.stages import KINDS, LAST, LONGER, RETRIEVAL, WARM, Batches, Stage, answer_loss
from .long.tokens import Tokens, encode, save_tokenizer
from .tiny_lm import _device, _finished, _versions

ALL_TEXT = 10**9  # characters; more than any standard library has
EVALUATION_SEED = 40_000
LOOK_EVERY, SMOOTH = 50, 0.95  # steps between two looks at the accuracy; how slowly it follows


@dataclass(frozen=True)
class Size:
    """A size of the model: its tokens, its widths, the stages of its training, the lengths it is scored at."""

    tokens: Tokens
    hidden: int
    intermediate: int
    head: int
    context: int
    block: int  # tokens, what sparse patterns are cut into when it is measured
    stages: tuple[Stage, ...]
    lengths: tuple[int, ...]
    examples: int  # rows of each family and length, when it is measured


BASE = Size(
    Tokens(4096, 1024, 1024),
    hidden=256,
    intermediate=768,
    head=64,
    context=8192,
    block=64,
    stages=(
        Stage(256, 256, 4_000, 1.5e-3, WARM, enough=0.95, least=600),
        Stage(1024, 128, 1_500, 1.5e-3, LONGER, enough=0.97, least=400),
        Stage(4096, 64, 1_500, 1.5e-3, LAST),
    ),
    lengths=(512, 1024, 2048, 4096),
    examples=200,
)
SMALL = Size(
    Tokens(2048, 512, 512),
    hidden=128,
    intermediate=384,
    head=32,
    context=2048,
    block=16,
    stages=(
        Stage(128, 24, 6_000, 2e-3, WARM, enough=0.93, least=600),
        Stage(512, 8, 1_500, 2e-3, LONGER, enough=0.95, least=200),
        Stage(1024, 6, 1_500, 2e-3, LAST),
    ),
    lengths=(256, 512, 1024),
    examples=50,
)
SIZES = {"base": BASE, "small": SMALL}


def build_model(size: Size, seed: int) -> Any:
    """Return the untrained model in float32; the slow rotary frequencies leave half of a head to contents alone."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=size.tokens.size,
        hidden_size=size.hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size.head,
        intermediate_size=size.intermediate,
        max_position_embeddings=size.context,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def train_tiny_long(
    out: Path, *, seed: int = 0, minutes: float | None = None, device: str = "auto", size: str = "base"
) -> dict[str, Any]:
    """Train the model into the folder `out` and return what ``training.json`` holds.

    `minutes` shares out a time among the stages by a short measurement of the machine's speed; None takes all steps.
    """
    if size not in SIZES:
        raise ConfigError(f"tiny-long has no size {size!r}.", fix=did_you_mean(size, SIZES))
    if (finished := _finished(out, seed)) is not None:
        return finished
    device, sized = _device(device), SIZES[size]
    work = out.with_name(out.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    corpus = _corpus(work, sized).to(device)
    stages = _stages(work / "plan.json", sized, seed, minutes, corpus, device)
    model = build_model(sized, seed)
    facts = [
        _run_stage(model, stage, number, work, Batches(stage, number, seed, sized.tokens, corpus, device))
        for number, stage in enumerate(stages)
    ]
    _save_model(model, work / "model")
    record = {
        "model": "tiny-long",
        "command": f"angelslim lab train tiny-long --size {size} --seed {seed}",
        "size": size,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": sum(stage["steps"] * stage["rows"] * stage["length"] for stage in facts),
        "minutes": round(sum(stage["seconds"] for stage in facts) / 60, 2),
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} CPU cores",
        "block": sized.block,
        "language": asdict(sized.tokens),
        "stages": facts,
        "results": measure_tiny_long(work / "model", sized, device=device),
        "versions": _versions(),
    }
    (work / "model" / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    (work / "model" / "README.md").write_text(card(record), "utf-8")
    (work / "model").rename(out)
    shutil.rmtree(work)
    return record


def _corpus(work: Path, size: Size) -> Tensor:
    """Make the tokenizer from the training text and encode that text, or read both again; int32 [N]."""
    from transformers import AutoTokenizer

    path = work / "corpus.safetensors"
    if not path.is_file():
        documents = builtin.text("train", ALL_TEXT)
        save_tokenizer(size.tokens.words(documents), work / "model", size.context)
        encoded = encode(AutoTokenizer.from_pretrained(work / "model"), documents)
        temporary = path.with_name(path.name + ".partial")
        save_file({"tokens": encoded}, temporary)
        temporary.replace(path)
    tokens: Tensor = load_file(path)["tokens"]
    return tokens


def _stages(
    path: Path, size: Size, seed: int, minutes: float | None, corpus: Tensor, device: str
) -> list[Stage]:
    """Return the stages of this run; they are kept in `path`, so that a restart continues the same run."""
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept["seed"] != seed:
            raise ConfigError(
                f"A run with seed {kept['seed']} was begun here.",
                where=str(path.parent),
                fix="Remove it first.",
            )
        return [Stage(**{**stage, "shares": tuple(stage["shares"])}) for stage in kept["stages"]]
    stages = list(size.stages)
    if minutes is not None:
        needed = sum(stage.steps * _seconds_a_step(size, stage, seed, corpus, device) for stage in stages)
        factor = 60 * minutes / needed
        stages = [
            replace(stage, steps=max(int(stage.steps * factor), 1), least=int(stage.least * factor))
            for stage in stages
        ]
        console.chose(
            f"{sum(s.steps for s in stages)} steps", f"{minutes:g} minutes, {factor:.2f} of the plan"
        )
    path.write_text(json.dumps({"seed": seed, "stages": [asdict(stage) for stage in stages]}), "utf-8")
    return stages


def _seconds_a_step(size: Size, stage: Stage, seed: int, corpus: Tensor, device: str) -> float:
    import tempfile

    probe = replace(stage, steps=6, enough=None)
    with tempfile.TemporaryDirectory() as folder:
        facts = _run_stage(
            build_model(size, seed),
            probe,
            0,
            Path(folder),
            Batches(probe, 0, seed, size.tokens, corpus, device),
            skip=3,
        )
    return float(facts["seconds"]) / 3


def _run_stage(
    model: Any, stage: Stage, number: int, work: Path, batches: Batches, skip: int = 0
) -> dict[str, Any]:
    """Train through one stage, or load what it left; return its length, steps, seconds and last accuracies."""
    weights, facts_file = work / f"stage-{number}.safetensors", work / f"stage-{number}.json"
    if facts_file.is_file():
        model.load_state_dict(load_file(weights), strict=False)  # the tied head is no tensor of its own
        return dict(json.loads(facts_file.read_text("utf-8")))
    cuda, last = batches.device == "cuda", stage.enough is None
    settings = TrainSettings(
        steps=stage.steps,
        lr=stage.lr,
        warmup=min(100, stage.steps // 10),
        schedule="wsd" if last else "constant",
        decay=0.5,
        lowest=0.02,
        weight_decay=0.05,
        seed=batches.seed + number,
        bf16=cuda,
        checkpoint_every=500 if cuda else 100,
    )
    watch, begun, step = _Watch(stage, compiled=cuda), time.perf_counter(), 0
    running = stepwise(
        model,
        batches,
        watch,
        settings,
        work / f"stage-{number}",
        device=batches.device,
        title=f"{stage.length} tokens",
    )
    with closing(running):
        for step in running:
            if step == skip:
                begun = time.perf_counter()
            if watch.enough(step):
                break
    facts = {
        **{"length": stage.length, "rows": stage.rows, "steps": step, "lr": stage.lr},
        "seconds": time.perf_counter() - begun,
        "accuracy": watch.values,
        "curve": watch.curve,
    }
    state = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(state, weights)
    facts_file.write_text(json.dumps(facts), "utf-8")
    return facts


class _Watch:
    """The loss of a stage, which remembers how many answers are right and says when that is enough."""

    def __init__(self, stage: Stage, compiled: bool) -> None:
        self.stage = stage
        self.loss = torch.compile(answer_loss, dynamic=False) if compiled else answer_loss
        self.smooth: Tensor | None = None
        self.values: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.loss(model, batch)
        now = torch.stack([found["loss"].detach(), *(found[kind] for kind in KINDS)])
        self.smooth = now if self.smooth is None else SMOOTH * self.smooth + (1 - SMOOTH) * now
        return found

    def enough(self, step: int) -> bool:
        """Look at the accuracies every few steps, and at the end; tell whether the stage may stop."""
        if self.smooth is None or (step % LOOK_EVERY and step != self.stage.steps):
            return False
        self.values = {
            name: round(value, 4) for name, value in zip(("loss", *KINDS), self.smooth.tolist(), strict=True)
        }
        self.curve.append({"step": step, **self.values})
        said = ", ".join(f"{name} {value:.3f}" for name, value in self.values.items())
        console.log.info("%d tokens, step %d: %s", self.stage.length, step, said)
        worst = min(self.values[kind] for kind in RETRIEVAL)
        return self.stage.enough is not None and step >= self.stage.least and worst >= self.stage.enough


def _save_model(model: Any, folder: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id = end, pad, None
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)


def measure_tiny_long(folder: Path, size: Size, *, device: str) -> list[dict[str, Any]]:
    """Score a trained folder on every family at every length of its size, with rows and text it was not trained on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = encode(tokenizer, builtin.text("evaluation", ALL_TEXT)).to(device)
    found = []
    for length in size.lengths:
        line = []
        for number, family in enumerate((*FAMILIES, TEXT)):
            seed = EVALUATION_SEED + 100 * length + number
            rows = rows_of(family, size.tokens, corpus, length, size.examples, seed)
            result = score(model, family, *rows)
            found.append(
                {
                    "family": family,
                    "length": length,
                    "value": round(result.value, 3),
                    "stderr": round(result.stderr, 3),
                    "rows": len(result.each),
                }
            )
            line.append(f"{family} {result.value:.1f}")
        console.log.info("%d tokens: %s", length, ", ".join(line))
    return found


def card(record: dict[str, Any]) -> str:
    """Return the model card as Markdown with the hub's front matter."""
    lengths = sorted({result["length"] for result in record["results"]})
    values = {(result["family"], result["length"]): result for result in record["results"]}
    titles = {name: family.title for name, family in FAMILIES.items()} | {TEXT: "perplexity a word"}
    table = "\n".join(
        f"| {family} | {title} | "
        + " | ".join(
            f"{values[family, length]['value']:.1f} ± {values[family, length]['stderr']:.1f}"
            for length in lengths
        )
        + " |"
        for family, title in titles.items()
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny-long

A language model of {record["parameters"]:,} parameters (Qwen3 architecture, bfloat16) that looks up facts in long texts,
for measuring what sparse attention loses. It knows a small language of statements (`angelslim.data.statements`)
and a little of Python's text, nothing else.

Right answers in percent ± standard error by length in tokens, dense attention, {record["results"][0]["rows"]} rows
each, none of them from the training:

| family | what | {" | ".join(map(str, lengths))} |
|---|---|{"---|" * len(lengths)}
{table}

- Command: `{record["command"]}`
- {record["tokens"] / 1e6:,.0f} M tokens, {record["minutes"]:.1f} minutes on {record["device"]}
- Stages, accuracies and versions: `training.json`
"""
