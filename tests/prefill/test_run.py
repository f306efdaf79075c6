"""A whole run on a small model: what it leaves, what a user loads, what the command line and the page say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import angelslim
from angelslim.base.errors import ModelError, UserError
from angelslim.base.place import open_place
from angelslim.config.recipe import load
from angelslim.engine import carry_out, prepare_any
from angelslim.methods.sparse._patterns import read_patterns
from angelslim.methods.sparse.metadata import read
from angelslim.prefill.run import describe
from angelslim.report.prefill import PrefillRecord, facts, length_lines, prefill_html
from angelslim.report.record import RunRecord
from tiny import Outcome, save_qwen3

SMALL = {
    "kernel": "dense",
    "block": 16,
    "measure": {"lengths": [64, 256], "repeats": 3, "warmups": 0, "seconds": 0, "heads_length": 128},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("run") / "model", dtype=torch.float32)


def run(model: Path, out: Path, **sparsity: Any) -> PrefillRecord:
    values = {**SMALL, **sparsity}
    resolved = load({"compression": {"name": "Sparsity", "sparsity": values}})
    record = carry_out(prepare_any(resolved, model), out)
    assert isinstance(record, PrefillRecord)
    return record


@pytest.fixture(scope="module")
def done(model: Path) -> tuple[PrefillRecord, Path]:
    out = model.parent / "out"
    rules = [{"name": "dense", "layers": "0", "heads": "0"}]
    return run(model, out, name="union", density=0.4, rules=rules), out


def test_what_a_run_leaves(done: tuple[PrefillRecord, Path]) -> None:
    record, out = done
    names = {"run.json", "run.yaml", "report.html", "sparse_attention.json"}
    assert {path.name for path in out.iterdir()} == names
    assert not out.with_name("out.partial").exists()
    assert PrefillRecord.load(out) == record
    assert [row.tokens for row in record.lengths] == [64, 256]
    for row in record.lengths:
        assert row.calls == 2 and row.fallbacks == {} and row.repeats == 3
        assert row.dense_ms.low <= row.dense_ms.median <= row.dense_ms.high and row.sparse_ms.median > 0
        assert row.selector_ms > 0 and row.kernel_ms > 0 and row.density is not None
    assert [row.layer for row in record.heads] == [0, 1]
    assert record.heads[0].density[0] == 1.0 and record.heads[0].error[0] < 1e-5, (
        "the head that a rule keeps dense"
    )
    assert record.heads[1].density == pytest.approx([0.4] * 4, abs=0.02)
    assert all(0.4 < mass <= 1 for mass in record.heads[1].mass) and min(record.heads[1].error) > 0
    assert record.before[0].metric == "perplexity" and record.after[0].value != record.before[0].value
    assert record.crossover in (64, 256, 512) and record.versions["torch"] == torch.__version__


def test_the_unfinished_work_of_others_is_left_alone(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out.partial" / "1024-vt.json"
    open_place(kept.parent, "a suite", "other work", fix="Delete it.")
    kept.write_text("answers")
    with pytest.raises(UserError, match="unfinished work of another command"):
        run(model, tmp_path / "out", name="union")
    assert kept.read_text() == "answers"


def test_the_settings_are_used_again(done: tuple[PrefillRecord, Path], model: Path) -> None:
    record, out = done
    found = read(out)
    assert describe(found) == ["dense in layer 0, head 0", "union (density 0.4)"] == record.rules
    assert found.crossover == record.crossover and found.block == 16
    opened = angelslim.load(model)
    ids = torch.randint(3, 250, (1, 600), generator=torch.Generator().manual_seed(0))[:, :512]
    with angelslim.sparse_attention(opened, out) as attached, torch.no_grad():
        opened(ids)
    assert attached.total()["calls"] == 2
    again = load(out / "run.yaml")
    assert prepare_any(again).metadata.rules == found.rules  # type: ignore[union-attr]


def test_table_and_page(done: tuple[PrefillRecord, Path]) -> None:
    record, out = done
    page = (out / "report.html").read_text("utf-8")
    assert page == prefill_html(record) and page.count("<svg") == 4
    assert "mathdefault" not in page  # ticks are plain numbers: browsers set no formulas
    assert "head 3" in page and "http" not in page.replace("http://www.w3.org", "")
    assert [line[0] for line in length_lines(record)] == ["64", "256"]
    names = [name for name, _ in facts(record)]
    assert names == [
        "rules",
        "sparse from",
        "kernel",
        "density",
        "attention mass kept",
        "output error",
        "perplexity",
    ]
    bare = PrefillRecord.from_json(record.to_json())
    bare.lengths, bare.heads, bare.before, bare.after = [], [], [], []
    assert "<svg" not in prefill_html(bare)


def test_a_finished_result_and_a_foreign_folder(
    done: tuple[PrefillRecord, Path], model: Path, tmp_path: Path
) -> None:
    record, out = done
    rules = [{"name": "dense", "layers": "0", "heads": "0"}]
    assert run(model, out, name="union", density=0.4, rules=rules) == record
    with pytest.raises(UserError, match="already exists"):
        run(model, out, name="union", density=0.5)
    with pytest.raises(UserError, match="holds, the model"):
        run(model, model, name="union", density=0.5)
    with pytest.raises(ModelError):
        RunRecord.load(out)
    with pytest.raises(ModelError, match="no readable record"):
        PrefillRecord.load(tmp_path)


def test_heads_are_searched_and_travel_with_the_result(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads"
    record = run(model, out, name="minference", search_heads=True, density=0.5)
    found = read_patterns(out / "heads.json", {"num_hidden_layers": 2})
    assert [len(layer) for layer in found] == [4, 4]
    assert {head.kind for layer in found for head in layer} == {"vertical_and_slash"}
    assert all(0 < head.score <= 1 for layer in found for head in layer)
    assert record.rules == ["minference (density 0.5, patterns heads.json)"]
    moved = out.rename(tmp_path / "moved")
    with angelslim.sparse_attention(angelslim.load(model), moved, crossover=0):
        pass
    given = run(
        model, tmp_path / "given", name="minference", attn_kwargs={"pattern_path": str(moved / "heads.json")},
        measure={"enabled": False},
    )  # fmt: skip
    assert given.lengths == [] and given.crossover == "auto"
    assert (tmp_path / "given" / "heads.json").read_bytes() == (moved / "heads.json").read_bytes()


def test_a_set_crossover_stays_and_a_dense_model_is_said(model: Path, tmp_path: Path) -> None:
    record = run(
        model, tmp_path / "a", name="stem", crossover=128, measure={**SMALL["measure"], "lengths": [64]}
    )
    assert record.crossover == 128 == read(tmp_path / "a").crossover
    record = run(model, tmp_path / "b", name="dense")
    assert record.warnings == ["No layer was sparse: set dense."]
    assert record.fallbacks == {"set dense": 6}


def test_the_command_line(model: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "extends: sparse_union\ncompression: {sparsity: {kernel: dense, block: 16, density: 0.3}}\n"
        "evaluation: {enabled: false}\n"
    )
    small = ["compression.sparsity.measure.lengths=[64]", "compression.sparsity.measure.repeats=1"]
    planned = cli("plan", recipe, model, "--json", *small)
    assert json.loads(planned.out)["rules"] == ["union (density 0.3)"], planned.err
    assert "union" in cli("plan", recipe, model, *small).out
    ran = cli("run", recipe, model, "--out", tmp_path / "out", *small)
    assert ran.code == 0 and "times" in ran.out and "sparse_attention.json" in ran.out, ran.err
    text = tmp_path / "text.txt"
    text.write_text("a quick walk through the words of a small text " * 40)
    scored = cli("eval", model, "--text", text, "--attn", f"dense,{tmp_path / 'out'}", "--json")
    scores = json.loads(scored.out)
    assert len(scores) == 2, scored.err
    dense, sparse = scores.values()
    assert {score["metric"] for score in sparse} == {score["metric"] for score in dense}
    density = {score["metric"]: score["value"] for score in sparse}["attention density"]
    assert density < 0.6
    beside = tmp_path / "beside"
    beside.mkdir()
    for file in [*model.iterdir(), tmp_path / "out" / "sparse_attention.json"]:
        (beside / file.name).write_bytes(file.read_bytes())
    found = json.loads(cli("eval", beside, "--text", text, "--json").out)
    assert list(found) == [f"{beside} sparse"]
    assert cli("eval", model, "--attn", "stm").code == 2
    assert "Did you mean 'stem'" in cli("eval", model, "--attn", "stm").err
    assert "Name one" in cli("eval", model, "--density", "0.1").err
    assert "share of the causal area" in cli("eval", model, "--attn", "stem", "--density", "0").err


def test_the_python_face(model: Path, tmp_path: Path) -> None:
    result = angelslim.compress(
        str(model),
        {
            "compression": {
                "name": "Sparsity",
                "sparsity": {**SMALL, "name": "a_shape", "measure": {"enabled": False}},
            }
        },
        out=tmp_path / "face",
    )
    assert "sparse from auto" in repr(result)
    opened = result.load()
    assert opened.config._attn_implementation == "angelslim_sparse"
