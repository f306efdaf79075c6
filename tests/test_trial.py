"""Searched input scales on trial against plain ones: the verdict of a plain forward pass, and what is written then."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from angelslim import pipeline
from angelslim.data.text import calibration_batches
from angelslim.export._checkpoint import open_quantized
from angelslim.lab.outliers import plant_outliers
from angelslim.methods.ptq.lepto import LeptoQuant
from angelslim.models.loading import load_config, open_model
from angelslim.report.record import RunRecord
from angelslim.trial import Verdict, try_scales
from families import save_random
from tiny import byte_tokenizer, fingerprints, job_for

CPU = torch.device("cpu")
SHORT = ("dataset.num_samples=6", "dataset.max_seq_length=48", "evaluation.enabled=false")
SWITCHES = "compression.quantization.quant_method"
EAGER, AS_FOUND = f"{SWITCHES}.lepto_margin=0", f"{SWITCHES}.lepto_accept=none"


def test_only_a_smaller_divergence_is_accepted():
    assert Verdict(0.1, 0.2).accepted and not Verdict(0.2, 0.1).accepted and not Verdict(0.1, 0.1).accepted
    assert Verdict(0.1, 0.2).to_dict() == {
        "searched_kl": 0.1, "plain_kl": 0.2, "seen": 1.0, "accepted": True,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------- the verdict


def rounded(scale: float, _module, args):
    """What an engine does to the input of a linear, written out."""
    return ((args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)


def divergence(model, tensors, scales: dict[str, float], ids) -> float:
    """KL of the model with decoded weights and rounded inputs from the one as it is, all blocks in one forward pass."""
    with torch.no_grad(), ExitStack() as stack:
        wanted = [model(input_ids=each).logits.double().log_softmax(-1) for each in ids]
        for name, scale in scales.items():
            module = model.get_submodule(name)
            codes, factor = tensors[f"{name}.weight"].float(), tensors[f"{name}.weight_scale"].float()
            stack.callback(partial(module.weight.data.copy_, module.weight.data.clone()))
            module.weight.data.copy_(codes * factor)
            stack.callback(module.register_forward_pre_hook(partial(rounded, scale)).remove)
        found = [model(input_ids=each).logits.double().log_softmax(-1) for each in ids]
    lost = [(p.exp() * (p - q)).sum() for p, q in zip(wanted, found, strict=True)]
    return float(sum(lost)) / sum(each.shape[1] for each in ids)


@pytest.fixture(scope="module")
def static(tiny_folder, texts, tmp_path_factory):
    """The tiny model in static FP8: its folder, tensors, input scales, and the calibration samples."""
    folder = tmp_path_factory.mktemp("static") / "out"
    record = pipeline.run(job_for(tiny_folder, "fp8_static", *SHORT, f"dataset.data_path={texts}"), folder)
    ids = calibration_batches(
        pipeline.tokenizer_of(tiny_folder), str(texts), samples=6, max_length=48, seed=0
    )
    scales = {layer.name: layer.input_scale for layer in record.layers}
    return folder, load_file(folder / "model.safetensors"), scales, ids


@pytest.mark.parametrize("factor", [0.05, 65536.0])
def test_both_divergences_are_those_of_the_whole_models(factor, static, tiny_folder, tmp_path):
    """Scales that clip, scales that lose small values; the plain ones differ from the second block on only."""
    folder, tensors, scales, ids = static
    other = {name: scale * factor for name, scale in scales.items() if ".layers.1." in name}
    checkpoint = open_quantized(folder, load_config(folder, False))
    checkpoint.dtype = torch.float32
    given = {name: torch.tensor([[scale]]) for name, scale in other.items()}
    found = try_scales(open_model(tiny_folder), checkpoint, given, ids, tmp_path, 1 << 30, CPU)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    assert found.searched == pytest.approx(divergence(model, tensors, scales, ids), rel=1e-3)
    assert found.plain == pytest.approx(divergence(model, tensors, scales | other, ids), rel=1e-3)
    assert found.accepted and found.plain > 1.2 * found.searched and found.seen == 1


def test_scales_that_lose_the_first_look_get_no_second(static, tiny_folder, tmp_path):
    folder, tensors, scales, ids = static
    checkpoint = open_quantized(folder, load_config(folder, False))
    checkpoint.dtype = torch.float32
    given = {name: torch.tensor([[scale]]) for name, scale in scales.items()}
    lost = try_scales(open_model(tiny_folder), checkpoint, given, ids, tmp_path, 1 << 30, CPU)
    assert not lost.accepted and lost.seen == pytest.approx(2 / 6)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    assert lost.searched == pytest.approx(divergence(model, tensors, scales, ids[:2]), rel=1e-3)


# ---------------------------------------------------------------------------------------------- whole runs


def coarse(_self, _block, operator, _samples, _original, error):
    """Stands in for a search that chose badly: inputs below a hundredth of the largest one are lost."""
    operator.scale, operator.choice = operator.plain * 65536, "coarse"
    return error * 0.5


def test_plain_scales_are_written_where_the_searched_ones_lose(tiny_folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(LeptoQuant, "_decide", coarse)
    words, records = (*SHORT, EAGER, f"dataset.data_path={texts}"), {}
    for name, recipe, extra in (
        ("plain", "fp8_static", ()), ("guarded", "fp8_lepto", (EAGER,)), ("found", "fp8_lepto", (EAGER, AS_FOUND)),
    ):  # fmt: skip
        words = (*SHORT, *extra, f"dataset.data_path={texts}")
        records[name] = pipeline.run(job_for(tiny_folder, recipe, *words), tmp_path / name)
    plain, guarded, found = (load_file(tmp_path / name / "model.safetensors") for name in records)
    assert guarded.keys() == plain.keys()
    assert all(torch.equal(guarded[name].float(), plain[name].float()) for name in plain)
    assert any(not torch.equal(found[name].float(), plain[name].float()) for name in plain)
    trial = RunRecord.load(tmp_path / "guarded").trial
    assert "the plain ones: calibration KL" in (tmp_path / "guarded" / "report.html").read_text()
    assert trial is not None and trial["accepted"] is False and trial["searched_kl"] > trial["plain_kl"]
    for layer, other in zip(records["guarded"].layers, records["plain"].layers, strict=True):
        assert layer.input_scale == other.input_scale and layer.activations == other.activations
    assert any("coarse was not accepted" in layer.choice for layer in records["guarded"].layers)
    assert records["plain"].trial is None and records["found"].trial is None


def test_searched_scales_are_written_where_they_win(tiny_folder, texts, tmp_path):
    """Outliers sixteen thousand times the rest: with scales that clip them less is lost."""
    folder = plant_outliers(tiny_folder, tmp_path / "model", factor=2.0**16)
    words = (*SHORT, EAGER, f"dataset.data_path={texts}")
    record = pipeline.run(job_for(folder, "fp8_lepto_extended", *words), tmp_path / "guarded")
    assert record.trial["accepted"] is True and record.trial["searched_kl"] < record.trial["plain_kl"]
    pipeline.run(job_for(folder, "fp8_lepto_extended", *words, AS_FOUND), tmp_path / "found")
    assert fingerprints(tmp_path / "guarded") == fingerprints(tmp_path / "found")
    assert any(not layer.choice.startswith("alpha 0,") for layer in record.layers)


def test_streamed_experts_are_on_trial_too(tmp_path, monkeypatch):
    save_random("qwen3_moe", tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text(
        '{"text": "!!#$%&!!!\'(!!!"}\n' * 2
    )  # ids below the vocabulary of 96
    monkeypatch.setattr(LeptoQuant, "_decide", coarse)
    words = (*SHORT, f"dataset.data_path={tmp_path / 'texts.jsonl'}")
    record = pipeline.run(job_for(tmp_path / "model", "fp8_lepto_extended", *words, EAGER), tmp_path / "out")
    pipeline.run(job_for(tmp_path / "model", "fp8_static", *words), tmp_path / "plain")
    assert record.trial is not None and not record.trial["accepted"]
    guarded, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert all(torch.equal(guarded[name].float(), plain[name].float()) for name in plain)


def test_a_run_that_was_killed_during_its_trial_is_continued(tiny_folder, texts, tmp_path, monkeypatch):
    """Killed before the verdict, and killed after some units were changed: the result is the same."""
    from angelslim import work

    monkeypatch.setattr(LeptoQuant, "_decide", coarse)
    words = (*SHORT, EAGER, f"dataset.data_path={texts}")
    pipeline.run(job_for(tiny_folder, "fp8_lepto", *words), tmp_path / "whole")

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(work, "try_scales", killed)
        pipeline.run(job_for(tiny_folder, "fp8_lepto", *words), tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(work.UnitWriter, "finish", killed)
        pipeline.run(job_for(tiny_folder, "fp8_lepto", *words), tmp_path / "out")
    verdict = json.loads((tmp_path / "out.partial" / "trial.json").read_text())
    assert verdict["searched"] > verdict["plain"]
    pipeline.run(job_for(tiny_folder, "fp8_lepto", *words), tmp_path / "out")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
