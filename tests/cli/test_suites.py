"""``eval --suite`` on a small model: tables, JSON, page, tasks for lm-eval."""

from __future__ import annotations

import json

WORDS = ("--suite", "ruler", "--samples", 2, "--tasks", "niah_single_1,fwe", "--lengths", 1000)


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
