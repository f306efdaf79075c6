"""The tokenizer of the tiny models: byte-level BPE that writes every digit as its own token.

Digits alone make arithmetic a matter of places instead of a table of number words ("Goat", arXiv
2305.14201). Bytes below mean that any text can be written. The chat template is ChatML with two modes:
``enable_thinking`` (true unless said otherwise) leaves the model to open ``<think>`` itself; false writes an
empty thought before its answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCABULARY = 4096
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, UNTHINK = "<think>", "</think>"

# How text is cut before merging; the pattern of the Qwen family, which every engine that runs Qwen3 knows.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Every assistant turn opens with a thought; only the last one keeps what it thought, earlier ones an empty one.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' -%}
{%- if message['reasoning_content'] is defined and message['reasoning_content'] -%}
{%- set content = '<think>\\n' + message['reasoning_content'].strip('\\n') + '\\n</think>\\n\\n' + content -%}
{%- endif -%}
{%- if not loop.last or '</think>' not in content -%}
{%- set content = '<think>\\n\\n</think>\\n\\n' + content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY, longest: int = 2048) -> Any:
    """Learn the merges from `texts` and return a transformers tokenizer; `longest` is the model's context."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, TURN_START, TURN_END]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,  # the two thinking tags are added below, as ordinary tokens
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in (THINK, UNTHINK)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token=END,
        additional_special_tokens=[TURN_START],
        model_max_length=longest,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer.json`` and a ``tokenizer_config.json`` that every release of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END,
        "additional_special_tokens": [TURN_START],
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
