"""The Hopper kernel: what it takes and what it leaves to others; on such a GPU, its numbers against the reference."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from angelslim.kernels.attention import dense, hopper, triton_flash
from angelslim.kernels.attention.base import Case
from angelslim.kernels.attention.blocks import BlockPlan

CASE = Case(torch.device("cuda"), torch.bfloat16, 128, 128, 128, 128)
HOPPER = torch.cuda.is_available() and hopper.refuses(CASE) == ""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A Hopper GPU and a Triton that works, as far as anything asks."""
    answers: dict[str, object] = {"capability": (9, 0), "version": "3.6.0", "triton": object(), "doubt": ""}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: answers["capability"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: answers["version"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: answers["triton"])
    monkeypatch.setattr(hopper, "_doubt", lambda device: answers["doubt"])
    return answers


def test_the_common_case_of_prompts_is_taken(gpu: dict[str, object]) -> None:
    assert hopper.refuses(CASE) == ""


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"device": torch.device("cpu")}, "capability"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 64}, "head dimension"),
        ({"value_dim": 64}, "head dimension"),
        ({"block_k": 64}, "block"),
    ],
)
def test_other_cases_are_refused(gpu: dict[str, object], change: dict[str, object], word: str) -> None:
    assert word in hopper.refuses(replace(CASE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "answer", "word"),
    [
        ("capability", (10, 0), "capability"),
        ("version", "4.0.0", "4.0.0"),
        ("triton", None, "not installed"),
        ("doubt", "wrong", "wrong"),
    ],
)
def test_other_places_are_refused(gpu: dict[str, object], name: str, answer: object, word: str) -> None:
    gpu[name] = answer
    assert word in hopper.refuses(CASE)


def outcome(monkeypatch: pytest.MonkeyPatch, run: Callable[..., torch.Tensor]) -> str:
    monkeypatch.setattr(hopper, "run", run)
    hopper._doubt.cache_clear()
    found = hopper._doubt(torch.device("cpu"))
    hopper._doubt.cache_clear()
    return found


def test_a_build_that_fails_or_errs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    assert outcome(monkeypatch, dense.run) == ""
    assert "compile" in outcome(monkeypatch, broken)
    assert "wrong" in outcome(monkeypatch, lambda *given, **named: dense.run(*given, **named) * 1.1)


def tensors(length: int, room: int = 0, batch: int = 1) -> tuple[torch.Tensor, ...]:
    q = torch.randn(batch, length, 4, 128, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(batch, 2, length + room, 128, dtype=torch.bfloat16)[:, :, :length] for _ in range(2))
    return q, k, v


def test_what_lies_after_a_short_block_has_to_be_numbers() -> None:
    assert hopper.copies(*tensors(200)) is not None
    assert hopper.copies(*tensors(256, room=40)) is not None
    assert hopper.copies(*tensors(200, room=40)) is None
    assert hopper.copies(*tensors(200, batch=2)) is not None


@pytest.mark.parametrize("why", ["padding", "offset", "memory"])
def test_the_rest_goes_to_the_triton_kernel(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(triton_flash, "run", lambda *a, **named: given.append((a, named)))
    q, k, v = tensors(256 if why != "memory" else 200, room=0 if why != "memory" else 40)
    offset = 100 if why == "offset" else 0
    plan = BlockPlan.full(block_q=128, block_k=128, q_offset=offset, kv_len=k.shape[2])
    start = torch.tensor([3]) if why == "padding" else None
    hopper.run(q[:, :, offset:], k, v, plan, scaling=0.1, kv_start=start)
    assert given


if HOPPER:

    @pytest.mark.parametrize(
        ("length", "offset", "batch"), [(1024, 0, 1), (1000, 0, 2), (1100, 256, 1), (70, 0, 1), (6200, 0, 1)]
    )
    def test_it_is_attention_over_the_listed_tokens(length: int, offset: int, batch: int) -> None:
        q, k, v = (x.cuda() for x in tensors(length, batch=batch))
        rows, columns = -(-(length - offset) // 128), -(-length // 128)
        mask = torch.rand(batch, 4, rows, columns, device="cuda") < 0.4
        own = torch.arange(rows, device="cuda")[:, None] + offset // 128
        column = torch.arange(columns, device="cuda")
        mask = (mask & (column <= own)) | (column == own)
        mask[:, 1, rows // 2] = False  # a row may read nothing
        plan = BlockPlan.from_mask(mask, block_q=128, block_k=128, q_offset=offset, kv_len=length)
        q = q[:, :, offset:]
        for stages in (2, 3):
            out = hopper.run(q, k, v, plan, scaling=0.1, stages=stages)
            expected = dense.run(q.float(), k.float(), v.float(), plan, scaling=0.1)
            torch.testing.assert_close(out.float(), expected, rtol=1.6e-2, atol=1.6e-2)
