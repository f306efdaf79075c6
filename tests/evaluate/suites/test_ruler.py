"""The prompts of RULER hold what they ask for: slow readers find the published numbers of needles, links and words."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from angelslim.base.errors import ConfigError
from angelslim.data.statements import END, MARKERS
from angelslim.data.words import NOUNS
from angelslim.evaluate.suites import word_lists
from angelslim.evaluate.suites.base import Sample, samples
from angelslim.evaluate.suites.ruler import TASKS, english, sentences, tasks
from angelslim.lab.long.tokens import Tokens, save_tokenizer

TEXT = "One day it rained. " * 3 + "The dog barked at the moon. Nobody came home before nine. " * 20
TEXT += " ".join("".join(random.Random(i).choices("abcdefghij", k=6)) for i in range(400)) + "."
EVERY = english(4096, TEXT)


def build(name: str, size: int, seed: int = 0) -> Sample:
    sample = EVERY[name].build(random.Random(seed), size)
    assert sample is not None
    return sample


def test_there_are_thirteen() -> None:
    assert tuple(EVERY) == TASKS and len(TASKS) == 13


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
def test_needles(name: str) -> None:
    sample = build(name, 60)
    hidden = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", sample.prompt)
    asked = re.search(
        r"magic \w+ for ([^?]*) mentioned in the provided text\?", sample.prompt.rpartition("\nWhat")[2]
    )
    assert asked is not None
    keys = re.split(r", and |, ", asked[1])
    assert {value for _, key, value in hidden if key in keys} == set(sample.answers)
    counts = {"multikey_1": (4, 1, 4), "multivalue": (4, 1, 1), "multiquery": (4, 4, 4)}
    needles, queries, names = next(
        (value for mark, value in counts.items() if name.endswith(mark)),
        (61, 1, None) if name in ("niah_multikey_2", "niah_multikey_3") else (1, 1, 1),
    )
    assert len(hidden) == needles and len(keys) == queries
    assert names is None or len({key for _, key, _ in hidden}) == names
    many = len(sample.answers) > 1
    assert sample.prompt.startswith("Some special magic" if many else "A special magic")
    assert sample.prefix.endswith("are" if many else "is")


def test_values_are_of_their_kind() -> None:
    assert re.fullmatch(r"\d{7}", build("niah_single_1", 20).answers[0])
    assert re.fullmatch(r"[0-9a-f-]{36}", build("niah_text_single_3", 20).answers[0])


def test_a_chain_has_four_hops_in_order_behind_a_solved_example() -> None:
    sample = build("vt", 30)
    assert sample.prompt.count("Memorize and track") == 2
    asked = sample.prompt.rpartition("Memorize and track")[2]
    value = re.search(r"assigned the value (\d+)", asked)
    links = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\S+)", asked)
    chain, holds = [], {value[1]} if value else set()
    for name, source in links:
        if source.rstrip(".") in holds:
            holds.add(name)
            chain.append(name)
    assert tuple(chain) == sample.answers and len(chain) == 5


def test_common_words_come_thirty_times_and_others_three() -> None:
    sample = build("cwe", 50)
    listed = sample.prompt.rpartition("Below is a numbered list")[2]
    counts = Counter(re.findall(r"\d+\. (\w+)", listed.split("\n")[1]))
    assert {word for word, count in counts.items() if count == 30} == set(sample.answers)
    assert sorted(set(counts.values())) == [3, 30] and len(counts) == 50


def test_coded_words_follow_the_zeta_distribution() -> None:
    sample = build("fwe", 100)
    context = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0]
    counts = Counter(context.split())
    total = 1000 * 6 / 3.141592653589793**2
    assert [counts[word] for word in ("...", *sample.answers)] == [int(total / k**2) for k in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["facts_1", "facts_2"])
def test_documents_lead_to_the_answer(name: str) -> None:
    sample = build(name, 12)
    person = re.search(r"(?:was|that) (\w+) (?:born|works)", sample.prompt.rpartition("Question:")[2])
    assert person is not None and sample.prompt.count("Document ") == 12
    place = re.search(rf"{person[1]} is a \w+ and was born in (\w+)\.", sample.prompt)
    if name == "facts_2":
        firm = re.search(rf"{person[1]} is a \w+ and works for (\w+)\.", sample.prompt)
        assert firm is not None
        place = re.search(rf"{firm[1]} has its main office in (\w+)\.", sample.prompt)
    assert place is not None and (place[1],) == sample.answers


def test_sentences_are_cut_at_their_ends() -> None:
    assert sentences("One day.  It rained!\nWho came? " + "x" * 400) == [
        "One day.",
        "It rained!",
        "Who came?",
    ]


def test_unknown_tasks_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="niah_single_1"):
        tasks(tokenizer, 1024, TEXT, ["niah_singel_1"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("small")
    save_tokenizer(Tokens(512, 128, 128).words([TEXT]), folder, 1024)
    return AutoTokenizer.from_pretrained(folder)


def test_a_small_language_asks_the_same_things(small: Any) -> None:
    """A reader that looks up the last word before the place of the question answers every retrieval task."""
    found = tasks(small, 256, TEXT)
    assert {task.name for task in found} >= {"niah_single_1", "niah_multikey_2", "vt", "fwe"}
    for task in found:
        for sample in samples(task, small, 256, 3):
            words = sample.prompt.split()
            assert small.unk_token_id not in small(sample.prompt).input_ids
            if task.name == "fwe":
                wanted = Counter(words[1:-1]).most_common(1)[0][0]
            elif task.name == "vt":
                told = [part.split()[-3:] for part in sample.prompt.split(f" {END}")]
                sources = {part[-2]: part[-1] for part in told if len(part) == 3 and part[0] in MARKERS}
                name, steps = words[-1], []
                while name in sources:
                    name = sources[name]
                    steps.append(name)
                wanted = " ".join(steps)
            else:
                after = words[words.index(words[-1]) + 1 :]
                wanted = " ".join(after[: after.index(END)])
            assert (wanted,) == sample.answers
            assert task.score(f"{wanted} {END} more", sample) == 1 and task.score("no", sample) == 0


def test_it_refuses_what_it_cannot_say(small: Any) -> None:
    with pytest.raises(ConfigError, match="facts_1"):
        tasks(small, 256, TEXT, ["facts_1"])


def test_the_solved_example_of_a_chain_is_as_long_as_rulers() -> None:
    """RULER fills 500 tokens with it; in prompts shorter than RULER's it shrinks."""
    for length, groups in ((4096, 15), (1024, 5)):
        sample = english(length, TEXT)["vt"].build(random.Random(0), 30)
        assert sample is not None
        example = sample.prompt.partition("Memorize and track")[2].partition("Memorize and track")[0]
        assert example.count("The grass is green.") == groups


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2"])
def test_a_needle_stands_before_some_hay(name: str) -> None:
    """RULER draws its place among the lines, so none ends the text."""
    for seed in range(60):
        sample = build(name, 4, seed)
        last = sample.prompt.rpartition("\nWhat")[0].splitlines()[-1]
        assert sample.answers[0] not in last


def test_words_are_rulers_where_their_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {"adjective": ["odd"], "noun": ["cat", "big dog"], "verb": [f"verb{i}" for i in range(60)]}
    (tmp_path / "wonderwords/assets").mkdir(parents=True)
    (tmp_path / "wonderwords/__init__.py").touch()
    for kind, words in lists.items():
        (tmp_path / f"wonderwords/assets/{kind}list.txt").write_text("\n".join(words) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    word_lists._listed.cache_clear()
    try:
        every = english(4096, TEXT)
        needle, common = (every[name].build(random.Random(0), 50) for name in ("niah_single_1", "cwe"))
        assert word_lists.source() == "wonderwords"
    finally:
        word_lists._listed.cache_clear()
    assert needle is not None and common is not None
    assert re.search(r"magic numbers for odd-(cat|big dog) is", needle.prompt)
    assert set(common.answers) <= {word for words in lists.values() for word in words}


def test_words_are_ours_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_lists, "PACKAGE", "no_such_package_of_words")
    word_lists._listed.cache_clear()
    try:
        assert word_lists.source() == "built in" and not word_lists.every_word()
        assert set(word_lists.nouns()) == set(NOUNS)
    finally:
        word_lists._listed.cache_clear()
