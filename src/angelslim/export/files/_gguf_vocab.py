"""The tokenizer inside a GGUF file: tokens, merges, special tokens, chat template.

llama.cpp has byte-level BPE built in, and a fixed list of ways to split text before merging, each under a name. The
split of a tokenizer.json is looked up in that list; another one would tokenize differently, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...base.errors import ModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS + _REST: "qwen2", _WORDS + "{1,3}" + _REST: "llama-bpe"}  # they differ in runs of digits
GPT2 = "gpt-2"  # the split that ByteLevel does by itself
_NORMAL, _CONTROL, _USER = 1, 3, 4  # types of tokens
NO_MERGE = "\u2400 \u2400"  # no byte looks like this; llama.cpp refuses a file without any merge


def add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Write the tokenizer of a model folder, with unused tokens up to the `size` of the embedding."""
    import gguf

    file = folder / "tokenizer.json"
    if not file.exists():
        raise ModelError(f"{folder} has no tokenizer.json.", fix="Copy the model's tokenizer files into it.")
    content = json.loads(file.read_text("utf-8"))
    model = content["model"]
    split = _split(content, bool(model.get("merges")))
    if model["type"] != "BPE" or split is None:
        raise ModelError(
            f"{file}: llama.cpp has no tokenizer that splits text in this way.",
            fix="Serve the folder with vLLM or SGLang.",
        )
    named = {
        **model["vocab"],
        **{added["content"]: added["id"] for added in content.get("added_tokens") or ()},
    }
    if max(named.values()) >= size:
        raise ModelError(
            f"{file} has more tokens than the model's vocab_size {size}.",
            fix="Use the model's own tokenizer.",
        )
    tokens: list[str] = [f"[unused {index}]" for index in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for added in content.get("added_tokens") or ():
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=bool(model.get("merges")), n_vocab=size)
    special.merges = special.merges or [NO_MERGE]
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _split(content: dict[str, Any], merges: bool) -> str | None:
    """Return llama.cpp's name for how text is split before merging, or None when it has no such way."""
    splitter = content.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    if content.get("normalizer") not in (None, {"type": "NFC"}) or not steps:
        return None
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if not merges or (len(steps) == 1 and steps[0].get("use_regex", True)):
        return GPT2  # without merges every byte is a token, however text is split
    if len(steps) != 2 or steps[-1].get("use_regex", True) or steps[0].get("type") != "Split":
        return None
    return SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))


def save_tokenizer(fields: Mapping[str, Any], folder: Path, file: Path) -> None:
    """Write the tokenizer of a file's fields into a model folder; one that splits in an unknown way is refused."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {key.removeprefix("tokenizer."): value for key, value in fields.items()}
    split = known.get("ggml.pre", "")
    patterns = {name: pattern for pattern, name in SPLITS.items()}
    if known.get("ggml.model") != "gpt2" or split not in (GPT2, *patterns):
        raise ModelError(
            f"{file}: its tokenizer is not read ({split!r}).", fix="Serve the file with llama.cpp."
        )
    tokens = known["ggml.tokens"]
    kinds = dict(enumerate(known.get("ggml.token_type", [_NORMAL] * len(tokens))))
    named = {
        ours: tokens[known[f"ggml.{theirs}_token_id"]]
        for theirs, ours in {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}.items()
        if known.get(f"ggml.{theirs}_token_id", len(tokens)) < len(tokens)
    }
    vocabulary = {
        token: index for index, token in enumerate(tokens) if kinds[index] in (_NORMAL, _CONTROL, _USER)
    }
    added = [
        AddedToken(token, special=kinds[index] == _CONTROL, normalized=False)
        for token, index in vocabulary.items()
        if kinds[index] != _NORMAL
    ]
    merges = [tuple(merge.split(" ")) for merge in known.get("ggml.merges", ()) if merge != NO_MERGE]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == GPT2)]
    if split in patterns:
        steps.insert(0, pre_tokenizers.Split(Regex(patterns[split]), "isolated"))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    core.add_tokens(added)
    if known.get("ggml.add_bos_token") and "bos_token" in named:
        _begin(core, named["bos_token"], vocabulary[named["bos_token"]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.chat_template = known.get("chat_template")
    tokenizer.save_pretrained(folder)


def _begin(core: Any, token: str, index: int) -> None:
    """Put the token of the beginning before every text."""
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, index)]
    )
