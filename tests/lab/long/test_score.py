"""Scores count whole answers: a model that knows the rows gets all, one wrong token costs its question alone."""

from types import SimpleNamespace

import pytest
import torch

from angelslim.lab.long.score import FAMILIES, TEXT, Result, rows_of, score
from angelslim.lab.long.tokens import Tokens

TOKENS = Tokens(256, 64, 64)
CORPUS = torch.randint(140, 256, (3000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def knows(tokens: torch.Tensor, wrong: tuple[int, int] | None = None) -> SimpleNamespace:
    """A model that predicts every next token of the rows, except one if told."""
    rows = {tuple(row.tolist()): row for row in tokens}

    def model(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        following = torch.stack([rows[tuple(row.tolist())].roll(-1) for row in input_ids])
        hidden = torch.nn.functional.one_hot(following, TOKENS.size).float() * 20
        if wrong is not None:
            hidden[wrong[0], wrong[1] - 1] = 0.0
        return SimpleNamespace(last_hidden_state=hidden)

    return SimpleNamespace(model=model, lm_head=lambda x: x)


@pytest.mark.parametrize("family", FAMILIES)
def test_who_knows_the_row_answers_everything(family: str) -> None:
    tokens, weights = rows_of(family, TOKENS, CORPUS, 512, 5, 0)
    assert score(knows(tokens), family, tokens, weights).each == (1.0,) * 5


def test_one_wrong_token_costs_one_question() -> None:
    tokens, weights = rows_of("multi-key", TOKENS, CORPUS, 256, 3, 0)
    place = int((weights[1] == 1).nonzero()[1])  # the second of two values
    result = score(knows(tokens, (1, place)), "multi-key", tokens, weights)
    assert result.each == (1.0, 0.75, 1.0)


def test_text_is_scored_in_nats() -> None:
    tokens, weights = rows_of(TEXT, TOKENS, CORPUS, 64, 2, 0)
    flat = SimpleNamespace(
        model=lambda input_ids, use_cache: SimpleNamespace(
            last_hidden_state=torch.zeros(*input_ids.shape, TOKENS.size)
        ),
        lm_head=lambda x: x,
    )
    assert score(flat, TEXT, tokens, weights).value == pytest.approx(TOKENS.size, rel=1e-4)


def test_the_standard_error_is_of_the_mean_over_rows() -> None:
    assert Result("needle", 64, (1.0, 0.0, 1.0, 0.0)).stderr == pytest.approx(100 * (1 / 3) ** 0.5 / 2)
