"""Turn a conversation into the text a model was trained to read, with the tokenizer's own chat template.

A conversation is a list of ``{"role": ..., "content": ...}``. A tokenizer without a template belongs to a base
model; calibrating one on conversations is common and useful, so the turns are then joined as plain
``role: content`` lines with one warning, instead of being refused.
"""

from __future__ import annotations

from typing import Any

from ..base import console
from ..base.errors import DataError

Messages = list[dict[str, str]]


def render(
    tokenizer: Any, messages: Messages, *, generate: bool = False, thinking: bool | None = None
) -> str:
    """Return the conversation as one string.

    `generate` adds the opening of the assistant's turn. `thinking` goes to templates that know the switch
    ``enable_thinking`` (others ignore it); None leaves the template's default. A template that refuses the
    conversation, for instance its roles, is a `DataError`.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return _plain(messages, generate)
    switches = {} if thinking is None else {"enable_thinking": thinking}
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, **switches
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"The tokenizer's chat template refuses a conversation with the turns {roles}: {error}",
            fix="Correct the record, or give the data as {'text': ...} records.",
        ) from error
    return str(text)


def has_specials(tokenizer: Any) -> bool:
    """Say whether `render` already writes the special tokens that the tokenizer would add by itself."""
    return bool(getattr(tokenizer, "chat_template", None))


_warned: set[int] = set()


def _plain(messages: Messages, generate: bool) -> str:
    if not _warned:
        _warned.add(1)
        console.log.warning("The tokenizer has no chat template: conversations are joined as plain text.")
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join([*lines, "assistant:"] if generate else lines)
