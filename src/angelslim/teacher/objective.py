"""The loss of a distillation as the training loop takes it: ``loss_of(model, batch)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..base.errors import ConfigError
from ..numerics.distillation import Distillation, distillation_loss, hidden_loss
from .live import Batch, Teacher

Pairs = Sequence[tuple[int, int]]  # (state of the student, state of the teacher); 0 is the embedding's output


def even_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Pair the states after each of the student's blocks with evenly spaced ones of the teacher.

    >>> even_pairs(2, 4)
    [(1, 2), (2, 4)]
    """
    return [(block, round(block * teacher / student)) for block in range(1, student + 1)]


def objective(
    teacher: Teacher | None,
    how: Distillation,
    *,
    hidden_weight: float = 0.0,
    pairs: Pairs | None = None,
) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """Return the loss of batches ``{"input_ids", "labels"}``; of its parts ``ce``, ``kd`` and ``hidden`` those in use.

    `hidden_weight` adds the squared error of hidden states over `pairs`, by default `even_pairs` of all blocks. The
    loss ``lm`` needs no teacher and asks none.
    """
    if (teacher is None) != (how.kind == "lm"):
        fix = (
            "Name a teacher, or use the loss 'lm'."
            if teacher is None
            else "Choose a loss, or name no teacher."
        )
        raise ConfigError(f"The loss {how.kind!r} and {'no' if teacher is None else 'a'} teacher.", fix=fix)
    states = bool(hidden_weight)

    def loss_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        lesson = None if teacher is None else teacher(batch, states)
        asked = {"output_hidden_states": True} if states else {}
        found = model(input_ids=batch["input_ids"], use_cache=False, **asked)
        if lesson is None:
            return distillation_loss(found.logits, batch["labels"], None, how)
        losses = distillation_loss(found.logits, batch["labels"], lesson.logits, how, lesson.words)
        if not states:
            return losses
        if not lesson.states:
            raise ConfigError(
                "This teacher gives no hidden states.", fix="Let the teacher run beside the student."
            )
        ours = found.hidden_states
        chosen = pairs or even_pairs(len(ours) - 1, len(lesson.states) - 1)
        hidden = hidden_loss(
            [ours[one] for one, _ in chosen], [lesson.states[other] for _, other in chosen], batch["labels"]
        )
        return {**losses, "loss": losses["loss"] + hidden_weight * hidden, "hidden": hidden.detach()}

    return loss_of
