"""The benchmarks' model is made by the same stages as the built-in one, at its own size."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from angelslim.lab import bench_lm, tiny_lm
from angelslim.lab.bench_lm import build_model, shares_at, train_bench_lm
from angelslim.lab.curriculum import text_share
from angelslim.lab.tiny_lm import Plan


def test_its_size_is_what_the_benchmarks_say() -> None:
    model = build_model(0)
    assert sum(p.numel() for p in model.parameters()) == 33_564_160
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    widths = {m.in_features for m in model.modules() if hasattr(m, "in_features")}
    assert all(width % 128 == 0 for width in widths)


def test_it_reads_more_text_than_tiny_lm() -> None:
    assert all(0 < sum(shares_at(progress)) < 1 for progress in (0.0, 0.5, 1.0))
    assert text_share(shares_at) > 2 * text_share()


def test_training_leaves_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(3, steps=2, rows=2, length=32, lr=1e-3, bf16=False, compile=False)
    monkeypatch.setattr(bench_lm, "default_plan", lambda device, seed: plan)
    monkeypatch.setattr(bench_lm, "VOCABULARY", 512)
    monkeypatch.setattr(bench_lm, "build_model", tiny_lm.build_model)  # the full size takes a minute
    monkeypatch.setattr(tiny_lm, "CPU_MINUTES", None)
    monkeypatch.setattr(tiny_lm, "ALL_TEXT", 60_000)
    full = tiny_lm.measure_tiny_lm
    monkeypatch.setattr(
        tiny_lm, "measure_tiny_lm", lambda folder, count, device: full(folder, count=1, device=device)
    )
    record = train_bench_lm(tmp_path / "out", seed=3, device="cpu")
    assert record["model"] == "bench-lm" and record["steps"] == 2
    assert record == json.loads((tmp_path / "out" / "training.json").read_text("utf-8"))
    assert f"{record['parameters']:,} parameters" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 512
