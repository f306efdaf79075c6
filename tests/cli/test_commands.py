"""Every command on the tiny model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from angelslim.cli import ship
from angelslim.models.checkpoint import Checkpoint
from tiny import fingerprints

PLAIN = ("evaluation.enabled=false",)


@pytest.fixture(scope="module")
def compressed(tiny_folder, tmp_path_factory):
    from angelslim import compress

    out = tmp_path_factory.mktemp("compressed") / "fp8-block"
    return compress(tiny_folder, "fp8_block", out=out, evaluation__enabled=False).folder


def test_run_says_where_the_result_is(cli, tiny_folder, tmp_path):
    outcome = cli("run", "int8_dynamic", tiny_folder, *PLAIN, "--seed", 4, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert f"Model:  {tmp_path / 'out'}" in outcome.out and "report.html" in outcome.out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["seed"] == 4
    assert record["command"].startswith("angelslim run int8_dynamic") and "--seed 4" in record["command"]


def test_run_without_out_writes_below_save_path(cli, tiny_folder, tmp_path):
    outcome = cli("run", "fp8_dynamic", tiny_folder, *PLAIN, f"global.save_path={tmp_path / 'all'}")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "all" / "tiny-fp8_dynamic" / "config.json").exists()


def test_run_twice_does_nothing(cli, tiny_folder, tmp_path):
    words = ("run", "fp8_dynamic", tiny_folder, *PLAIN, "--out", tmp_path / "out")
    assert cli(*words).code == 0
    before = fingerprints(tmp_path / "out")
    again = cli(*words)
    assert again.code == 0 and "nothing to do" in again.err
    assert fingerprints(tmp_path / "out") == before


def test_run_takes_a_file_of_the_users(cli, tiny_folder, tmp_path):
    assert cli("cp", "int4_rtn", tmp_path / "mine.yaml").code == 0
    outcome = cli("run", tmp_path / "mine.yaml", tiny_folder, *PLAIN, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"


def test_switches_without_effect_are_told(cli, tiny_folder, tmp_path):
    switch = "compression.quantization.quant_method.damp=0.05"
    outcome = cli("run", "int8_dynamic", tiny_folder, *PLAIN, switch, "--out", tmp_path / "out")
    assert outcome.code == 0
    assert "quantization.damp has no effect on rtn" in outcome.err
    assert "damp" in json.loads((tmp_path / "out" / "run.json").read_text())["warnings"][0]


def test_a_plan_without_rounding_shows_no_empty_table(cli, tiny_folder):
    shown = cli("plan", "rotated", tiny_folder).out
    assert "full precision" in shown and "Quantized" not in shown and "Not rounded" in shown


def test_plan_starts_nothing_and_predicts_the_size(cli, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli("plan", "int4_rtn", tiny_folder)
    assert outcome.code == 0 and "bits per weight" in outcome.out and "mlp.down_proj" in outcome.out
    plan = json.loads(cli("plan", "int4_rtn", tiny_folder, "--json").out)
    assert plan["bits_per_weight"] == pytest.approx(4.125)
    assert plan["layers"]["self_attn.q_proj"] == 2
    assert plan["samples"] == 0
    assert not list(tmp_path.iterdir())
    assert cli("run", "int4_rtn", tiny_folder, *PLAIN, "--out", tmp_path / "out").code == 0
    written = Checkpoint(tmp_path / "out").nbytes
    assert plan["bytes_after"] == written - 14 * 16  # each packed layer also stores its shape, two integers


def test_plan_of_a_calibrated_run_names_its_samples(cli, tiny_folder):
    plan = json.loads(cli("plan", "fp8_static", tiny_folder, "dataset.num_samples=5", "--json").out)
    assert (plan["samples"], plan["max_length"]) == (5, 2048)


def test_inspect(cli, tiny_folder):
    text = cli("inspect", tiny_folder).out
    assert "Qwen3ForCausalLM" in text and "input_layernorm" in text
    summary = json.loads(cli("inspect", tiny_folder, "--json").out)
    assert summary["groups"][0]["linears"] == "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
    assert summary["tied embeddings"] == "True"


def test_validate_reports_each_file(cli, tmp_path):
    (tmp_path / "good.yaml").write_text("extends: fp8_static\n")
    (tmp_path / "bad.yaml").write_text("extends: fp8_static\ndatset: {}\n")
    assert cli("validate", tmp_path / "good.yaml", "int4_rtn").code == 0
    outcome = cli("validate", tmp_path / "good.yaml", tmp_path / "bad.yaml")
    assert outcome.code == 2
    assert "Did you mean 'dataset'" in outcome.out and "ok" in outcome.out


def test_ls_names_everything_that_can_be_named(cli):
    text = cli("ls").out
    assert all(
        name in text
        for name in (
            "fp8_static",
            "sparse_stem",
            "rtn",
            "flexprefill",
            "compressed_tensors",
            "tiny-lm",
            "addition",
        )
    )


def test_cp_into_a_folder_keeps_the_name(cli, tmp_path):
    assert cli("cp", "fp8_static", tmp_path).code == 0
    assert (tmp_path / "fp8_static.yaml").exists()


def test_env_is_a_table_for_bug_reports(cli):
    text = cli("env", "--markdown").out
    assert text.startswith("| what | value |") and "| torch |" in text
    assert "transformers" in cli("env").out


def test_export_and_check(cli, compressed, tmp_path):
    assert "14 layers decode" in cli("export", compressed, "--check").out
    outcome = cli("export", compressed, "--format", "compressed_tensors", "--out", tmp_path / "ct")
    assert outcome.code == 0, outcome.err
    assert "14 layers decode" in cli("export", tmp_path / "ct", "--check").out


def test_serve_dry_run_prints_the_command_only(cli, compressed):
    outcome = cli("serve", compressed, "--dry-run", "--port", 8123)
    assert outcome.code == 0
    assert outcome.out.strip().endswith(f"{compressed} --port 8123")
    assert "curl http://127.0.0.1:8123/v1/chat/completions" in outcome.err


def test_eval_side_by_side(cli, tiny_folder, compressed, tmp_path):
    (tmp_path / "text.txt").write_text("Some words to measure. " * 20)
    words = ("eval", tiny_folder, compressed, "--text", tmp_path / "text.txt")
    assert "perplexity" in cli(*words).out
    scores = json.loads(cli(*words, "--json").out)
    values = [{score["metric"]: score["value"] for score in found} for found in scores.values()]
    assert len(values) == 2 and values[0]["perplexity"] != values[1]["perplexity"]


@pytest.mark.parametrize("flag", ["--quiet", "--verbose"])
def test_flags_before_the_command(flag, cli, tiny_folder):
    assert cli(flag, "plan", "fp8_dynamic", tiny_folder).code == 0
    cli("plan", "fp8_dynamic", tiny_folder)  # back to the usual level for other tests


def test_dense_calls_come_with_their_reasons_but_for_decoding():
    reasons = {"decode": 90, "sliding window": 15, "attention with softcap": 3}
    stats = SimpleNamespace(density=0.3, selector_ms=4.0, fallbacks=reasons)
    assert [(score.metric, score.value) for score in ship._attention_scores(stats)] == [
        ("attention density", 0.3),
        ("selector", 4.0),
        ("dense calls", 18),
        ("dense calls: attention with softcap", 3),
        ("dense calls: sliding window", 15),
    ]
