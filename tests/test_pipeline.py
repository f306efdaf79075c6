"""Runs: killed and continued, refused, repeated, replayed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from angelslim import pipeline
from angelslim.base import console
from angelslim.base.errors import ModelError, ResourceError, UserError
from angelslim.models.activations import ActivationStore
from angelslim.models.checkpoint import UnitWriter, write_atomically
from angelslim.report.record import RunRecord
from families import save_random
from tiny import CALIBRATED, Killed, dies_at, edit_json, fingerprints, job_for, qwen3, save_qwen3

SPILLING = (*CALIBRATED, "global.activation_budget=20KB")


def static_job(model: Path, texts: Path, *overrides: str):
    return job_for(model, SPILLING[0], *SPILLING[1:], f"dataset.data_path={texts}", *overrides)


@pytest.fixture(scope="module")
def whole(deep_folder, texts, tmp_path_factory) -> Path:
    """An uninterrupted calibrated run of six blocks."""
    out = tmp_path_factory.mktemp("whole") / "out"
    pipeline.run(static_job(deep_folder, texts), out)
    return out


# -------------------------------------------------------------------------------------- killed and continued


def command(model: Path, texts: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "angelslim", "run", "fp8_static", str(model), *SPILLING[1:],
        f"dataset.data_path={texts}", "--out", str(out),
    ]  # fmt: skip


def killed_run(words: list[str], out: Path, units: int) -> int:
    """Start a run and kill it, without warning, as soon as `units` units are on disk; returns how many are."""
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    folder = out.with_name(out.name + ".partial") / "units"
    while process.poll() is None and len(list(folder.glob("*.safetensors"))) < units:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    error = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, error
    return len(list(folder.glob("*.safetensors")))


@pytest.fixture
def slow_blocks(tmp_path, monkeypatch) -> None:
    """Make each unit last a while in child processes, so that the kill comes between the intended points."""
    hook = (
        "import time\n"
        "from angelslim.models import checkpoint\n"
        "write = checkpoint.UnitWriter.write\n"
        "checkpoint.UnitWriter.write = lambda *args: (write(*args), time.sleep(0.3))[0]\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def test_kill_9_at_two_points_gives_the_same_bytes(
    deep_folder, texts, whole, tmp_path, slow_blocks, monkeypatch
):
    out = tmp_path / "out"
    words = command(deep_folder, texts, out)
    first = killed_run(words, out, 2)
    assert 2 <= first < 7 and not out.exists()
    assert list(out.with_name("out.partial").glob("activations/*/*.safetensors"))  # they did spill
    second = killed_run(words, out, first + 2)
    assert first < second < 8 and not out.exists()
    monkeypatch.delenv("PYTHONPATH")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Continuing the unfinished run" in done.stderr
    assert fingerprints(out) == fingerprints(whole)
    assert not out.with_name("out.partial").exists()


def test_kill_9_at_ten_random_moments_gives_the_same_bytes(deep_folder, texts, whole, tmp_path):
    """The work done by forked children, each killed at a moment it cannot foresee; the last one finishes."""
    out, rng = tmp_path / "out", random.Random(7)
    started = time.perf_counter()
    pipeline.run(static_job(deep_folder, texts), tmp_path / "undisturbed")
    whole_run = time.perf_counter() - started
    deaths = 0
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(
            target=_run_alone, args=(deep_folder, texts, out)
        )
        process.start()
        time.sleep(rng.uniform(0.05, 0.6) * whole_run)
        process.kill()
        process.join()
        deaths += process.exitcode == -signal.SIGKILL
        assert not out.exists() or fingerprints(out) == fingerprints(whole)
    assert deaths >= 2
    pipeline.run(static_job(deep_folder, texts), out)
    assert fingerprints(out) == fingerprints(whole)
    assert not out.with_name("out.partial").exists()


def _run_alone(folder: Path, texts: Path, out: Path) -> None:
    torch.set_num_threads(1)  # a forked child has no pool of threads
    pipeline.run(static_job(folder, texts), out)


POINTS = {
    # name: (object, attribute, at which call it dies, after the call or instead of it)
    "before the first block is written": (UnitWriter, "write", 0, False),
    "between a unit and its record": (UnitWriter, "write", 3, True),
    "after a record, before the activations": (ActivationStore, "commit", 2, False),
    "after the activations, before the marker": (ActivationStore, "commit", 2, True),
    "after the marker, before the old activations go": (ActivationStore, "forget", 3, False),
    "while a block runs": (ActivationStore, "put", 6 * 3 + 4, True),
    "after all blocks": (UnitWriter, "write", 6, False),
    "while the shards are joined": (pipeline, "_assemble", 0, True),
    "before the report": (pipeline, "_describe", 0, True),
}


@pytest.mark.parametrize("point", POINTS)
def test_death_between_any_two_steps_gives_the_same_bytes(
    point, deep_folder, texts, whole, tmp_path, monkeypatch
):
    owner, attribute, when, after = POINTS[point]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, dies_at(getattr(owner, attribute), when, after))
        with pytest.raises(Killed):
            pipeline.run(static_job(deep_folder, texts), out)
    assert not out.exists()
    finished = len(list(out.with_name("out.partial").glob("units/block*.safetensors")))
    written: list[str] = []
    monkeypatch.setattr(UnitWriter, "write", _noting(written, UnitWriter.write))
    pipeline.run(static_job(deep_folder, texts), out)
    assert fingerprints(out) == fingerprints(whole)
    blocks = [name for name in written if name.startswith("block")]
    assert len(blocks) <= 6 - finished + 1  # at most the block that was under way is done again


def _noting(written: list[str], write):
    def noting(self, unit, tensors):
        written.append(unit)
        write(self, unit, tensors)

    return noting


def test_dying_again_right_after_a_restart_loses_nothing(deep_folder, texts, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for deaths in (3, 0, 0):
        writes: list[str] = []

        def dying(self, unit, tensors, deaths=deaths, writes=writes, original=UnitWriter.write):
            if len(writes) == deaths:
                raise Killed
            writes.append(unit)
            original(self, unit, tensors)

        with monkeypatch.context() as patch:
            patch.setattr(UnitWriter, "write", dying)
            with pytest.raises(Killed):
                pipeline.run(static_job(deep_folder, texts), out)
    assert (out.with_name("out.partial") / "next_block").read_text() == "3"
    pipeline.run(static_job(deep_folder, texts), out)
    assert fingerprints(out) == fingerprints(whole)


def test_dying_while_finished_blocks_are_passed_over_loses_nothing(deep_folder, texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for owner, attribute in ((pipeline, "_assemble"), (console.Bar, "advance")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, _raising)
            with pytest.raises(Killed):
                pipeline.run(static_job(deep_folder, texts), out)
    assert (out.with_name("out.partial") / "next_block").read_text() == "6"


def test_lost_activations_only_cost_time(deep_folder, texts, whole, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_assemble", _raising)
        with pytest.raises(Killed):
            pipeline.run(static_job(deep_folder, texts), out)
    shutil.rmtree(out.with_name("out.partial") / "activations")
    pipeline.run(static_job(deep_folder, texts), out)
    assert fingerprints(out) == fingerprints(whole)


def _raising(*_args):
    raise Killed


# ------------------------------------------------------------------------------------------------- the same


def test_neither_the_budget_nor_the_time_of_day_shows(deep_folder, texts, whole, tmp_path):
    pipeline.run(static_job(deep_folder, texts, "global.activation_budget=1"), tmp_path / "disk")
    pipeline.run(static_job(deep_folder, texts, "global.activation_budget=1GB"), tmp_path / "memory")
    assert fingerprints(tmp_path / "disk") == fingerprints(tmp_path / "memory") == fingerprints(whole)


def test_the_seed_decides_the_samples(tiny_folder, texts, tmp_path):
    hashes = []
    for index, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(index)
        pipeline.run(static_job(tiny_folder, texts, f"global.seed={seed}"), out)
        hashes.append(fingerprints(out))
    assert hashes[0] == hashes[1] != hashes[2]


def test_run_yaml_replays_the_run(tiny_folder, texts, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    record = pipeline.run(static_job(tiny_folder, texts, "global.seed=3"), first)
    again = pipeline.run(job_for(tiny_folder, first / "run.yaml"), second)
    assert fingerprints(first) == fingerprints(second)
    assert record.hashes == again.hashes


def test_the_record_tells_what_was_written(whole):
    record = RunRecord.load(whole)
    for name, digest in record.hashes.items():
        assert hashlib.sha256((whole / name).read_bytes()).hexdigest() == digest
    assert set(record.hashes) == {file.name for file in whole.glob("*.safetensors")}
    assert len(record.layers) == 42
    assert record.bytes_after == sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    assert all(layer.input_scale and layer.activations for layer in record.layers)
    assert record.provenance["dataset.num_samples"] == "override"
    assert (whole / "report.html").stat().st_size > 1000 and (whole / "README.md").exists()


def test_fused_layers_share_their_scales(whole):
    tensors = load_file(whole / "model.safetensors")
    for block in range(6):
        prefix = f"model.layers.{block}."
        for members in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            for leaf in ("weight_scale", "input_scale"):
                assert len({tensors[f"{prefix}{name}.{leaf}"].item() for name in members}) == 1
    scales = {tensors[f"model.layers.{b}.mlp.down_proj.input_scale"].item() for b in range(6)}
    assert len(scales) == 6


def test_static_scales_are_the_largest_inputs_of_the_whole_model(whole, deep_folder, texts):
    """The inputs that calibration saw, block by block, are those of one ordinary forward pass."""
    from transformers import AutoModelForCausalLM

    from angelslim.data.text import calibration_batches

    model = AutoModelForCausalLM.from_pretrained(deep_folder)
    name = "model.layers.4.mlp.down_proj"
    seen: list[float] = []
    model.get_submodule(name).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].abs().max().item())
    )
    batches = calibration_batches(pipeline.tokenizer_of(deep_folder), texts, samples=6, max_length=32, seed=0)
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    scale = load_file(whole / "model.safetensors")[f"{name}.input_scale"].item()
    assert scale == pytest.approx(max(seen) / 448, rel=1e-6)


# -------------------------------------------------------------------------------------- refused and repeated


def test_a_finished_run_is_not_done_again(tiny_folder, tmp_path, caplog, monkeypatch):
    out = tmp_path / "out"
    first = pipeline.run(job_for(tiny_folder, "fp8_dynamic"), out)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    monkeypatch.setattr(pipeline.log, "propagate", True)
    with caplog.at_level("INFO", "angelslim"):
        again = pipeline.run(job_for(tiny_folder, "fp8_dynamic"), out)
    assert "nothing to do" in caplog.text
    assert again.hashes == first.hashes
    assert before == {file: file.stat().st_mtime_ns for file in out.iterdir()}


def test_another_result_is_never_replaced_unasked(tiny_folder, tmp_path):
    out = tmp_path / "out"
    pipeline.run(job_for(tiny_folder, "fp8_dynamic"), out)
    before = fingerprints(out)
    with pytest.raises(UserError, match=r"already exists.*--overwrite"):
        pipeline.run(job_for(tiny_folder, "int8_dynamic"), out)
    assert fingerprints(out) == before
    pipeline.run(job_for(tiny_folder, "int8_dynamic"), out, overwrite=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"


def test_an_output_with_a_damaged_record_is_still_refused(tiny_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{")
    with pytest.raises(UserError, match="already exists"):
        pipeline.run(job_for(tiny_folder, "fp8_dynamic"), out)


def test_a_file_or_a_foreign_folder_is_never_replaced(tiny_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(UserError, match="already exists"):
            pipeline.run(job_for(tiny_folder, "fp8_dynamic"), tmp_path / name)
    with pytest.raises(UserError, match="already exists"):
        pipeline.run(job_for(tiny_folder, "fp8_dynamic"), tmp_path / "file", overwrite=True)


def test_the_model_is_never_replaced_by_its_result(tmp_path):
    model = save_qwen3(tmp_path / "models" / "tiny")
    for out in (model, model.parent, tmp_path / "models" / ".." / "models" / "tiny"):
        with pytest.raises(UserError, match="the model itself"):
            pipeline.run(job_for(model, "fp8_dynamic"), out, overwrite=True)
    assert (model / "model.safetensors").exists()


def test_an_error_that_has_to_be_mended_leaves_nothing_behind(tiny_folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}')
    with pytest.raises(UserError, match="No usable record"):
        pipeline.run(
            job_for(tiny_folder, "fp8_static", f"dataset.data_path={tmp_path / 'empty.jsonl'}"),
            tmp_path / "out",
        )
    assert not list(tmp_path.glob("out*"))


def test_an_empty_output_folder_is_used(tiny_folder, tmp_path):
    (tmp_path / "out").mkdir()
    pipeline.run(job_for(tiny_folder, "fp8_dynamic"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_an_unfinished_run_of_another_recipe_is_refused(tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_assemble", _raising)
        with pytest.raises(Killed):
            pipeline.run(job_for(tiny_folder, "fp8_dynamic"), out)
    with pytest.raises(UserError, match=r"out\.partial holds an unfinished run of another recipe"):
        pipeline.run(job_for(tiny_folder, "int8_dynamic"), out)
    pipeline.run(job_for(tiny_folder, "fp8_dynamic"), out)


def test_a_changed_model_is_another_run(tiny_folder, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    first = job_for(model, "fp8_dynamic").fingerprint()
    assert job_for(model, "fp8_dynamic").fingerprint() == first
    assert job_for(model, "fp8_dynamic", "evaluation.samples=3").fingerprint() == first
    assert job_for(model, "fp8_dynamic", "global.seed=3").fingerprint() != first
    assert job_for(model, "fp8_dynamic", "global.activation_budget=1").fingerprint() == first
    edit_json(model / "config.json", rms_norm_eps=1e-3)
    second = job_for(model, "fp8_dynamic").fingerprint()
    save_qwen3(model, seed=1)
    assert len({first, second, job_for(model, "fp8_dynamic").fingerprint()}) == 3


def test_changed_calibration_data_is_another_run(tiny_folder, tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("one " * 100)
    first = static_job(tiny_folder, file).fingerprint()
    assert static_job(tiny_folder, file).fingerprint() == first
    file.write_text("two " * 101)
    assert static_job(tiny_folder, file).fingerprint() != first


def test_a_file_size_limit_of_the_system_is_a_plain_error(tiny_folder, tmp_path):
    """The operating system refuses to write on, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"Writing to .*out\.partial failed \(.*too large"):
            pipeline.run(job_for(tiny_folder, "fp8_dynamic"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    pipeline.run(job_for(tiny_folder, "fp8_dynamic"), tmp_path / "out")


def test_a_full_disk_in_the_middle_keeps_the_work(tiny_folder, tmp_path, monkeypatch):
    out, original, calls = tmp_path / "out", UnitWriter.write, []

    def full(self, unit, tensors):
        calls.append(unit)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(self, unit, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "write", full)
        with pytest.raises(ResourceError, match=r"No space left on device.*continues where it stopped"):
            pipeline.run(job_for(tiny_folder, "fp8_dynamic"), out)
    assert not out.exists()
    assert len(list((tmp_path / "out.partial" / "units").glob("*.safetensors"))) == 1
    pipeline.run(job_for(tiny_folder, "fp8_dynamic"), out)


def test_shards_and_copied_files(tiny_folder, tmp_path):
    out = tmp_path / "out"
    pipeline.run(job_for(tiny_folder, "int8_dynamic", "global.max_shard_size=100KB"), out)
    assert (out / "model.safetensors.index.json").exists()
    assert len(list(out.glob("*.safetensors"))) > 2
    assert (out / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()


def test_what_is_not_quantized_is_copied_byte_for_byte(tiny_folder, tmp_path):
    pipeline.run(
        job_for(tiny_folder, "int4_rtn", "compression.quantization.ignore_layers=[down_proj]"),
        tmp_path / "out",
    )
    before, after = (
        load_file(tiny_folder / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    same = [name for name in before if name in after and before[name].dtype == after[name].dtype]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"} <= set(
        same
    )
    assert all(torch.equal(before[name], after[name]) for name in same)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.down_proj" in ignored and "lm_head" in ignored


def test_routers_are_kept_from_engines_that_build_them_as_linears(tmp_path):

    save_random("qwen3_moe", tmp_path / "model")
    pipeline.run(job_for(tmp_path / "model", "fp8_dynamic"), tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"model.layers.{i}.mlp.gate" for i in (0, 1)} <= set(ignored)
    assert not [name for name in ignored if "experts" in name]


def test_a_tokenizer_of_another_model_is_noticed(tiny_folder, texts, tmp_path):
    save_qwen3(tmp_path / "model", vocab_size=40)
    with pytest.raises(UserError, match="ids beyond the model's vocabulary"):
        pipeline.run(static_job(tmp_path / "model", texts), tmp_path / "out")


def test_a_failed_measurement_keeps_the_work(tiny_folder, tmp_path, monkeypatch):
    text = ("evaluation.enabled=true", f"evaluation.perplexity={_text(tmp_path)}")

    def fails(*_args):
        raise ModelError("Cannot be measured.")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "measure", fails)
        with pytest.raises(ModelError, match="Cannot be measured"):
            pipeline.run(job_for(tiny_folder, "fp8_dynamic", *text), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    pipeline.run(
        job_for(tiny_folder, "fp8_dynamic"), tmp_path / "out"
    )  # measurements are no part of the result


def test_a_model_without_a_tokenizer_is_compressed_and_not_measured(tmp_path):
    qwen3().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    record = pipeline.run(
        job_for(tmp_path / "model", "fp8_dynamic", "evaluation.enabled=true"), tmp_path / "out"
    )
    assert record.before == record.after == []


def test_the_current_folder_can_be_the_output(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pipeline.run(job_for(tiny_folder, "fp8_dynamic"), Path())
    assert (tmp_path / "here" / "config.json").exists()


def test_missing_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="no usable tokenizer"):
        pipeline.tokenizer_of(tmp_path)


def test_evaluation_before_and_after(tmp_path):
    record = pipeline.run(
        job_for(
            save_qwen3(tmp_path / "model"),
            "fp8_dynamic",
            "evaluation.enabled=true",
            f"evaluation.perplexity={_text(tmp_path)}",
        ),
        tmp_path / "out",
    )
    before, after = ({score.metric: score.value for score in side} for side in (record.before, record.after))
    assert before["perplexity"] > 1 and after["perplexity"] == pytest.approx(before["perplexity"], rel=0.05)
    assert before["perplexity"] != after["perplexity"]


def _text(folder: Path) -> Path:
    file = folder / "text.txt"
    write_atomically(file, b"Some words to measure. " * 20)
    return file
