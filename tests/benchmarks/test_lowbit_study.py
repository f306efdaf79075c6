"""The low-bit study: its plan, its corpus, its queue, its figures, and one small study from end to end."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_run_comes_after_all_that_it_needs() -> None:
    from lowbit.study import STUDIES, runs_of

    seen: set[str] = set()
    for run in runs_of(STUDIES["full"]):
        assert set(run.needs) <= seen, run
        assert run.name not in seen
        seen.add(run.name)


def test_every_method_has_equal_trials_and_three_seeds() -> None:
    from lowbit.study import RATES, SEEDS, STUDIES, TRAINED, runs_of

    runs = runs_of(STUDIES["full"])
    for method in TRAINED:
        trials = [run for run in runs if run.kind == "trial" and run.method == method.name]
        assert [run.rate for run in trials] == list(RATES)
        assert {run.steps for run in trials} == {STUDIES["full"].trial_steps}
        finals = [run for run in runs if run.kind == "final" and run.method == method.name]
        assert [run.seed for run in finals] == list(SEEDS)
        assert {run.steps for run in finals} == {STUDIES["full"].steps}


def test_the_dense_model_has_the_bytes_of_the_two_bit_model() -> None:
    from lowbit.study import STUDIES

    for study in STUDIES.values():
        two_bits = study.shape.bytes(2 + 16 / study.shape.hidden)
        assert two_bits == pytest.approx(study.dense.bytes(16), rel=0.02)


def test_the_rate_is_the_best_on_dev_and_a_diverged_trial_never_is() -> None:
    from lowbit.study import best_rate, trial_name

    rows = {trial_name("twn", 3e-4): {"dev": 2.0}, trial_name("twn", 1e-3): {"dev": 1.5}}
    rows[trial_name("twn", 3e-3)] = {"diverged": "the loss is nan"}  # type: ignore[dict-item]
    assert best_rate("twn", rows.get) == 1e-3


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 small files, two of them the same, one a table."""
    root = tmp_path_factory.mktemp("packages")
    for number in range(120):
        words = " ".join(f"name{(number * 7 + k * k) % 50} = value({k})" for k in range(6))
        (root / f"file{number}.py").write_text(f"{words}\n" * 20)
    (root / "copy.py").write_text((root / "file0.py").read_text())
    (root / "table.txt").write_text("1 " * 50_000)
    return root


def test_no_content_is_in_two_splits_and_tables_are_left_out(packages: Path) -> None:
    from lowbit.corpus import documents, files_of

    found = list(documents(files_of([packages])))
    texts = [text for _, text in found]
    assert len(texts) == len(set(texts))
    assert not any(text.startswith("1 1") for text in texts)
    assert {split for split, _ in found} == {"train", "dev", "test"}
    assert found == list(documents(files_of([packages])))


def test_a_pass_over_the_batches_reads_every_row_once() -> None:
    from lowbit.corpus import Batches

    rows = torch.arange(12)[:, None].expand(12, 3).int()
    batches = Batches(rows, 4, seed=1)
    passes = [torch.cat([batches(i)["input_ids"][:, 0] for i in range(start, start + 3)]) for start in (0, 3)]
    assert all(sorted(ids.tolist()) == list(range(12)) for ids in passes)
    assert not torch.equal(passes[0], passes[1])
    assert torch.equal(Batches(rows, 4, seed=1)(4)["input_ids"], batches(4)["input_ids"])


def test_a_run_has_one_owner_and_a_dead_owner_gives_it_back(tmp_path: Path) -> None:
    from lowbit.board import Board

    board = Board(tmp_path)
    code = (
        "import sys, fcntl, os\nhandle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\nprint('mine', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "locks" / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    with board.claim("a") as mine:
        assert not mine
    other.kill()
    other.wait()
    with board.claim("a") as mine:
        assert mine
    board.post("a", {"dev": 1.0})
    with board.claim("a") as mine:
        assert not mine, "it is done"


def test_the_effective_rank_counts_equal_directions() -> None:
    from lowbit.mechanisms import effective_rank

    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator))
    assert effective_rank(basis[:, :5] @ basis[:8, :5].T.new_ones(5, 5)) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(basis[:, :5]) == pytest.approx(5.0, abs=1e-3)
    matrix = torch.randn(30, 6, generator=generator)
    shares = torch.linalg.svdvals(matrix.double())
    shares = shares / shares.sum()
    assert effective_rank(matrix) == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-4)


def test_transitions_count_what_left_zero_and_which_fours_changed() -> None:
    from lowbit.mechanisms import transitions

    before = torch.tensor([[0, 1, -1, 1, 1, 0, 1, 1]], dtype=torch.int8)
    now = torch.tensor([[1, 0, -1, 1, -1, 0, 1, 1]], dtype=torch.int8)
    weights, zeros, was, escaped, changed, fours, stayed = transitions(before, now, before == 0).tolist()
    assert (weights, zeros, was, escaped, changed, fours, stayed) == (8, 2, 2, 1, 3, 1, 1)


def test_fused_norms_compute_what_the_model_computes() -> None:
    from transformers import LlamaForCausalLM

    from lowbit.model import build
    from lowbit.study import Shape

    fused = build(Shape(128, 2, 128), 16, seed=0)
    plain = LlamaForCausalLM(fused.config)
    plain.load_state_dict(fused.state_dict())
    ids = torch.arange(32).view(2, 16)
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits)


def test_differences_are_paired_by_seed() -> None:
    from lowbit.summary import difference

    found = difference({0: 1.0, 1: 2.0, 2: 5.0}, {0: 0.5, 1: 1.0})
    assert found is not None and found["each"] == [0.5, 1.0]
    assert found["mean"] == 0.75 and found["sd"] == pytest.approx(math.sqrt(0.125))
    assert difference({0: 1.0}, {1: 1.0}) is None


@pytest.fixture(scope="module")
def rows(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A study of a model of one block, from the corpus to the last row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from lowbit import corpus
        from lowbit.board import Board
        from lowbit.runs import Bench, perform
        from lowbit.speed import measure
        from lowbit.study import STUDIES, Shape, runs_of

        folder = tmp_path_factory.mktemp("study")
        study = replace(
            STUDIES["small"],
            shape=Shape(128, 1, 128),
            dense=Shape(64, 1, 64),
            length=16,
            rows=2,
            steps=4,
            base_steps=6,
            train_tokens=6_000,
            held_tokens=200,
        )
        corpus.prepare(study, folder / "data", [packages])
        board = Board(folder)
        bench = Bench(study, corpus.load(folder / "data", study, "cpu"), board, "cpu")
        for run in runs_of(
            study, (0,), ("fp", "tequila_1e-1", "sherry_cosine", "rtn_2bit", "dense", "int4_rtn")
        ):
            assert board.ready(run)
            board.post(run.name, perform(bench, run))
        board.post("speed", measure(bench, ("seq2",), rounds=2))
        yield study, board.rows()


def test_a_cut_measurement_of_speed_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from lowbit import speed
    from lowbit.runs import Bench
    from lowbit.study import STUDIES

    monkeypatch.setattr(speed, "peak_memory", lambda _bench, _method: 100)
    monkeypatch.setattr(speed, "compare", lambda bench, _method, _rounds: {"ratio": bench.study.shape.hidden})
    bench, posted = Bench(STUDIES["full"], cast(Any, None), cast(Any, None), "cuda"), []

    def post(row: dict[str, Any]) -> None:
        posted.append(json.loads(json.dumps(row)))
        if len(posted) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(speed, "WIDE_SPEED", ("twn",))
    with pytest.raises(KeyboardInterrupt):
        speed.measure(bench, ("seq2", "twn"), post=post)
    assert [(list(row["wide"]["methods"]), list(row["methods"])) for row in posted] == [
        (["fp"], []),
        (["fp", "twn"], []),
        (["fp", "twn"], ["fp"]),
        (["fp", "twn"], ["fp", "seq2"]),
    ], "wide layers first, and every method at once"
    assert posted[-1]["wide"]["methods"]["twn"]["ratio"] == speed.WIDE.hidden
    left = iter([1.0, 0.0, 0.0])
    deadline = cast(Any, SimpleNamespace(left=lambda: next(left)))
    assert list(speed.measure(bench, post=lambda _row: None, deadline=deadline)["wide"]["methods"]) == ["fp"]


def test_a_small_study_runs_from_end_to_end(rows: tuple[Any, dict[str, Any]]) -> None:
    from lowbit.summary import tables, whole

    study, found = rows
    raw, bars = whole(study, found)
    methods = {row["method"]: row for row in raw["methods"]}
    assert set(methods) == {"fp", "tequila_1e-1", "sherry_cosine", "rtn_2bit", "dense", "int4_rtn"}
    assert all(math.isfinite(row["test"]["mean"]) for row in methods.values())
    assert methods["sherry_cosine"]["bits"] == pytest.approx(1.25 + 16 / 128)
    assert methods["tequila_1e-1"]["bits"] == pytest.approx(1.585 + 16 / 128 + 16 / 128, abs=1e-3)
    assert methods["fp"]["gap_to_full_precision"]["mean"] == 0
    assert "without_bias_minus_with" in methods["tequila_1e-1"]
    assert methods["sherry_cosine"]["mechanism"]["last"]["zeros"] == 0.25
    assert "Tequila" in tables(raw["methods"])
    assert all({"name", "value", "goal", "holds"} == bar.keys() for bar in bars)
    assert raw["speed"]["speed"]["methods"]["seq2"]["ratio"] > 0
    assert any("step time" in bar["name"] for bar in bars)
    json.dumps(raw, allow_nan=False)


def test_a_final_run_takes_the_rate_that_its_trials_chose(rows: tuple[Any, dict[str, Any]]) -> None:
    _, found = rows
    again = found["final-sherry_cosine-s0"]
    assert again["rate"] in (3e-4, 1e-3, 3e-3)
    trials = {row["rate"]: row["dev"] for name, row in found.items() if name.startswith("trial-sherry")}
    assert again["rate"] == min(trials, key=lambda rate: trials[rate])


def test_runs_of_another_base_stay_and_are_paired_with_their_own(tmp_path: Path) -> None:
    from lowbit import earlier
    from lowbit.summary import difference, finals

    def final(method: str, seed: int, test: float, base: str) -> dict[str, Any]:
        return {"kind": "final", "method": method, "seed": seed, "test": test, "base": base, "corpus": "c"}

    old = {"base": {"kind": "base", "method": "base"}, "trial-twn-0.001": {"kind": "trial", "method": "twn"}}
    old |= {"final-fp-s0": final("fp", 0, 2.0, "x"), "final-twn-s0": final("twn", 0, 2.5, "x")}
    for row in old.values():
        row.pop("base", None)
        row["corpus"] = "c"
    setting = {"size": "full", "tokens_a_step": 8, "steps": {}, "model": {}}
    path = tmp_path / "lowbit_quality.json"
    path.write_text(
        json.dumps({"raw": {"setting": setting, "rows": old, "speed": {"speed": {"kind": "speed"}}}})
    )
    held, why = earlier.read(path, setting, "c")
    assert not why and held["final-twn-s0"]["base"] == earlier.FIRST
    assert earlier.read(path, setting, "d") == ({}, "its corpus is c, this one's d")
    assert earlier.read(path, {**setting, "size": "small"}, "c")[1] == "its size is full"
    new = {"base": {"kind": "base", "method": "base", "base": "b2"}, "speed": {"kind": "speed", "ratio": 1}}
    new |= {"final-fp-s0": final("fp", 0, 3.0, "b2"), "final-twn-s0": final("twn", 0, 3.7, "b2")}
    rows = earlier.together(held, new)
    assert rows["speed"] == new["speed"] and set(earlier.tried(held)) == {"trial-twn-0.001"}
    gap = difference(finals(rows, "twn"), finals(rows, "fp"))
    assert gap is not None and sorted(gap["each"]) == pytest.approx([0.5, 0.7])
    assert earlier.together(rows, new) == rows, "the same again changes nothing"
    assert earlier.finished(held) == {"trial-twn-0.001", "final-twn-s0"}


def test_findings_hold_what_was_seen_and_what_a_run_rests_on(rows: tuple[Any, dict[str, Any]]) -> None:
    from lowbit.findings import findings_of

    found = findings_of(rows[1])
    answers = {name: row for each in found["questions"] for name, row in each["methods"].items()}
    assert answers["tequila_1e-1"]["means"]["pull"] > 0
    assert answers["sherry_cosine"]["to_unlearn"]["curve"][-1][1] == pytest.approx(0.0, abs=1e-6)
    assert {"fp", "tequila_1e-1", "sherry_cosine"} == set(found["gaps"])
    assert findings_of({}) == {}


def test_pull_is_the_bias_share_of_the_gradient() -> None:
    from angelslim.methods.base import QAT
    from angelslim.methods.qat.base import attach, master_weight
    from lowbit.mechanisms import pull

    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 4, bias=False)
    attach(layer, QAT.get("tequila")({"lambda": 0.5}))
    x, grad = torch.randn(6, 128), torch.randn(6, 4)
    layer(x).backward(grad)
    weight = master_weight(layer)
    dead = (weight.abs() < weight.abs().mean(1, keepdim=True) / 2).double()
    through = 0.5 * grad.double().sum(0)[:, None] * dead
    whole = (grad.double().T @ x.double()) * dead + through
    quantizer = layer.parametrizations.weight[0]
    found = pull(layer, quantizer, grad.sum(0))
    assert found == pytest.approx(float(through.norm() / whole.norm()), rel=1e-4)
