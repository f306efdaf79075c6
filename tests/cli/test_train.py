"""`sweep` and `teacher` on the tiny model, up to the run that uses what they leave."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim.config.files import read_yaml
from angelslim.train import checkpoint
from angelslim.training.trials import Trials
from tiny import Killed, byte_tokenizer, dies_at, save_qwen3

RATE = "compression.QAT.hf_args.learning_rate"
ROWS = "compression.QAT.hf_args.per_device_train_batch_size=2"


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "lines.jsonl"
    rows = [{"text": f"Line {i}: " + "a quick brown fox " * 4} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def words(lines, tiny_folder, tmp_path):
    """The sweep's command line; one of the searched rates is hopeless."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"search: {{{RATE}: [1.0e-3, 0.5]}}\ntrials: 4\npatience: 1\nvolumes: [0.3, 0.6]\nseed: 1\n"
    )
    overrides = (f"dataset.data_path={lines}", "dataset.max_seq_length=32", ROWS, "evaluation.enabled=false")
    return ("sweep", "ternary_absmean", tiny_folder, *overrides, "--plan", plan, "--out", tmp_path / "sweep")


def curves(folder: Path) -> list[object]:
    found = json.loads((folder / "sweep.json").read_text())
    return [found["trials"], found["volumes"], found["share"]]


def test_a_sweep_stops_hopeless_trials_and_leaves_a_recipe_that_runs(
    cli, words, lines, tiny_folder, tmp_path
):
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    assert "4 trainings of 2" in outcome.err and "winner on 60%" in outcome.err
    assert f"Recipe: {tmp_path / 'sweep' / 'chosen.yaml'}" in outcome.out
    trials, volumes, share = curves(tmp_path / "sweep")
    by_rate = {trial["overrides"][RATE]: trial for trial in trials}
    assert set(by_rate) == {1e-3, 0.5}, "the plan's seed tries both"
    early = [trial for trial in trials if trial["outcome"] == "stopped early"]
    assert early and all(trial["overrides"][RATE] == 0.5 for trial in early)
    ends = [max(map(int, run["curve"])) for run in volumes]
    assert ends[1] == pytest.approx(2 * ends[0], abs=2), "steps follow the share of the data"
    assert all(max(map(int, trial["curve"])) < ends[0] for trial in early)
    folders = [path for name in ("trials", "volumes") for path in (tmp_path / "sweep").glob(f"{name}/*")]
    assert folders == [], "a trial's folder goes when it has ended"
    chosen = read_yaml(tmp_path / "sweep" / "chosen.yaml")
    assert chosen["compression"]["QAT"]["hf_args"]["learning_rate"] == 1e-3
    assert chosen["dataset"] == chosen["dataset"] | {"data_path": str(lines), "share": share}
    out = tmp_path / "out"
    ran = cli("run", tmp_path / "sweep" / "chosen.yaml", tiny_folder, "--out", out)
    assert ran.code == 0, ran.err
    training = json.loads((out / "run.json").read_text())["training"]
    (same,) = (run for run in volumes if run["share"] == share)
    assert training["settings"]["steps"] == max(map(int, same["curve"]))
    again = cli(*words)
    assert again.code == 0 and curves(tmp_path / "sweep") == [trials, volumes, share]


def test_a_killed_sweep_continues_inside_its_trial(cli, words, tmp_path, monkeypatch):
    saving = (*words, "compression.QAT.hf_args.save_steps=5")
    assert cli(*saving).code == 0
    whole = curves(tmp_path / "sweep")
    saving = (*saving[:-1], saving[-1], "--out", tmp_path / "killed")
    original, seen = Trials.__call__, []

    def dying(self, overrides, budget):
        for pair in original(self, overrides, budget):
            seen.append(pair)
            if len(seen) == 7:
                monkeypatch.undo()
                raise Killed
            yield pair

    with monkeypatch.context() as patch:
        patch.setattr(
            "angelslim.training.trials.shutil.rmtree", lambda folder: None
        )  # nothing runs after SIGKILL
        patch.setattr(Trials, "__call__", dying)
        with pytest.raises(Killed):
            cli(*saving)
    assert (tmp_path / "killed" / "trials" / "000" / "checkpoint.safetensors").exists()
    outcome = cli(*saving)
    assert outcome.code == 0, outcome.err
    assert curves(tmp_path / "killed") == whole


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("ternary_absmean", "int4_rtn"), "trains nothing"),
        ((RATE, "compression.QAT.hf_args.learning_rat"), "learning_rate"),
        ((RATE, "dataset.share"), "volumes lists the shares"),
        (("trials: 4", "trials: none"), "whole number"),
    ],
)
def test_mistakes_are_one_line_before_any_work(cli, words, tmp_path, change, complaint):
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan.read_text().replace(*change).replace("[1.0e-3, 0.5]", "[0.2, 0.5]"))
    outcome = cli(*(str(word).replace(*change) for word in words))
    assert outcome.code == 2 and complaint in outcome.err, outcome.err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_another_recipe_is_refused(cli, words, tmp_path):
    assert cli(*words, "compression.QAT.hf_args.max_steps=2").code == 0
    outcome = cli(*words, "compression.QAT.hf_args.max_steps=3")
    assert outcome.code == 2 and "another plan, recipe" in outcome.err


def test_two_workers_search_and_one_command_leaves_the_recipe(cli, words, tmp_path):
    outcome = cli(*words, "--workers", 2)
    assert outcome.code == 0, outcome.err
    trials, _, _ = curves(tmp_path / "sweep")
    assert len(trials) == 4 and not list((tmp_path / "sweep").glob("trials/*"))
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'sweep' / 'study.db'}")
    refused = [trial.number for trial in study.trials if trial.state.name == "FAIL"]
    assert refused == [4, 5], (
        "each of the two trained until there was no room, none left its work to the caller"
    )
    assert (
        read_yaml(tmp_path / "sweep" / "chosen.yaml")["compression"]["QAT"]["hf_args"]["learning_rate"]
        == 1e-3
    )


def test_a_cluster_without_ray_is_one_line(cli, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = cli(*words, "--ray")
    assert outcome.code == 2 and "pip install 'angelslim[ray]'" in outcome.err
    assert not (tmp_path / "sweep").exists()


# --------------------------------------------------------------------------------------------- teacher


def test_a_stored_teacher_teaches_a_run(cli, lines, tiny_folder, tmp_path):
    stored = (
        "teacher",
        tiny_folder,
        "--data",
        lines,
        "--k",
        8,
        "--length",
        32,
        "--batch",
        2,
        "--device",
        "cpu",
    )
    first = cli(*stored, "--tokens", 1000, "--out", tmp_path / "lessons")
    assert first.code == 0, first.err
    assert "960 tokens, 47 bytes each, 1 shards" in first.out and not (tmp_path / "lessons.data").exists()
    before = {file.name: file.read_bytes() for file in (tmp_path / "lessons").iterdir()}
    assert cli(*stored, "--tokens", 1000, "--out", tmp_path / "lessons").code == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "lessons").iterdir()} == before
    other = cli(*stored, "--tokens", 2000, "--out", tmp_path / "lessons")
    assert other.code == 2 and "another run" in other.err
    teach = (
        f"compression.QAT.teacher_logits={tmp_path / 'lessons'}",
        f"dataset.data_path={lines}",
        "evaluation.enabled=false",
    )
    outcome = cli("run", "seq_2bit", tiny_folder, *teach, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "batches of 2 rows of 32 tokens" in outcome.err and "held-back loss is of rows" not in outcome.err
    training = json.loads((tmp_path / "out" / "run.json").read_text())["training"]
    assert training["teacher"] == str(tmp_path / "lessons") and "kd" in training["steps"][0]["metrics"]
    assert training["settings"]["steps"] == 15 and training["tokens"] == 960
    half = cli("run", "seq_2bit", tiny_folder, *teach, "dataset.share=0.4", "--out", tmp_path / "half")
    assert half.code == 0, half.err
    record = json.loads((tmp_path / "half" / "run.json").read_text())["training"]
    assert record["settings"]["steps"] == 6


def test_logits_of_other_data_are_told(cli, lines, texts, tiny_folder, tmp_path):
    made = cli(
        "teacher", tiny_folder, "--data", lines, "--length", 32, "--k", 4, "--out", tmp_path / "lessons"
    )
    assert made.code == 0, made.err
    teach = (f"compression.QAT.teacher_logits={tmp_path / 'lessons'}", "compression.QAT.hf_args.max_steps=1")
    plain = (f"dataset.data_path={texts}", "evaluation.enabled=false", "--out", tmp_path / "out")
    outcome = cli("run", "seq_2bit", tiny_folder, *teach, *plain)
    assert outcome.code == 0 and "held-back loss is of rows" in outcome.err.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--data", "nowhere.jsonl"), "no such data file"),
        (("--length", "100000"), "fewer than two rows"),
        (("--batch", "5000", "--length", "32"), "fewer than one batch"),
    ],
)
def test_a_teacher_with_nothing_to_read_is_one_line(cli, lines, tiny_folder, tmp_path, words, complaint):
    data = () if "--data" in words else ("--data", lines)
    outcome = cli("teacher", tiny_folder, *data, *words, "--out", tmp_path / "lessons")
    assert outcome.code == 2 and complaint in outcome.err, outcome.err
    assert not (tmp_path / "lessons").exists()


def test_distill_needs_a_teacher_and_then_runs(cli, lines, tiny_folder, tmp_path):
    words = (
        f"dataset.data_path={lines}",
        "dataset.max_seq_length=32",
        "evaluation.enabled=false",
        "compression.Distill.hf_args.max_steps=2",
        "--out",
        tmp_path / "out",
    )
    without = cli("run", "distill", tiny_folder, *words)
    assert without.code == 2 and "compression.Distill.teacher_model_path" in without.err
    outcome = cli(
        "run", "distill", tiny_folder, f"compression.Distill.teacher_model_path={tiny_folder}", *words
    )
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["training"]["loss"] == "kl"


# ------------------------------------------------------------------------------------- mistakes of a training


def is_refused(outcome, complaint):
    """Status 2, and one error in one line, with what to do about it beside it."""
    assert outcome.code == 2, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and complaint in " ".join(outcome.err.split()), outcome.err
    assert "Traceback" not in outcome.err


def training(lines, tiny_folder, out, recipe="ternary_tequila"):
    words = (f"dataset.data_path={lines}", "dataset.max_seq_length=32", ROWS, "evaluation.enabled=false")
    return ("run", recipe, tiny_folder, *words, "compression.QAT.hf_args.max_steps=2", "--out", out)


def test_a_group_that_does_not_divide_the_inputs_is_refused(cli, lines, tiny_folder, tmp_path):
    odd = "compression.QAT.plugin_config.quant_config.special.group_size=48"
    is_refused(cli(*training(lines, tiny_folder, tmp_path / "out"), odd), "48")
    assert not (tmp_path / "out").exists()


def test_empty_documents_are_refused(cli, tiny_folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 5)
    is_refused(cli(*training(tmp_path / "empty.jsonl", tiny_folder, tmp_path / "out")), "all are empty")


def test_a_teacher_with_another_vocabulary_is_refused(cli, lines, tiny_folder, tmp_path):
    teacher = save_qwen3(tmp_path / "teacher")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(teacher)
    words = [
        word for word in training(lines, tiny_folder, tmp_path / "out", "distill") if "QAT" not in str(word)
    ]
    words = [word for word in words if word != ROWS]
    is_refused(cli(*words, f"compression.Distill.teacher_model_path={teacher}"), "vocabular")


def test_the_unfinished_training_of_another_recipe_is_refused(cli, lines, tiny_folder, tmp_path, monkeypatch):
    command = (*training(lines, tiny_folder, tmp_path / "out"), "compression.QAT.hf_args.save_steps=1")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies_at(checkpoint.save, 1, True))
        with pytest.raises(Killed):
            cli(*command)
    assert (tmp_path / "out.training").exists()
    is_refused(cli(*command, f"{RATE}=0.1"), "another recipe")
    assert cli(*command).code == 0


def test_a_layer_of_zeros_is_trained_and_encoded(cli, lines, tiny_folder, tmp_path):
    """sign(0) counts as +1: a four of equal zeros has one zero and three signs, as its code needs."""
    folder = tmp_path / "zeros"
    shutil.copytree(tiny_folder, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, file, metadata={"format": "pt"})
    outcome = cli(*training(lines, folder, tmp_path / "out", "sherry"))
    assert outcome.code == 0, outcome.err
    assert cli("export", tmp_path / "out", "--format", "gguf", "--out", tmp_path / "out.gguf").code == 0
