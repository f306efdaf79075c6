"""Tiny random models and an in-process command line, for tests of every package."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

WIDTH, INNER = 128, 256  # multiples of 128, so that the default groups and blocks fit
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_tokenizer() -> Any:
    """One token a byte, three special ones, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen3(blocks: int = 2, seed: int = 0, **changes: Any) -> Any:
    """A random Qwen3 of `WIDTH` channels."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 272,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes})).eval()


def save_qwen3(
    folder: Path, blocks: int = 2, dtype: torch.dtype = torch.bfloat16, shard: str = "1GB", **changes: Any
) -> Path:
    """Save a random Qwen3 with its tokenizer."""
    qwen3(blocks, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def copy_model(folder: Path, target: Path) -> Path:
    """Copy a model folder, to damage the copy."""
    shutil.copytree(folder, target)
    return target


def edit_json(file: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> Outcome:
    """Run ``angelslim words...`` in this process, through the same `main` as the installed command."""
    from angelslim import cli
    from angelslim.base import console

    out, err = io.StringIO(), io.StringIO()
    # Not `file`: reading that gives the captured stream of this test, which would be put back and then be closed.
    monkeypatch.setattr(console.out, "_file", out)
    monkeypatch.setattr(console.err, "_file", err)
    monkeypatch.setattr("sys.argv", ["angelslim", *map(str, words)])
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    echoed = capsys.readouterr()
    return Outcome(code, out.getvalue() + echoed.out, err.getvalue() + echoed.err)


CALIBRATED = (
    "fp8_static",
    "evaluation.enabled=false",
    "dataset.num_samples=6",
    "dataset.max_seq_length=32",
)


def job_for(model: Path, recipe: Any, *overrides: str) -> Any:
    """A prepared job without evaluation."""
    from angelslim.config.recipe import load
    from angelslim.job import prepare

    return prepare(load(recipe, ["evaluation.enabled=false", *overrides]), model)


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of everything that engines load."""
    import hashlib

    files = [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), folder / "config.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def greedy(model: torch.nn.Module, prompt: list[int], end: int, most: int) -> list[int]:
    """Continue a prompt greedily by at most `most` tokens, the end token included, as engines report it."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    tokens = found[0, len(prompt) :].tolist()
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package may catch it."""


def dies_at(original: Any, when: int, after: bool) -> Any:
    """Wrap a function so that its call number `when` (0-based) ends the process, before or after its work."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) - 1 != when:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise Killed

    return call
