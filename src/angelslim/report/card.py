"""The model card: ``README.md`` of an output folder, in the form that model hubs read.

A YAML head for machines (base model, library, tags, licence if known), then what was done, the figures before
and after, the limits, how to load the model in the engines that read its format, and the command that makes it
again. All figures come from the record; what was not measured is said to be not evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..models.checkpoint import write_atomically
from . import words
from .layers import worst
from .record import RunRecord
from .rows import quality_metrics, rows
from .summary import markdown_cell, to_markdown

FOLDER = "path/to/this/folder"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
MOST_SKIPPED = 20


@dataclass(frozen=True)
class Usage:
    """How one engine loads the folder."""

    engine: str
    language: str
    code: str


TRANSFORMERS = Usage(
    "transformers",
    "python",
    f"""from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{FOLDER}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
messages = [{{"role": "user", "content": "What is 123 + 456?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))""",
)
VLLM = Usage("vLLM", "bash", f"vllm serve {FOLDER}")
SGLANG = Usage("SGLang", "bash", f"python -m sglang.launch_server --model-path {FOLDER}")
LLAMA_CPP = Usage("llama.cpp", "bash", f"llama-server -m {FOLDER}/model.gguf")
SERVERS = (TRANSFORMERS, VLLM, SGLANG)
# First word of the record's format -> what loads it, and what transformers needs besides.
ENGINES: dict[str, tuple[tuple[Usage, ...], str]] = {
    "compressed-tensors": (SERVERS, "pip install compressed-tensors"),
    "fp8": (SERVERS, ""),
    "gptq": (SERVERS, "pip install gptqmodel"),
    "awq": (SERVERS, "pip install gptqmodel"),
    "gguf": ((LLAMA_CPP,), ""),
}


def write_card(record: RunRecord, path: Path, *, license: str | None = None) -> Path:
    """Write the card to `path` (a file, or the folder that gets a ``README.md``)."""
    path = path / "README.md" if path.is_dir() else path
    write_atomically(path, render_card(record, license=license).encode())
    return path


def render_card(record: RunRecord, *, license: str | None = None) -> str:
    """Return the text of the card; `license` is the base model's, if known."""
    parts = [
        f"---\n{yaml.safe_dump(front_matter(record, license), sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(record.model)}, {_plain(record.method)}",
        _done(record),
        "## Before and after",
        to_markdown([record]).rstrip(),
        _figures_note(record),
        "## Limits",
        _limits(record),
        "## Use",
        *_usage(record),
        "## Make it again",
        fence(record.command or "The command was not recorded.", "bash"),
        _setting(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(record: RunRecord, license: str | None) -> dict[str, object]:
    """Return the head of the card; a base model known only by a local path is left out, hubs refuse it."""
    family = _family(record)
    head: dict[str, object] = {}
    if HUB_NAME.fullmatch(record.model):
        head |= {"base_model": record.model, "base_model_relation": "quantized"}
    if license:
        head["license"] = license
    head["library_name"] = "gguf" if family == "gguf" else "transformers"
    head["pipeline_tag"] = "text-generation"
    tags = ["angelslim", *(["quantized"] if record.layers else []), record.method, family, record.model_type]
    head["tags"] = list(dict.fromkeys(tag for tag in tags if tag))
    return head


def fence(text: str, language: str = "") -> str:
    """Put text in a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def _done(record: RunRecord) -> str:
    original, result = rows([record])
    left = f"; not quantized: {len(record.skipped)}" if record.skipped else ""
    count = f"{len(record.layers)} linear layers were quantized to {record.bits_per_weight:.2f} bits a weight"
    what = f"{count}, scales included{left}" if record.layers else "No layer was quantized"
    return (
        f"{_plain(record.model)} ({_plain(record.model_type)}, {words.parameters(record.parameters)} parameters) "
        f"compressed with `{_code(record.method)}`: {_plain(record.scheme)}. {what}. The weights take "
        f"{words.megabytes(result.stored)} instead of {words.megabytes(original.stored)} "
        f"({words.factor(result.ratio)}), saved as {_plain(record.format)}."
    )


def _figures_note(record: RunRecord) -> str:
    table = rows([record])
    measured = quality_metrics(table)
    if not measured:
        return f"Quality: {words.NOT_EVALUATED}."
    counts = [
        f"{_plain(metric)} on {score.samples:,} {_samples(metric)}"
        for metric, score in measured.items()
        if score.samples
    ]
    text = f"Measured: {', '.join(counts)}. " if counts else ""
    return (
        f"{text}After ± stands one standard error."
        if any(words.spread(s) is not None for s in measured.values())
        else text.strip()
    )


def _samples(metric: str) -> str:
    return "tokens" if metric == "perplexity" else "examples"


def _limits(record: RunRecord) -> str:
    lines = []
    if not record.after:
        lines.append(
            f"The quality of this model was {words.NOT_EVALUATED}: measure it on your own task before use."
        )
    else:
        lines.append("The figures hold for the texts and tasks named above; measure your own before use.")
    for layer in worst(record.layers, 1):
        lines.append(
            f"The layer that lost most is `{_code(layer.name)}`: SQNR {words.decibels(layer.sqnr_db)} dB, "
            f"relative error {words.percent(layer.relative_error)}."
        )
    names = [f"`{_code(name)}` ({_plain(reason)})" for name, reason in sorted(record.skipped.items())]
    if names and record.layers:
        more = f" and {len(names) - MOST_SKIPPED} more" if len(names) > MOST_SKIPPED else ""
        lines.append(f"Not quantized: {', '.join(names[:MOST_SKIPPED])}{more}.")
    lines += [_plain(warning) for warning in record.warnings]
    lines.append("Whatever the base model's licence and limits say goes for this model too.")
    return "\n".join(f"- {line}" for line in lines)


def _usage(record: RunRecord) -> list[str]:
    engines, needs = ENGINES.get(_family(record), ((TRANSFORMERS,), ""))
    parts = []
    for usage in engines:
        parts.append(f"### {usage.engine}")
        if usage is TRANSFORMERS and needs:
            parts.append(fence(needs, "bash"))
        parts.append(fence(usage.code, usage.language))
    return parts


def _setting(record: RunRecord) -> str:
    versions = ", ".join(f"{_plain(name)} {_plain(value)}" for name, value in sorted(record.versions.items()))
    return f"Seed {record.seed}" + (f"; {versions}." if versions else ".")


def _family(record: RunRecord) -> str:
    """Return the first word of the format, in lower case: ``compressed-tensors``, ``gguf``."""
    found = re.match(r"[a-z0-9-]+", record.format.lower())
    return found.group() if found else ""


def _plain(text: str) -> str:
    """Make any text safe inside a markdown paragraph: no markup, no line breaks."""
    return markdown_cell(text)


def _code(text: str) -> str:
    """Make any text safe between backticks, where markup is not read anyway."""
    return " ".join(text.replace("`", "'").split())


__all__: Sequence[str] = ("front_matter", "render_card", "write_card")
