"""Counts, times and densities of the hook."""

from __future__ import annotations

import torch

from angelslim.methods.sparse.stats import Clock, LayerStats, total


def test_a_clock_adds_up_and_can_be_off() -> None:
    clock = Clock()
    device = torch.device("cpu")
    with clock.running(device, on=False):
        pass
    assert clock.read() == 0
    for _ in range(2):
        before = clock.read()
        with clock.running(device):
            sum(range(1000))
        assert clock.read() > before


def test_totals() -> None:
    first, second = LayerStats(calls=2), LayerStats()
    for share in (torch.tensor([[0.2, 0.4]]), torch.tensor([[0.5]])):
        first.read(share, 10, 10)
    first.fallbacks.update(["decode", "decode"])
    second.fallbacks.update(["decode", "set dense"])
    first.kernels.update(["flex", "flex"])
    assert first.row()["density"] is not None and abs(first.row()["density"] - 0.4) < 1e-6
    assert second.row()["density"] is None
    whole = total({0: first, 1: second})
    assert whole["kernels"] == {"flex": 2}
    assert whole["calls"] == 2 and whole["fallbacks"] == {"decode": 3, "set dense": 1}
    assert abs(whole["density"] - 0.4) < 1e-6
    assert total({})["density"] is None


def test_the_chunks_of_a_prompt_count_by_their_pairs() -> None:
    """Of 10 tokens in two chunks the first has 15 pairs and the second 40; 15 + 10 of 55 are read."""
    stats = LayerStats()
    stats.read(torch.ones(1, 2), 5, 5)
    stats.read(torch.full((1, 2), 0.25), 5, 10)
    density = stats.density()
    assert density is not None and abs(density - 25 / 55) < 1e-6
