"""Packed rows: what they hold, which words have labels under several chat templates, and that the index is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from angelslim.base.errors import DataError
from angelslim.data import builtin
from angelslim.data.packing import Rows, Stream, conversation, encode, pack, read_stream
from angelslim.models.builtin import builtin_model
from tiny import TEMPLATE, byte_tokenizer

OPENED = TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
FORGETS = (  # as reasoning models do: thoughts of earlier turns are left out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "yes or no?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "yes?"},
    {"role": "assistant", "content": "no"},
]


def tokenizer(template: str | None) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


def learnt_text(made: Any, chat: Any) -> list[str]:
    """The pieces that have labels."""
    ids, learnt = conversation(made, chat)
    pieces: list[list[int]] = []
    before = False
    for token, now in zip(ids, learnt, strict=True):
        if now:
            if not before:
                pieces.append([])
            pieces[-1].append(token)
        before = now
    return [made.decode(piece) for piece in pieces]


@pytest.mark.parametrize("template", [OPENED, FORGETS, MARKED])
def test_the_assistants_words_and_their_ends_have_labels(template: str) -> None:
    assert learnt_text(tokenizer(template), CHAT) == ["yes<|im_end|>", "no<|im_end|>"]


def test_without_the_opening_in_the_template_the_role_stays_unlearnt_too() -> None:
    pieces = learnt_text(tokenizer(TEMPLATE), CHAT)
    assert [piece.split("\n")[-1] for piece in pieces] == ["yes<|im_end|>", "no<|im_end|>"]


def test_thoughts_that_the_template_forgets_have_no_label() -> None:
    chat = [{**m, "content": f"<think>\nhm\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
            for m in CHAT]  # fmt: skip
    assert learnt_text(tokenizer(FORGETS), chat) == ["yes<|im_end|>", "hm\n</think>\n\nno<|im_end|>"]


@pytest.mark.parametrize("task", ["addition", "recall"])
def test_thinking_and_direct_replies_of_the_builtin_model(task: str) -> None:
    made = AutoTokenizer.from_pretrained(builtin_model("tiny-lm"))
    for example in builtin.examples(task, "calibration", 20, thinking=True):
        turn = [*example.messages, {"role": "assistant", "content": example.completion}]
        reply = example.completion.rpartition("</think>\n\n")[2]
        assert example.completion.startswith("<think>\n") and reply
        assert learnt_text(made, turn * 2) == [f"{reply}<|im_end|>", f"{example.completion}<|im_end|>"]
    for example in builtin.examples(task, "calibration", 20, thinking=False):
        turn = [*example.messages, {"role": "assistant", "content": example.completion}]
        reply = example.completion.rpartition("</think>\n\n")[2]
        assert learnt_text(made, turn * 2) == [f"{reply}<|im_end|>"] * 2


def test_plain_conversations_end_with_a_learnt_end() -> None:
    made = tokenizer(None)
    ids, learnt = encode(made, CHAT[:2])
    assert made.decode([token for token, now in zip(ids, learnt, strict=True) if now]) == " yes<|im_end|>"


def test_a_template_that_rewrites_the_words_is_refused() -> None:
    shouting = tokenizer("{% for m in messages %}{{ m.content | upper }}\n{% endfor %}")
    with pytest.raises(DataError, match="turn 1: 'yes' is not in its text"):
        conversation(shouting, CHAT[:2])


def test_documents_follow_each_other_with_an_end_between() -> None:
    made = tokenizer(OPENED)
    stream = pack(made, ["one", "", "two!", CHAT[:2]])
    text = "<|im_start|>user\nyes or no?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_end|>"
    assert made.decode(stream.tokens) == f"one<|im_end|>two!<|im_end|>{text}"
    assert stream.learnt[:9].all() and made.decode(stream.tokens[9:][stream.learnt[9:]]) == "yes<|im_end|>"
    assert (stream.documents, stream.empty) == (3, 1)


def test_nothing_to_learn_is_an_error() -> None:
    made = tokenizer(OPENED)
    with pytest.raises(DataError, match=r"here\.txt: No usable record: all are empty"):
        pack(made, ["", ""], "here.txt")
    with pytest.raises(DataError, match="none holds words of an assistant"):
        pack(made, [CHAT[:1]])
    with pytest.raises(DataError, match="fewer than one row of 9"):
        Rows(pack(made, ["one"]), rows=1, length=9)
    made.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        pack(made, ["one"])


def numbers(count: int = 97) -> Stream:
    return Stream(torch.arange(count, dtype=torch.int32), torch.arange(count) % 5 != 0)


def test_every_pass_reads_every_row_once_in_another_order() -> None:
    rows = Rows(numbers(), rows=2, length=8, seed=3)  # 12 rows: 6 batches a pass
    passes = [[int(row[0]) for i in range(6) for row in rows(6 * turn + i)["input_ids"]] for turn in range(3)]
    assert all(sorted(starts) == list(range(0, 96, 8)) for starts in passes)
    assert passes[0] != passes[1] != passes[2]
    batch = rows(4)
    assert torch.equal(batch["labels"] == -100, batch["input_ids"] % 5 == 0)
    assert torch.equal(batch["input_ids"][:, 1:] - batch["input_ids"][:, :-1], torch.ones(2, 7).long())


def test_a_batch_depends_on_its_number_and_the_seed_alone() -> None:
    one, two = Rows(numbers(), 3, 8, seed=1), Rows(numbers(), 3, 8, seed=1)
    later = [two(index)["input_ids"] for index in (7, 2)]
    assert torch.equal(one(2)["input_ids"], later[1]) and torch.equal(one(7)["input_ids"], later[0])
    assert not torch.equal(Rows(numbers(), 3, 8, seed=2)(2)["input_ids"], later[1])


def test_the_fingerprint_knows_all_that_decides_the_batches() -> None:
    rows = Rows(numbers(), 3, 8, seed=1)
    others = [Rows(numbers(), 3, 8, seed=2), Rows(numbers(), 3, 8, 1, 0.5), Rows(numbers(98), 3, 8, seed=1)]
    assert Rows(numbers(), 3, 8, seed=1).fingerprint == rows.fingerprint
    assert rows.fingerprint not in {other.fingerprint for other in others}


def test_smaller_shares_are_parts_of_larger_ones() -> None:
    def read(share: float) -> set[int]:
        rows = Rows(numbers(800), 1, 8, seed=5, share=share)
        return {int(rows(index)["input_ids"][0, 0]) for index in range(rows.count)}

    small, middle, large = (read(share) for share in (0.3, 0.5, 0.7))
    assert [len(part) for part in (small, middle, large)] == [30, 50, 70]
    assert small < middle < large
    assert max(small) > 600, "drawn from the whole stream"


def test_a_saved_stream_is_the_same(tmp_path: Path) -> None:
    stream = pack(tokenizer(OPENED), ["one", CHAT])
    stream.save(tmp_path / "stream.safetensors")
    again = read_stream(tmp_path / "stream.safetensors")
    assert torch.equal(again.tokens, stream.tokens) and torch.equal(again.learnt, stream.learnt)
    assert (again.documents, again.empty) == (2, 0)
    (tmp_path / "bad").write_bytes(b"text")
    with pytest.raises(DataError, match="no stream"):
        read_stream(tmp_path / "bad")
