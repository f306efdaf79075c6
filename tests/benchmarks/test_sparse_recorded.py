"""The bars of the recorded speeds follow from their raw rows, and name the baseline that each is measured against."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> None:
    sys.path.insert(0, str(BENCHMARKS))


def recorded(name: str) -> Any:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def row(layers: str, dense: float, speedup: float) -> dict[str, Any]:
    return {"kind": "ttft", "name": "stem", "density": 0.1, "length": 32768, "layers": layers,
            "dense_ms": dense, "speedup": speedup, "attention_speedup": 6.0}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recorded_bars_of_one_layer_are_those_of_the_rows(device: str) -> None:
    found = recorded(f"sparse_speed_{device}")
    assert found["bars"] == importlib.import_module("sparse_speed").bars(found["raw"], device)
    assert found["bars"]


def test_recorded_bars_of_the_first_token_are_those_of_the_rows() -> None:
    found = recorded("sparse_ttft")
    assert found["bars"] == importlib.import_module("sparse_ttft").bars(found["raw"])
    assert found["bars"]


def test_layers_with_a_slower_dense_attention_are_an_addition_held_to_the_same_goal() -> None:
    ttft = importlib.import_module("sparse_ttft")
    found = ttft.bars([row("eager", 1500.0, 1.4), row("compiled", 1300.0, 1.6)])
    assert [bar["name"].startswith(ttft.ADDED) for bar in found] == [True, True, False, False]
    assert [bar["goal"] for bar in found] == [1.5, 5.5, 1.5, 5.5]
    assert [bar["holds"] for bar in found] == [False, True, True, True]
    assert "fastest dense" in found[2]["name"]


def test_a_run_of_one_kind_of_layers_has_its_own_baseline() -> None:
    ttft = importlib.import_module("sparse_ttft")
    assert not any(bar["name"].startswith(ttft.ADDED) for bar in ttft.bars([row("eager", 1500.0, 1.4)]))
