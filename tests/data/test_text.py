import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from angelslim.base import console
from angelslim.base.errors import ConfigError, DataError
from angelslim.data import chat
from angelslim.data.text import calibration_batches
from angelslim.models.builtin import builtin_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(builtin_model("tiny-lm"))


def as_lists(batches: list[torch.Tensor]) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


def test_the_builtin_mixture(tokenizer: Any) -> None:
    batches = calibration_batches(tokenizer, None, samples=10, max_length=96, seed=1)
    assert len(batches) == 10
    assert all(b.dtype == torch.int64 and b.shape[0] == 1 and 2 <= b.shape[1] <= 96 for b in batches)
    assert len({b.shape[1] for b in batches}) > 2, "lengths vary: nothing is padded"
    texts = [tokenizer.decode(batch[0]) for batch in batches]
    assert sum(one.startswith("<|im_start|>user\n-") for one in texts) == 3
    assert sum("<|im_start|>" not in one for one in texts) == 3
    again = calibration_batches(tokenizer, "builtin", samples=10, max_length=96, seed=1)
    assert as_lists(again) == as_lists(batches)
    other = calibration_batches(tokenizer, None, samples=10, max_length=96, seed=2)
    assert as_lists(other) != as_lists(batches)


def test_a_long_text_becomes_windows_that_cover_it(tokenizer: Any, tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer(text, verbose=False)["input_ids"]
    batches = as_lists(calibration_batches(tokenizer, tmp_path / "a.txt", samples=1000, max_length=50))
    joined = [token for batch in batches for token in batch]
    assert joined == ids[: len(joined)] and len(ids) - len(joined) < 50 // 4
    assert all(len(one) == 50 for one in batches[:-1])


def test_each_window_is_opened_as_the_tokenizer_opens_a_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="b"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    (tmp_path / "a.txt").write_text("a b a b a b")
    batches = calibration_batches(
        PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"),
        tmp_path / "a.txt",
        samples=9,
        max_length=4,
    )
    assert as_lists(batches) == [[0, 1, 2, 1], [0, 2, 1, 2]]


def test_conversations_go_through_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    (batch,) = calibration_batches(tokenizer, tmp_path / "a.jsonl", samples=1, max_length=64)
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHo<|im_end|>\n"
    assert tokenizer.decode(batch[0]) == written


def test_from_many_records_a_seeded_sample_in_order(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(200)))

    def rows(seed: int) -> list[int]:
        batches = calibration_batches(tokenizer, tmp_path / "a.jsonl", samples=20, max_length=16, seed=seed)
        return [int(tokenizer.decode(batch[0]).split()[1]) for batch in batches]

    assert rows(0) == sorted(rows(0)) == rows(0)
    assert len(set(rows(0))) == 20 and max(rows(0)) > 50 and rows(0) != rows(1)


def test_too_few_records_are_said(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console.log, "warning", lambda text, *values: said.append(text % values))
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n')
    assert len(calibration_batches(tokenizer, tmp_path / "a.jsonl", samples=3, max_length=16)) == 1
    assert "holds 1 samples; 3 were asked for" in said[0]


def test_nothing_usable_and_bad_sizes(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="all are empty"):
        calibration_batches(tokenizer, tmp_path / "a.jsonl", samples=3, max_length=16)
    with pytest.raises(ConfigError, match="samples is 0"):
        calibration_batches(tokenizer, None, samples=0, max_length=16)
    with pytest.raises(ConfigError, match="max_seq_length is 1"):
        calibration_batches(tokenizer, None, samples=1, max_length=1)


def test_without_a_template_turns_are_joined_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console.log, "warning", lambda text, *values: said.append(text))
    monkeypatch.setattr(chat, "_warned", set())
    base = AutoTokenizer.from_pretrained(builtin_model("tiny-lm"))
    base.chat_template = None
    line = json.dumps(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    )
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n")
    batches = calibration_batches(base, tmp_path / "a.jsonl", samples=2, max_length=64)
    assert [base.decode(batch[0]) for batch in batches] == ["user: Hi\nassistant: Ho"] * 2
    assert len(said) == 1 and "no chat template" in said[0]


def test_a_template_that_refuses_a_record_is_named() -> None:
    strict = AutoTokenizer.from_pretrained(builtin_model("tiny-lm"))
    strict.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(DataError, match="turns system: no system turns"):
        chat.render(strict, [{"role": "system", "content": "x"}])
