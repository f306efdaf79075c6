"""The loss as the loop takes it: its parts, hidden states, and choices that do not fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from angelslim.base.errors import ConfigError
from angelslim.numerics.distillation import Distillation, TopLogits, hidden_loss
from angelslim.teacher.live import Lesson, ModelTeacher
from angelslim.teacher.objective import even_pairs, objective
from tiny import qwen3

SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
TOKENS = torch.arange(24).reshape(2, 12)
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def test_cross_entropy_alone_is_the_models_own_loss() -> None:
    model = qwen3(**SMALL)
    found = objective(None, Distillation("lm"))(model, BATCH)
    assert found.keys() == {"loss", "ce"}
    assert found["loss"].item() == pytest.approx(model(**BATCH).loss.item(), rel=1e-6)


def test_a_teacher_that_is_the_student_leaves_nothing_to_learn() -> None:
    model = qwen3(**SMALL)
    found = objective(ModelTeacher(qwen3(**SMALL)), Distillation("rkl"), hidden_weight=1.0)(model, BATCH)
    assert found.keys() == {"loss", "kd", "hidden"}
    assert found["loss"].item() == pytest.approx(0, abs=1e-6)


def test_hidden_states_of_a_deeper_teacher() -> None:
    model, deeper = qwen3(**SMALL), qwen3(blocks=4, seed=1, **SMALL)
    assert even_pairs(2, 4) == [(1, 2), (2, 4)] and even_pairs(3, 2) == [(1, 1), (2, 1), (3, 2)]
    how = Distillation("kl")
    plain = objective(ModelTeacher(deeper), how)(model, BATCH)
    found = objective(ModelTeacher(deeper), how, hidden_weight=3.0)(model, BATCH)
    ours, theirs = (m(TOKENS, output_hidden_states=True).hidden_states for m in (model, deeper))
    expected = hidden_loss([ours[1], ours[2]], [theirs[2], theirs[4]], TOKENS).item()
    assert found["hidden"].item() == pytest.approx(expected, rel=1e-5)
    assert found["loss"].item() == pytest.approx(plain["loss"].item() + 3 * expected, rel=1e-5)
    found["loss"].backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert deeper.model.layers[0].mlp.up_proj.weight.grad is None


def test_choices_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="'kl' and no teacher"):
        objective(None, Distillation("kl"))
    with pytest.raises(ConfigError, match="'lm' and a teacher"):
        objective(ModelTeacher(qwen3(**SMALL)), Distillation("lm"))
    with pytest.raises(ConfigError, match="32 wide and the teacher's 128"):
        objective(ModelTeacher(qwen3()), Distillation("kl"), hidden_weight=1.0)(qwen3(**SMALL), BATCH)

    def stored(batch: Any, states: bool = False) -> Lesson:
        flat = torch.zeros(2, 12)
        return Lesson(TopLogits(torch.zeros(2, 12, 1).long(), flat[..., None], flat, flat, flat))

    with pytest.raises(ConfigError, match="no hidden states"):
        objective(stored, Distillation("kl"), hidden_weight=1.0)(qwen3(**SMALL), BATCH)
