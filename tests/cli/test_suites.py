"""``eval --suite`` on a small model: tables, JSON, page, tasks for lm-eval."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest

from angelslim.cli.suites import words
from angelslim.evaluate.suites.kept import Kept

WORDS = ("--suite", "ruler", "--samples", 2, "--tasks", "niah_single_1,fwe", "--lengths", 1000)


def test_a_word_that_is_named_twice_stands_once():
    assert words("vt, fwe,vt,") == ["vt", "fwe"]


def test_a_suite_compares_attentions(cli, tiny_folder, tmp_path):
    asked = ("--attn", "dense,uniform", "--density", 0.4, "--block", 32, "--out", tmp_path / "out")
    outcome = cli("eval", tiny_folder, *WORDS, *asked)
    assert outcome.code == 0, outcome.err
    assert "niah_single_1" in outcome.out and "uniform" in outcome.out and "TTFT" in outcome.out
    found = json.loads((tmp_path / "out" / "suite.json").read_text())
    densities = {row["attention"]: row["density"] for row in found["averages"]}
    assert densities["dense"] == 1.0 and 0.35 < densities["uniform"] < 0.45
    assert "niah_single_1" in (tmp_path / "out" / "suite.html").read_text()


def test_tasks_are_written_for_the_harness(cli, tiny_folder, tmp_path):
    outcome = cli("eval", tiny_folder, *WORDS, "--export-tasks", tmp_path / "tasks")
    assert outcome.code == 0 and "2 tasks" in outcome.out
    assert (tmp_path / "tasks" / "angelslim_ruler.yaml").is_file()


def test_wrong_words_are_refused_before_any_work(cli, tiny_folder, tmp_path):
    assert "ruler" in cli("eval", tiny_folder, "--suite", "rular").err
    assert "--data" in cli("eval", tiny_folder, "--suite", "longbench").err
    outcome = cli("eval", tiny_folder, tiny_folder, *WORDS, "--out", tmp_path / "out")
    assert outcome.code == 2 and "one model" in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "out"), "--out has no effect without --suite"),
        (("--export-tasks", "out"), "--export-tasks has no effect without --suite"),
        (("--lengths", "4k"), "--lengths has no effect without --suite"),  # the default, but asked for
        (("--limit", 3), "--limit has no effect without --lm-eval"),
        ((*WORDS, "--speed"), "--speed has no effect on a suite"),
        ((*WORDS, "--lm-eval", "x"), "--lm-eval has no effect on a suite"),
        ((*WORDS, "--data", "."), "--data has no effect on the suite ruler"),
        ((*WORDS, "--export-tasks", "out", "--attn", "stem"), "--attn has no effect on --export-tasks"),
    ],
)
def test_an_option_without_effect_is_refused(cli, tiny_folder, words, said):
    outcome = cli("eval", tiny_folder, *words)
    assert outcome.code == 2 and said in " ".join(outcome.err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "gpu"), "no device"),
        (("--attn", "union", "--block", -32), "A block has -32 tokens"),
        (("--block", 32), "A block is given and no sparse attention"),
        (("--lengths", 100), "fits into 100 tokens"),
    ],
)
def test_a_refused_suite_leaves_nothing(cli, tiny_folder, tmp_path, words, said):
    """What was left would refuse the same command when it is given right."""
    outcome = cli("eval", tiny_folder, *WORDS, "--out", tmp_path / "out", *words)
    assert outcome.code == 2 and said in " ".join(outcome.err.split())
    assert not list(tmp_path.iterdir())


def test_a_length_that_is_too_short_leaves_no_tasks(cli, tiny_folder, tmp_path):
    words = ("--lengths", "1000,100", "--export-tasks", tmp_path / "tasks")
    outcome = cli("eval", tiny_folder, *WORDS, *words)
    assert outcome.code == 2 and "fits into 100 tokens" in " ".join(outcome.err.split())
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_said_before_any_work(cli, tiny_folder, tmp_path):
    (tmp_path / "file").touch()
    for option in ("--out", "--export-tasks"):
        outcome = cli("eval", tiny_folder, *WORDS, option, tmp_path / "file")
        assert outcome.code == 2 and "is a file" in " ".join(outcome.err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


KEPT = (*WORDS, "--attn", "dense,uniform", "--density", 0.4, "--block", 32)  # 2 tasks with 2 prompts
TIMES = ("ttft", "ttft_ms", "selector_ms", "kernel_ms", "times_dense")


def timeless(file):
    found = json.loads(file.read_text())
    return {
        name: [{key: x for key, x in row.items() if key not in TIMES} for row in value]
        if name in ("rows", "averages")
        else value
        for name, value in found.items()
    }


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """What an uninterrupted run finds."""
    from typer.testing import CliRunner

    from angelslim.cli import app

    out = tmp_path_factory.mktemp("whole") / "out"
    words = [str(word) for word in ("eval", tiny_folder, *KEPT, "--out", out)]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    return timeless(out / "suite.json")


def _killed(cli, words, after):
    """Run, and kill this process when the `after`-th prompt was kept."""
    seen, write = [], Kept.write

    def dying(self, cells):
        write(self, cells)
        seen.append(cells)
        if len(seen) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    Kept.write = dying
    cli(*words)


def kill(cli, words, after):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(cli, words, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_killed_suite_goes_on_with_the_same_command(cli, tiny_folder, tmp_path, monkeypatch, whole, after):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    words = ("eval", tiny_folder, *KEPT, "--out", out)
    kill(cli, words, after)
    assert not out.exists() and partial.is_dir()
    seen, write = [], Kept.write

    def counted(self, cells):
        seen.append(cells[0].task)
        write(self, cells)

    monkeypatch.setattr(Kept, "write", counted)
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    assert len(seen) == 4 - after, "an answered prompt was asked again"
    assert f"{after} of 4 prompts" in " ".join((outcome.out + outcome.err).split())
    assert timeless(out / "suite.json") == whole
    assert (out / "suite.html").exists() and not partial.exists()


def test_another_command_takes_nothing_over(cli, tiny_folder, tmp_path, whole):
    words = ("eval", tiny_folder, *KEPT, "--out", tmp_path / "out")
    kill(cli, words, 2)
    before = {file.name: file.read_text() for file in (tmp_path / "out.partial").iterdir()}
    for change in (("--seed", 1), ("--samples", 3), ("--density", 0.5), ("--attn", "dense,stem")):
        outcome = cli(*words, *change)
        assert outcome.code == 2 and "unfinished suite" in " ".join(outcome.err.split()), change
    assert {file.name: file.read_text() for file in (tmp_path / "out.partial").iterdir()} == before
    assert cli(*words).code == 0 and timeless(tmp_path / "out" / "suite.json") == whole
