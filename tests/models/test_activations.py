from __future__ import annotations

import pytest
import torch

from angelslim.models.activations import ActivationStore


def hidden(sample: int, generation: int = 0) -> torch.Tensor:
    return torch.full((1, 3 + sample, 8), float(10 * generation + sample))


@pytest.mark.parametrize("budget", [0, 500, 10**9])
def test_gives_back_what_was_put_whatever_the_budget(tmp_path, budget):
    store = ActivationStore(tmp_path, budget)
    for sample in range(5):
        store.put(0, sample, hidden(sample))
    assert all(torch.equal(store.get(0, sample), hidden(sample)) for sample in range(5))
    assert store.complete(0, 5) and not store.complete(0, 6) and not store.complete(1, 1)


def test_memory_stays_within_the_budget(tmp_path):
    budget = hidden(0).nbytes + hidden(1).nbytes
    store = ActivationStore(tmp_path, budget)
    for sample in range(5):
        store.put(0, sample, hidden(sample))
    assert sum(tensor.nbytes for tensor in store._memory.values()) <= budget
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    for sample in range(2):
        store.drop(0, sample)
    store.put(1, 0, hidden(0, 1))
    assert (1, 0) in store._memory  # dropped memory can be used again


@pytest.mark.parametrize("budget", [0, 300, 10**9])
def test_a_committed_generation_survives_the_process(tmp_path, budget):
    store = ActivationStore(tmp_path, budget)
    for sample in range(4):
        store.put(2, sample, hidden(sample, 2))
    store.commit(2)
    again = ActivationStore(tmp_path, 0)
    assert again.complete(2, 4)
    assert all(torch.equal(again.get(2, sample), hidden(sample, 2)) for sample in range(4))


def test_a_forgotten_generation_leaves_no_trace(tmp_path):
    store = ActivationStore(tmp_path, 300)
    for sample in range(4):
        store.put(0, sample, hidden(sample))
    store.commit(0)
    store.forget(0)
    assert not store.complete(0, 1)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert store._resident == 0


def test_a_generation_can_be_written_again_after_a_crash(tmp_path):
    """Files of a block that was interrupted are replaced when the block runs again."""
    ActivationStore(tmp_path, 0).put(1, 0, hidden(7, 1))
    store = ActivationStore(tmp_path, 10**9)
    store.put(1, 0, hidden(0, 1))
    store.commit(1)
    assert torch.equal(store.get(1, 0), hidden(0, 1))
    assert torch.equal(ActivationStore(tmp_path, 0).get(1, 0), hidden(0, 1))
