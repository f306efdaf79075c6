"""LongBench's files become prompts, replies become scores, and what is missing is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from angelslim.base.errors import ConfigError, DataError
from angelslim.evaluate.suites import longbench
from angelslim.evaluate.suites.base import Sample, tokens_of


def write(folder: Path, task: str, **changes: Any) -> None:
    row = {"input": "Who?", "context": "A {input} text.", "answers": ["I", "me"], "all_classes": None}
    (folder / f"{task}.jsonl").write_text(
        json.dumps(row | changes) + "\n\n" + json.dumps(row | changes) + "\n"
    )


def test_all_tasks_have_a_prompt_and_a_family() -> None:
    assert len(longbench.TASKS) == 21 and set(longbench.published()) == set(longbench.TASKS)
    assert all("{context}" in one["prompt"] for one in longbench.published().values())
    assert longbench.family_of("lcc") == "code"


def test_a_line_becomes_a_prompt(tmp_path: Path) -> None:
    write(tmp_path, "hotpotqa")
    write(tmp_path, "gov_report")
    samples = longbench.read(tmp_path, "hotpotqa")
    assert len(samples) == 2 and samples[0].answers == ("I", "me")
    assert "passages.\nA {input} text.\n" in samples[0].prompt  # what a text holds is left alone
    assert samples[0].prompt.endswith("Question: Who?\nAnswer:")
    assert "Who?" not in longbench.read(tmp_path, "gov_report", 1)[0].prompt
    assert longbench.present(tmp_path) == ["hotpotqa", "gov_report"]


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No file"):
        longbench.present(tmp_path)
    with pytest.raises(ConfigError, match="hotpotqa"):
        longbench.present(tmp_path, ["hotpotq"])
    with pytest.raises(DataError, match=r"lcc\.jsonl"):
        longbench.present(tmp_path, ["lcc"])
    (tmp_path / "lcc.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(DataError, match="Line 1"):
        longbench.read(tmp_path, "lcc")


@pytest.mark.parametrize(
    ("task", "content", "said"),
    [
        ("qasper", "", "no sample"),
        ("qasper", "\n \n", "no sample"),
        ("qasper", '["a"]', "Line 1"),
        ("qasper", '{"input": "a", "context": "b", "answers": "yes"}', "answers is no list"),
        ("passage_count", '{"input": "a", "context": "b", "answers": [3]}', "answers is no list"),
        ("trec", '{"input": "a", "context": "b", "answers": ["c"]}', "all_classes is empty"),
    ],
)
def test_a_file_of_another_form_is_refused(task: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / f"{task}.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        longbench.read(tmp_path, task)


def test_a_file_that_is_not_utf_8_is_said(tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        longbench.read(tmp_path, "qasper")


def test_signs_inside_a_text_end_no_line(tmp_path: Path) -> None:
    """Web pages hold signs that Python's splitlines takes for ends of lines, and the files hold them as they are."""
    row = {"input": "Who?", "context": "one\u2028two\x85three\x0c", "answers": ["I"], "all_classes": None}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    (sample,) = longbench.read(tmp_path, "qasper")
    assert "one\u2028two\x85three" in sample.prompt


@pytest.mark.parametrize(
    ("task", "reply", "answers", "value"),
    [
        ("hotpotqa", "The I", ("you", "i"), 1.0),
        ("triviaqa", "\nParis\nQuestion: next", ("Paris",), 1.0),
        ("samsum", "a b\nc d e f", ("a b",), 1.0),
        ("passage_count", "7", ("7",), 1.0),
        ("passage_retrieval_en", "Paragraph 7", ("Paragraph 7",), 1.0),
        ("passage_retrieval_zh", "段落7", ("段落7",), 1.0),
        ("lcc", "return x", ("return x",), 1.0),
        ("gov_report", "nothing", ("all else",), 0.0),
    ],
)
def test_the_best_answer_counts(task: str, reply: str, answers: tuple[str, ...], value: float) -> None:
    assert longbench.score(task, reply, Sample("", answers)) == pytest.approx(value)


def test_classes_come_with_the_sample() -> None:
    sample = Sample("", ("City",), classes=("City", "Group"))
    assert longbench.score("trec", "City\nGroup", sample) == 1


def test_a_long_prompt_loses_its_middle(tokenizer: Any) -> None:
    sample = Sample("begin " + "x" * 500 + " end", ("a",))
    cut = longbench.without_middle(tokenizer, sample, 100, chat=True)
    assert len(tokens_of(tokenizer, cut)) in (99, 100)
    assert cut.prompt.startswith("begin ") and cut.prompt.endswith(" end")
    assert longbench.without_middle(tokenizer, cut, 100, chat=True) == cut
    with pytest.raises(DataError, match="5 tokens"):
        longbench.without_middle(tokenizer, sample, 5, chat=True)
