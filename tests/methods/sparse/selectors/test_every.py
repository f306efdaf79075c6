"""What holds for every selector: the common rules, the density that was asked for, options that are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import CASES, Case, allowed, own, rows_of

from angelslim.base.errors import ConfigError
from angelslim.methods.sparse._budget import prompt_counts
from angelslim.methods.sparse._patterns import HeadPattern, write_patterns
from angelslim.methods.sparse.assign import Heads, full
from angelslim.methods.sparse.plan import BlockPlan, causal_area
from angelslim.methods.sparse.selectors.base import SELECTORS

SMALL: dict[str, dict[str, Any]] = {
    "a_shape": {"n_init": 16, "n_local": 32},
    "tri_shape": {"n_init": 16, "n_local": 32, "n_last": 8},
    "dilated": {"n_init": 16, "window": 32},
    "strided": {"n_init": 16, "window": 16, "stride": 4},
    "flexprefill": {"min_budget": 16, "last": 16},
    "minference": {"vertical": 30, "slash": 50, "last": 8},
    "flashprefill": {"sink": 16, "window": 16, "last_blocks": 1},
    "stem": {"keep_ratio": 0.3, "initial_blocks": 1, "window_blocks": 1},
}


@pytest.mark.parametrize("name", list(SELECTORS))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rules_hold_in_both_modes(name: str, case: Case) -> None:
    tensors = case.tensors()
    for options in (SMALL.get(name, {}), {"density": 0.3}):
        plan = SELECTORS.get(name)(options).select(*tensors, case.context())
        mask = plan.to_mask()
        assert mask.shape[:2] == (case.batch, case.heads)
        for b in range(case.batch):
            sink = case.real(b)[0] // case.block
            for i in rows_of(case, b):
                assert all(mask[b, :, i, j].all() for j in own(case, i)), "the diagonal"
                assert mask[b, :, i, sink].all() or sink > own(case, i)[-1], "the sink"
                others = [
                    j for j in range(mask.shape[-1]) if not allowed(case, b, i, j) and j not in own(case, i)
                ]
                assert not mask[b, :, i][:, others].any(), "what comes later, or is padding"


@pytest.mark.parametrize("name", list(SELECTORS))
@pytest.mark.parametrize("length", [1024, 1000])
def test_the_density_is_met(name: str, length: int) -> None:
    case = Case(queries=length, keys=length)
    tensors = case.tensors()
    for density in (0.1, 0.25, 0.5):
        plan = SELECTORS.get(name)({"density": density}).select(*tensors, case.context())
        assert abs(plan.density() - density) < 0.01 * density + 0.002
    assert SELECTORS.get(name)({"density": 1.0}).select(*tensors, case.context()).density() == 1.0


@pytest.mark.parametrize("name", list(SELECTORS))
def test_densities_differ_by_layer_and_head(name: str) -> None:
    case = Case(queries=512, keys=512)
    selector = SELECTORS.get(name)({"density": [0.2, 0.2, [0.15, 0.6], 1.0]})
    plan = selector.select(*case.tensors(), case.context(layer=2))
    area = causal_area(16, 16, 0, 512)
    found = [(plan.to_mask()[0, head] * area).sum() / area.sum() for head in range(2)]
    assert [float(x) for x in found] == pytest.approx([0.15, 0.6], abs=0.01)
    assert selector.select(*case.tensors(), case.context(layer=3)).density() == 1.0


@pytest.mark.parametrize("name", ["uniform", "xattention", "oracle", "a_shape"])
def test_a_chunk_gets_the_rows_it_would_get_at_once(name: str) -> None:
    whole, chunk = Case(queries=512, keys=512), Case(queries=128, keys=384)
    q, k, v = whole.tensors()
    selector = SELECTORS.get(name)({"density": 0.2})
    at_once = selector.select(q, k, v, whole.context()).to_mask()
    context = chunk.context(prompt_len=512)
    part = selector.select(q[:, :, 256:384], k[:, :, :384], v[:, :, :384], context).to_mask()
    assert torch.equal(part, at_once[:, :, 16:24, :24])


def test_padding_on_the_left_changes_nothing() -> None:
    alone, padded = Case(queries=320, keys=320), Case(queries=368, keys=368, start=(48,))
    q, k, v = alone.tensors()
    wide = [torch.cat([torch.randn_like(x[:, :, :48]) * 3, x], 2) for x in (q, k, v)]
    for name in SELECTORS:
        for options in (SMALL.get(name, {}), {"density": 0.3}):
            selector = SELECTORS.get(name)(options)
            expected = selector.select(q, k, v, alone.context()).to_mask()
            found = selector.select(*wide, padded.context()).to_mask()
            assert torch.equal(found[:, :, 3:, 3:], expected), (name, options)


def test_counts_meet_the_area() -> None:
    for length, density in ((4096, 0.05), (4096, 0.2), (4100, 0.1)):
        counts = torch.tensor(prompt_counts(32, length, density))
        area = causal_area(32, 32, 0, length)
        rows = len(counts)
        kept = (area.diagonal() + (counts - 1) * area[:, 0]).sum()
        assert float(kept / area.sum()) == pytest.approx(density, rel=0.01)
        assert counts.max() - counts[rows // 2] <= 1, "late rows have the same count"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densty": 0.1}, "no option 'densty'.*density"),
        ({"density": 1.5}, "cannot be 1.5"),
        ({"density": "much"}, "cannot be 'much'"),
        ({"stride": 2.5}, "cannot be 2.5"),
        ({"stride": True}, "cannot be True"),
        ({"tpd": 1}, "cannot be 1"),
        ({"stride": [[8, 16]]}, "too deep"),
        ({"density": []}, "empty"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SELECTORS.get("stem")(options)


def test_lists_must_fit_the_model() -> None:
    case = Case()
    for options, message in (
        ({"density": [0.1, 0.2]}, "lists 2 layers"),
        ({"density": [[0.1, 0.2, 0.3]]}, "lists 3 heads"),
        ({"density": [[0.1, None]]}, "some heads only"),
    ):
        with pytest.raises(ConfigError, match=message):
            SELECTORS.get("uniform")(options).select(*case.tensors(), case.context())
    with pytest.raises(ConfigError, match="Did you mean 'stem'"):
        SELECTORS.get("stm")


@pytest.mark.parametrize("name", list(SELECTORS))
def test_all_is_done_on_the_queries_device_and_nothing_waits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data stand for a GPU's: mixing them with the host's, or asking for a value, is an error."""
    monkeypatch.setattr(BlockPlan, "from_mask", classmethod(lambda cls, mask, **_: mask))
    for case in (Case(2, 4, 2, 1000, 1000), Case(2, 4, 2, 300, 1000)):
        tensors = [x.to("meta", torch.bfloat16) for x in case.tensors()]
        for options in ({}, SMALL.get(name, {}), {"density": [[0.1, 0.2, 0.3, 0.4]]}):
            mask = SELECTORS.get(name)(options).select(*tensors, case.context())
            assert isinstance(mask, torch.Tensor) and mask.device.type == "meta"
            assert mask.shape[:2] == (2, 4)


def test_lists_count_the_layers_heads_also_for_some_of_them(tmp_path: Path) -> None:
    """A selector that a rule gives heads 3 and 1 keeps there what it keeps for all four, by its lists and pattern files."""
    case = Case(heads=4, kv_heads=2, queries=512, keys=512)
    q, k, v = case.tensors()
    layer = [HeadPattern("stream_llm", 16, 32 * (head + 1)) for head in range(4)]
    write_patterns(tmp_path / "patterns.json", [layer] * 4)
    for name, options in (
        ("stem", {"density": [[0.2, 0.3, 0.4, 0.6]]}),
        ("minference", {"patterns": str(tmp_path / "patterns.json")}),
    ):
        select = SELECTORS.get(name)(options).select
        whole = select(q, k, v, case.context()).to_mask()
        mask = Heads((((3, 1), select), ((0, 2), full)))(q, k, v, case.context()).to_mask()
        assert torch.equal(mask[:, [1, 3]], whole[:, [1, 3]])
        assert not torch.equal(whole[:, 1], whole[:, 3])
    with pytest.raises(ConfigError, match="lists 2 heads in layer 2, the model has 4"):
        Heads((((3, 1), SELECTORS.get("stem")({"density": [[0.2, 0.3]]}).select),))(q, k, v, case.context())
