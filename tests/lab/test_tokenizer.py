from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from angelslim.data.builtin import TASKS, examples
from angelslim.lab.tokenizer import THINK, UNTHINK, save_tokenizer, train_tokenizer
from angelslim.models.builtin import builtin_model

TEXTS = ["What is 347 + 685?\n", "def main():\n    return None\n", "héllo wörld " * 3] * 50


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, vocabulary=290, longest=128), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def shipped() -> Any:
    return AutoTokenizer.from_pretrained(builtin_model("tiny-lm"))


@pytest.mark.parametrize("which", ["small", "shipped"])
@pytest.mark.parametrize(
    "text",
    ["plain words", "a\r\n\tb \x00 \u00a0", "日本語 ② ٣ 🙂", "x=1234;y=[0.5]\n\n\n", "<think>\n</think>", ""],
)
def test_any_text_comes_back(which: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token_of_its_own(shipped: Any) -> None:
    tokens = shipped.tokenize("347+685=1032, 12.5")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("3476851032125")


def test_sizes_and_special_tokens(small: Any, shipped: Any) -> None:
    assert len(small) == 290 and len(shipped) == 4096
    assert shipped.eos_token == "<|im_end|>" and shipped.pad_token == "<|endoftext|>"
    for tag in (THINK, UNTHINK, "<|im_start|>"):
        assert len(shipped(tag)["input_ids"]) == 1
    kept = shipped.decode(
        shipped(f"<|im_start|>{THINK}1{UNTHINK}<|im_end|>")["input_ids"], skip_special_tokens=True
    )
    assert kept == "<think>1</think>", "thoughts are text, turns are not"


HEAD = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("messages", "switches", "expected"),
    [
        ([("user", "Hi")], {"add_generation_prompt": True}, HEAD),
        ([("user", "Hi")], {"add_generation_prompt": True, "enable_thinking": True}, HEAD),
        ([("user", "Hi")], {"add_generation_prompt": True, "enable_thinking": False}, HEAD + EMPTY),
        ([("user", "Hi"), ("assistant", "Ho")], {}, f"{HEAD}{EMPTY}Ho<|im_end|>\n"),
        (
            [("user", "Hi"), ("assistant", "<think>\na\n</think>\n\nHo")],
            {},
            f"{HEAD}<think>\na\n</think>\n\nHo<|im_end|>\n",
        ),
        (
            [("user", "Hi"), ("assistant", "<think>\na\n</think>\n\nHo"), ("user", "So")],
            {},
            f"{HEAD}{EMPTY}Ho<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n",
        ),
        ([("system", "S")], {}, "<|im_start|>system\nS<|im_end|>\n"),
    ],
)
def test_chat_template(shipped: Any, messages: Any, switches: Any, expected: str) -> None:
    turns = [{"role": role, "content": content} for role, content in messages]
    assert shipped.apply_chat_template(turns, tokenize=False, **switches) == expected


def test_reasoning_given_apart_is_written_as_a_thought(shipped: Any) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho", "reasoning_content": "a"},
    ]
    assert (
        shipped.apply_chat_template(turns, tokenize=False) == f"{HEAD}<think>\na\n</think>\n\nHo<|im_end|>\n"
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_begins_the_whole_conversation(shipped: Any, task: str) -> None:
    """What is generated after the prompt is what was trained after it, also in tokens."""
    for example in examples(task, "train", 20):
        whole = [*example.messages, {"role": "assistant", "content": example.completion}]
        full = shipped.apply_chat_template(whole, return_dict=True)["input_ids"]
        prompt = shipped.apply_chat_template(
            example.messages, add_generation_prompt=True, enable_thinking=example.thinking, return_dict=True
        )["input_ids"]
        assert full[: len(prompt)] == prompt


def test_saved_files_are_readable_by_name(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, vocabulary=300), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
