"""FlexAttention, compiled, against attention written token by token."""

from __future__ import annotations

import pytest
import torch

from angelslim.kernels.attention import flex
from angelslim.kernels.attention.base import Case

from .cases import DEVICE, PADDED, SHAPES, make, oracle


@pytest.fixture(scope="module", autouse=True)
def one_graph_for_all_lengths() -> object:
    """Compile for any length at once, where a run would compile for the first two lengths and then for any."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_compiled", lambda: compiled)
        yield


@pytest.mark.parametrize(
    "name", [name for name in [*SHAPES, *PADDED] if "head" not in name and "one" not in name]
)
def test_it_is_attention_over_the_listed_tokens(name: str) -> None:
    case = make({**SHAPES, **PADDED}[name], torch.float32)
    assert flex.refuses(Case.of(case.q, case.v, 16)) == ""
    out = flex.run(case.q, case.k, case.v, case.plan, scaling=0.3, kv_start=case.start, kv_stop=case.stop)
    torch.testing.assert_close(out.double().cpu(), oracle(case, 0.3), rtol=1e-4, atol=1e-5)


def test_it_never_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of compilations PyTorch would compute something else without a word."""
    case = make(SHAPES["grouped"], torch.float32)
    flex.run(case.q, case.k, case.v, case.plan, scaling=0.3)
    monkeypatch.setattr(flex, "COMPILATIONS", 1)
    one = make(SHAPES["every head its keys"], torch.float32)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        flex.run(one.q, one.k, one.v, one.plan, scaling=0.3)


@pytest.mark.parametrize(
    ("device", "dtype", "word"),
    [("cpu", torch.float64, "float64"), ("meta", torch.float32, "meta")],
)
def test_it_says_what_it_cannot_do(device: str, dtype: torch.dtype, word: str) -> None:
    assert word in flex.refuses(Case(torch.device(device), dtype, 64, 64, 128, 128))


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    flex._missing_on_cpu.cache_clear()
    try:
        assert "compiler" in flex.refuses(Case(torch.device("cpu"), torch.float32, 64, 64, 128, 128))
    finally:
        flex._missing_on_cpu.cache_clear()


def test_where_it_runs() -> None:
    assert flex.refuses(Case(DEVICE, torch.bfloat16, 128, 128, 128, 128)) == ""
