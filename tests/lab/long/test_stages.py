"""Batches are a pure function of their number, and the loss is the plain cross-entropy of the chosen positions."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from angelslim.lab.long.rows import Maker
from angelslim.lab.long.stages import KINDS, LAST, LONGER, WARM, Batches, Stage, answer_loss, draw
from angelslim.lab.long.tokens import Tokens

TOKENS = Tokens(256, 64, 64)
STAGE = Stage(64, 20, 10, 1e-3, WARM)
CORPUS = torch.randint(140, 256, (3000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
BATCHES = Batches(STAGE, 0, 5, TOKENS, CORPUS, "cpu")


@pytest.mark.parametrize("shares", [WARM, LONGER, LAST])
def test_shares_are_of_the_whole(shares: tuple[float, ...]) -> None:
    assert len(shares) == len(KINDS) and sum(shares) == pytest.approx(1.0)
    assert sum(replace(STAGE, shares=shares).counts()) == STAGE.rows


def test_a_batch_follows_from_its_number_stage_and_seed() -> None:
    one, other = BATCHES(3), BATCHES(3)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for changed in (BATCHES(4), replace(BATCHES, number=1)(3), replace(BATCHES, seed=6)(3)):
        assert not torch.equal(one["tokens"], changed["tokens"])


def test_the_answers_are_among_the_trained_positions() -> None:
    batch = BATCHES(0)
    assert batch["tokens"].shape == (20, 64) and batch["positions"].shape == (20, 16)
    assert batch["positions"].min() >= 1  # the first token has nothing before it
    retrieval = (batch["kinds"] != KINDS.index("text")) & (batch["kinds"] != KINDS.index("common"))
    assert (batch["weights"][retrieval] == 1).any(1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [128, 256])
def test_every_kind_fits_every_length(kind: str, length: int) -> None:
    for seed in range(20):
        maker = Maker(TOKENS, CORPUS, torch.Generator().manual_seed(seed))
        tokens, weights = draw(kind, maker, random.Random(seed), 2, length)
        assert tokens.shape == weights.shape == (2, length)


def test_the_loss_is_the_cross_entropy_of_the_chosen_positions() -> None:
    torch.manual_seed(0)
    table, head = torch.randn(256, 8), torch.nn.Linear(8, 256)

    class Model(torch.nn.Module):
        def model(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=table[input_ids])

        def lm_head(self, x: torch.Tensor) -> torch.Tensor:
            return head(x)

    batch = BATCHES(1)
    found = answer_loss(Model(), batch)
    total = weight = 0.0
    for row, places, weights in zip(batch["tokens"], batch["positions"], batch["weights"], strict=True):
        for place, share in zip(places.tolist(), weights.tolist(), strict=True):
            chances = head(table[row[place - 1]]).detach().double().log_softmax(-1)
            total -= share * float(chances[row[place]])
            weight += share
    assert float(found["loss"].detach()) == pytest.approx(total / weight, rel=1e-5)
