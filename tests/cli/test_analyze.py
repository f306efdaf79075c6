"""``analyze`` and ``sensitivity`` from the command line."""

from __future__ import annotations

import csv
import json

import pytest

import angelslim

SHORT = ("dataset.num_samples=2", "dataset.max_seq_length=16", "evaluation.enabled=false")


@pytest.fixture(scope="module")
def static(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("analyzed") / "static"
    settings = {"dataset.num_samples": 2, "dataset.max_seq_length": 16, "evaluation.enabled": False}
    return angelslim.compress(tiny_folder, "fp8_static", out=out, **settings).folder


def test_one_folder(cli, static, tmp_path):
    outcome = cli("analyze", static, "--out", tmp_path / "found", "--top", 3)
    assert outcome.code == 0, outcome.err
    assert "worst 3 of 14 layers" in outcome.out and "No layer stands out" in outcome.out
    assert f"Report: {tmp_path / 'found' / 'analysis.html'}" in outcome.out
    found = json.loads((tmp_path / "found" / "analysis.json").read_text())
    with (tmp_path / "found" / "analysis.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer["name"] for layer in found["layers"]]
    assert sorted(file.name for file in (tmp_path / "found").iterdir()) == [
        "analysis.csv", "analysis.html", "analysis.json",
    ]  # fmt: skip


def test_a_pair_as_json(cli, tiny_folder, static):
    outcome = cli("analyze", tiny_folder, static, "--json")
    found = json.loads(outcome.out)
    assert found["measured"] and len(found["layers"]) == 14 and found["layers"][0]["kl"] > 0


def test_outliers_end_with_status_1_only_when_asked(cli, static):
    assert cli("analyze", static, "--scale-limit", 0.002).code == 0
    outcome = cli("analyze", static, "--scale-limit", 0.002, "--fail-on-outliers")
    assert outcome.code == 1 and "of 14 layers stand out" in outcome.out
    assert cli("analyze", static, "--fail-on-outliers").code == 0


def test_mistakes_are_one_line(cli, tiny_folder, static, tmp_path):
    outcome = cli("analyze", static, tiny_folder)
    assert outcome.code == 2 and "swap the two" in outcome.err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("")
    outcome = cli("analyze", static, "--out", tmp_path / "old")
    assert outcome.code == 2 and "already exists" in outcome.err
    outcome = cli("analyze", static, "--out", tmp_path / "old", "--overwrite")
    assert outcome.code == 2 and "holds more than an analysis" in outcome.err


def test_sensitivity(cli, tiny_folder, tmp_path):
    words = ("sensitivity", "int4_rtn", tiny_folder, *SHORT, "--kl", "--keep", 1, "--out", tmp_path / "found")
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    for text in ("most sensitive of 14 layers", "2 calibration samples", "ignore_layers:", "      - lm_head"):
        assert text in outcome.out, text
    assert len(json.loads((tmp_path / "found" / "sensitivity.json").read_text())["layers"]) == 14
    assert cli(*words).code == 2 and cli(*words, "--overwrite").code == 0
    assert json.loads(cli(*words, "--overwrite", "--json").out)["kl_samples"] == 2


def test_sensitivity_takes_16_samples_unless_told(cli, tiny_folder, monkeypatch):
    from angelslim.analyze import sensitivity as module

    seen = []

    def stop(job, **_):
        seen.append(job.config.dataset.num_samples)
        raise angelslim.base.errors.UserError("stop")

    monkeypatch.setattr(module, "sensitivity", stop)
    cli("sensitivity", "int4_rtn", tiny_folder)
    cli("sensitivity", "int4_rtn", tiny_folder, "dataset.num_samples=5")
    assert seen == [16, 5]


def test_a_method_that_is_not_known_is_refused(cli, tiny_folder):
    assert cli("sensitivity", "int5_rtn", tiny_folder).code == 2
