import hashlib
import re
from pathlib import Path

import pytest

from angelslim.base.errors import ConfigError, DataError
from angelslim.data import builtin
from angelslim.data.builtin import TASKS, Example, examples, extract_answer, recall_keys, text

SPLITS = ("train", "calibration", "evaluation")


def operands(example: Example) -> frozenset[str]:
    # without order: a+b and b+a are the same question
    return frozenset(re.findall(r"\d{3}", example.messages[-1]["content"]))


def test_no_pair_of_operands_is_in_two_splits() -> None:
    seen = {split: {operands(e) for e in examples("addition", split, 3000)} for split in SPLITS}
    assert not seen["train"] & seen["evaluation"]
    assert not seen["train"] & seen["calibration"]
    assert not seen["calibration"] & seen["evaluation"]


def test_recall_keys_are_split_without_overlap() -> None:
    keys = [set(recall_keys(split)) for split in SPLITS]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 48 * 48
    assert all(len(one) > 50 for one in keys)
    for split, own in zip(SPLITS, keys, strict=True):
        for example in examples("recall", split, 50):
            listed = re.findall(r"^- (.*)=\d{4}$", example.messages[-1]["content"], re.MULTILINE)
            assert len(set(listed)) == builtin.PAIRS and set(listed) <= own


@pytest.mark.parametrize("thinking", [True, False])
def test_additions_are_right_and_so_is_each_step(thinking: bool) -> None:
    for example in examples("addition", "train", 300, seed=1, thinking=thinking):
        a, b = (int(number) for number in re.findall(r"\d{3}", example.messages[-1]["content"]))
        assert example.answer == str(a + b) == extract_answer(example.completion)
        steps = re.findall(r"([\d+]+)=(\d+), write (\d), carry (\d)", example.completion)
        assert len(steps) == (3 if thinking else 0)
        for terms, total, digit, carry in steps:
            assert sum(map(int, terms.split("+"))) == int(total) == 10 * int(carry) + int(digit)


def test_recall_answers_stand_in_the_list() -> None:
    for example in examples("recall", "calibration", 100):
        question = example.messages[-1]["content"]
        pairs = dict(re.findall(r"^- (.*)=(\d{4})$", question, re.MULTILINE))
        asked = [key for key in pairs if key in question.splitlines()[-1]]
        assert [pairs[key] for key in asked] == [example.answer] == [extract_answer(example.completion)]


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_a_function_of_their_arguments(task: str) -> None:
    assert examples(task, "train", 20, seed=3) == examples(task, "train", 20, seed=3)
    assert examples(task, "train", 5, seed=3) == examples(task, "train", 20, seed=3)[:5]
    assert examples(task, "train", 20, seed=3) != examples(task, "train", 20, seed=4)
    modes = {example.thinking for example in examples(task, "train", 50)}
    assert modes == {True, False}


def test_examples_stay_the_same_over_releases_of_python() -> None:
    """A published accuracy must mean the same questions tomorrow."""
    drawn = "\n".join(
        e.messages[0]["content"] + e.completion for task in TASKS for e in examples(task, "evaluation", 40)
    )
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "6dc3e2cd251d6b7c"


def test_documents_are_split_by_name_and_repeatable() -> None:
    train, held_out = text("train", 400_000), text("evaluation", 10**9)
    assert train == text("train", 400_000)
    assert 390_000 <= sum(map(len, train)) <= 400_000
    assert sum(map(len, held_out)) > 50_000
    assert not set(train) & set(held_out)


def test_a_python_without_sources_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("pydoc_data.topics.topics", {})
    with pytest.raises(DataError, match="standard library"):
        text("train")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>\n1+1=2\n</think>\n\n 42 ", "42"),
        ("42<|im_end|>\n", "42"),
        ("42", "42"),
        ("<think>\nthis never", ""),
        ("</think></think>7", "</think>7"),
    ],
)
def test_extract_answer(completion: str, answer: str) -> None:
    assert extract_answer(completion) == answer


def test_unknown_task_and_split_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'addition'"):
        examples("additon", "train", 1)
    with pytest.raises(ConfigError, match="evaluation"):
        examples("recall", "eval", 1)  # type: ignore[arg-type]
