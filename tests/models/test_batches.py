"""Samples that run together give what they give alone, and runs that end early show all that was to be seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from angelslim.models.activations import ActivationStore
from angelslim.models.batches import TOGETHER, Enough, Watch, batches, computes_together
from angelslim.models.loading import open_model
from angelslim.models.walk import BlockStream
from families import save_random

LENGTHS = (24, 24, 24, 17, 24, 24)


def test_neighbours_that_are_alike_run_together():
    lengths = [TOGETHER // 2] * 3 + [5] * 3 + [TOGETHER]
    found = batches(len(lengths), lambda a, b: lengths[a] == lengths[b], lambda sample: lengths[sample])
    assert found == [[0, 1], [2], [3, 4, 5], [6]]


class Mixes(nn.Module):
    """A block whose samples know of each other, or which wants one at a time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)

    def forward(self, hidden):
        if self.kind == "refuses" and len(hidden) > 1:
            raise RuntimeError("one at a time")
        if self.kind == "flat":
            return self.linear(hidden.reshape(-1, 4)).view_as(hidden)
        return self.linear(hidden - hidden.mean(0) if self.kind == "mixes" else hidden)


@pytest.mark.parametrize(
    ("kind", "can"), [("plain", True), ("mixes", False), ("refuses", False), ("flat", False)]
)
def test_a_trial_tells_what_a_block_can_do(kind, can):
    block, samples = Mixes(kind), torch.randn(2, 3, 4)
    assert computes_together(block, lambda numbers: block(samples[numbers]), [0, 1]) is can


def seen_by(folder, *, alone: bool, keep: bool):
    """What every linear of a model's second block is shown, by path, and the outputs."""
    source = open_model(folder)
    ids = [
        torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(i))
        for i, n in enumerate(LENGTHS)
    ]
    stream = BlockStream(source, ids, ActivationStore(folder, 1 << 30), torch.device("cpu"))
    stream.prepare(0)
    seen: dict[str, list[torch.Tensor]] = {}
    with stream.resident(0):
        if alone:
            stream._batches = lambda _index: [[sample] for sample in range(len(ids))]
        else:
            assert stream._batches(0) == [[0, 1, 2], [3], [4, 5]]
        linears = [group.linears[0] for group in source.structure.groups[stream.blocks[0]]]
        stream.run(0, {path: seen.setdefault(path, []).append for path in linears}, keep=keep)
        stored = [stream.store.get(1, sample) for sample in range(len(ids))] if keep else []
    return seen, stored


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3"])
def test_every_sample_is_shown_by_itself_and_in_order(family, keep, tmp_path):
    save_random(family, tmp_path)
    together, outputs = seen_by(tmp_path, alone=False, keep=keep)
    alone, expected = seen_by(tmp_path, alone=True, keep=keep)
    assert together.keys() == alone.keys() and len(together) == 4
    for path, parts in together.items():
        assert [len(part) for part in parts] == list(LENGTHS)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(parts, alone[path], strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))


def test_a_run_that_nobody_wants_ends_at_the_last_linear():
    modules = {name: nn.Linear(2, 2) for name in ("first", "last")}
    seen: list[torch.Tensor] = []
    watch = Watch(modules, dict.fromkeys(modules, seen.append))
    inputs = torch.ones(1, 3, 2)

    def run() -> torch.Tensor:
        return modules["last"](modules["first"](inputs))

    with watch.hooked():
        run()
        watch.learn()
        with pytest.raises(Enough):
            run()
        assert len(seen) == 4
        inputs = inputs * torch.nan
        assert run().isnan().all()  # to the end, where the outputs are looked at
    assert len(seen) == 6


def test_a_linear_that_is_called_twice_lets_no_run_end():
    modules = {name: nn.Linear(2, 2) for name in ("first", "last")}
    watch = Watch(modules, dict.fromkeys(modules, lambda _inputs: None))
    with watch.hooked():
        for _ in range(2):
            for name in ("first", "last", "first"):
                modules[name](torch.ones(1, 3, 2))
            watch.learn()
