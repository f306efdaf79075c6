"""The choice of a kernel follows from what the case needs, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from angelslim.base.errors import ConfigError
from angelslim.kernels.attention.base import Case
from angelslim.kernels.attention.choose import KERNELS, choose

CASE = Case(torch.device("cpu"), torch.float32, 64, 64, 128, 128)


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the kernels answer; empty: they can."""
    answers = dict.fromkeys(KERNELS, "")
    for name, kernel in KERNELS.items():
        changed = replace(kernel, refuses=lambda case, name=name: answers[name])
        monkeypatch.setitem(KERNELS, name, changed)
    return answers


def test_the_fastest_that_can(refusals: dict[str, str]) -> None:
    assert choose(CASE)[0].name == "hopper"
    refusals["hopper"] = "no Hopper"
    assert choose(CASE)[0].name == "triton"
    refusals["triton"] = "no GPU"
    kernel, why = choose(CASE)
    assert (kernel.name, why) == ("flex", "no Hopper; no GPU")
    refusals["flex"] = "no compiler"
    kernel, why = choose(CASE)
    assert (kernel.name, why) == ("dense", "no Hopper; no GPU; no compiler")


def test_a_named_kernel_runs_or_says_why_not(refusals: dict[str, str]) -> None:
    assert choose(CASE, "dense")[0].name == "dense"
    refusals["flex"] = "no compiler"
    with pytest.raises(ConfigError, match="no compiler"):
        choose(CASE, "flex")
    with pytest.raises(ConfigError, match="Did you mean 'flex'"):
        choose(CASE, "flexx")


def test_the_reference_takes_everything() -> None:
    assert choose(replace(CASE, dtype=torch.float64, head_dim=7))[0].name == "dense"
