"""Teachers that run: what they are given, that they stay as they were, and whom they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from angelslim.base.errors import ConfigError
from angelslim.teacher.live import frozen_copy, open_teacher, own_masters
from tiny import byte_tokenizer, qwen3, save_qwen3

BATCH = {"input_ids": torch.arange(24).reshape(2, 12)}


def test_a_folder_teaches_with_its_own_logits(tiny_folder: Path) -> None:
    teacher = open_teacher(tiny_folder, byte_tokenizer(), dtype=torch.float32)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    lesson = teacher(BATCH, states=True)
    assert lesson.words == 259 and len(lesson.states) == 3
    assert not lesson.logits.requires_grad and lesson.logits.shape == (2, 12, 272)
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)(**BATCH).logits
    assert torch.allclose(lesson.logits, expected, atol=1e-5)


def test_another_tokenizer_is_one_error_that_names_both(tiny_folder: Path) -> None:
    other = byte_tokenizer()
    other.add_tokens(["angel"])
    with pytest.raises(
        ConfigError, match=r"tiny \(259 tokens, .* student mine \(260 tokens, .* different vocab"
    ):
        open_teacher(tiny_folder, other, student_name="mine")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    save_qwen3(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        open_teacher(tmp_path, byte_tokenizer())


def test_the_frozen_original_stays_while_the_student_moves() -> None:
    student = qwen3()
    before = student(**BATCH).logits.detach()
    teacher = frozen_copy(student)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.add_(0.1)
    assert torch.equal(teacher(BATCH).logits, before)
    assert not torch.equal(student(**BATCH).logits, before)


class Rounded(nn.Module):
    """The crudest fake quantization, with a switch."""

    on = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight * 20).round() / 20 if self.on else weight


def test_the_students_own_weights_teach_with_quantization_off() -> None:
    student = qwen3().train()
    original = qwen3()(**BATCH).logits.detach()
    rounding = Rounded()
    nn.utils.parametrize.register_parametrization(
        student.model.layers[0].mlp.up_proj, "weight", rounding, unsafe=True
    )

    @contextmanager
    def unquantized() -> Iterator[None]:
        rounding.on = False
        try:
            yield
        finally:
            rounding.on = True

    teacher = own_masters(student, unquantized)
    assert torch.equal(teacher(BATCH).logits, original)
    assert rounding.on and student.training
    assert not torch.equal(student(**BATCH).logits, original)
