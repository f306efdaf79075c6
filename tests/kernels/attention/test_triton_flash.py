"""The Triton kernel against attention written token by token: on a GPU if there is one, else interpreted.

Where Triton is not installed, the cases that run it are not collected, and what is tested is that it says so. Triton's
interpreter knows no bfloat16, so that dtype is compared on GPUs alone.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from angelslim.kernels.attention import triton_flash
from angelslim.kernels.attention.base import Case

from .cases import DEVICE, GPU, PADDED, SHAPES, WIDE, make, oracle

INSTALLED = importlib.util.find_spec("triton") is not None
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ALL = {**SHAPES, **PADDED, **WIDE}
RUNS = [(name, torch.float32) for name in ALL] + [("64 wide", torch.float16), ("128 wide", torch.float16)]
RUNS += [(name, torch.bfloat16) for name in ALL] if GPU else []


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> object:
    """Triton reads the variable when the kernel's module is imported."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


if INSTALLED:

    @pytest.mark.parametrize(("name", "dtype"), RUNS)
    def test_it_is_attention_over_the_listed_tokens(name: str, dtype: torch.dtype) -> None:
        case = make(ALL[name], dtype)
        assert triton_flash.refuses(Case.of(case.q, case.v, case.plan.block_q)) == ""
        out = triton_flash.run(
            case.q, case.k, case.v, case.plan, scaling=0.15, kv_start=case.start, kv_stop=case.stop
        )
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.double().cpu(), oracle(case, 0.15), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )

    @pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 32), (32, 32)])
    def test_blocks_in_tiles(tiles: tuple[int, int]) -> None:
        case = make(WIDE["64 wide"], torch.float32)
        cut = triton_flash.Tiles(*tiles, warps=4, stages=2)
        out = triton_flash.run(case.q, case.k, case.v, case.plan, scaling=0.15, tiles=cut)
        torch.testing.assert_close(out.double().cpu(), oracle(case, 0.15), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "word"),
    [
        (Case(torch.device("cpu"), torch.float32, 64, 64, 128, 128), "CUDA"),
        (Case(DEVICE, torch.float64, 64, 64, 128, 128), "float64"),
        (Case(DEVICE, torch.float32, 192, 128, 128, 128), "192"),
        (Case(DEVICE, torch.float32, 64, 64, 96, 96), "96"),
        (Case(DEVICE, torch.float32, 512, 512, 64, 64), "256"),
    ],
)
def test_it_says_what_it_cannot_do(case: Case, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if word == "CUDA":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert word in triton_flash.refuses(case)


def test_it_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton_flash.refuses(Case(DEVICE, torch.float32, 64, 64, 128, 128))
