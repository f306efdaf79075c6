"""Distillation losses against loops in float64, finite differences, and a count of what they allocate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from angelslim.base.errors import ConfigError
from angelslim.numerics import distillation
from angelslim.numerics.distillation import (
    KINDS,
    Distillation,
    TopLogits,
    distillation_loss,
    hidden_loss,
    top_logits,
)

BATCH, POSITIONS, WORDS = 2, 7, 23
TAUGHT = [kind for kind in KINDS if kind != "lm"]


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(BATCH, POSITIONS, WORDS, generator=make)
    teacher = 3 * torch.randn(BATCH, POSITIONS, WORDS, generator=make)
    labels = torch.randint(WORDS, (BATCH, POSITIONS), generator=make)
    labels[0, :3] = labels[1, 4] = -100
    return student, teacher, labels


def stored(teacher: Tensor, labels: Tensor, k: int) -> TopLogits:
    values, indices = teacher.topk(k, -1)
    peak = values[..., :1]
    others = teacher.scatter(-1, indices, -math.inf).logsumexp(-1)
    following = labels.roll(-1, 1).clamp(min=0)[..., None]
    gold = teacher.log_softmax(-1).gather(-1, following)[..., 0]
    return TopLogits(indices.to(torch.uint16), values - peak, peak[..., 0], others - peak[..., 0], gold)


def softmax(row: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def best(of: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(of)), key=lambda word: -of[word])[:k]


def token(kind: str, s: list[float], t: list[float], gold: int, heat: float, k: int) -> float:
    """One token's loss, with Python's own floats."""
    student, teacher = softmax(s), softmax(t)
    if kind == "lm":
        return -math.log(student[gold])
    if kind == "kl":
        return divergence(teacher, student)
    if kind == "rkl":
        return divergence(student, teacher)
    if kind == "kd":
        return heat**2 * divergence(softmax([x / heat for x in t]), softmax([x / heat for x in s]))
    if kind == "cakld":
        c = teacher[gold]
        return c * divergence(student, teacher) + (1 - c) * divergence(teacher, student)
    if kind == "mse":
        return sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / len(s)
    kept = best(t if kind == "kl_top" else s, k)
    student, teacher = softmax([s[i] for i in kept]), softmax([t[i] for i in kept])
    return divergence(teacher, student) if kind == "kl_top" else divergence(student, teacher)


def oracle(kind: str, student: Tensor, teacher: Tensor, labels: Tensor, heat: float, k: int) -> float:
    values = [
        token(kind, student[b, i].tolist(), teacher[b, i].tolist(), int(labels[b, i + 1]), heat, k)
        for b in range(BATCH)
        for i in range(POSITIONS - 1)
        if labels[b, i + 1] != -100
    ]
    return sum(values) / len(values)


def small_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int = 3) -> None:
    monkeypatch.setitem(distillation.CHUNK, "cpu", tokens * WORDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, 100])
def test_each_loss_equals_its_float64_loop(kind: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, tokens)
    student, teacher, labels = example()
    how = Distillation(kind, temperature=1.7, top_k=5)
    found = distillation_loss(student, labels, None if kind == "lm" else teacher, how)
    expected = oracle(kind, student, teacher, labels, 1.7, 5)
    assert found["loss"].item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_gradient_equals_finite_differences(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    student, teacher, labels = example()
    leaf = student.clone().requires_grad_()
    how = Distillation(kind, temperature=1.7, top_k=5)
    distillation_loss(leaf, labels, None if kind == "lm" else teacher, how)["loss"].backward()
    gradient = leaf.grad
    assert gradient is not None
    for place in [(0, 2, 0), (0, 4, 11), (1, 0, 3), (1, 5, 22), (1, 1, int(student[1, 1].argmax()))]:
        sides = []
        for sign in (1, -1):
            moved = student.double().clone()
            moved[place] += sign * 1e-5
            sides.append(oracle(kind, moved, teacher.double(), labels, 1.7, 5))
        assert gradient[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=2e-6), place


def test_tokens_without_a_label_have_no_gradient_and_no_weight() -> None:
    student, teacher, labels = example()
    leaf = student.clone().requires_grad_()
    how = Distillation("cakld", lm_weight=0.5)
    loss = distillation_loss(leaf, labels, teacher, how)["loss"]
    loss.backward()
    still = [(b, i) for b, i in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist()
             if i == POSITIONS - 1 or labels[b, i + 1] == -100]  # fmt: skip
    assert leaf.grad is not None
    assert {tuple(p) for p in (leaf.grad.abs().sum(-1) == 0).nonzero().tolist()} == set(still)
    wild = student.clone()
    wild[0, 0] = wild[1, -1] = 99.0
    assert distillation_loss(wild, labels, teacher, how)["loss"].item() == loss.item()


def test_weights_mix_both_parts_and_backward_scales() -> None:
    student, teacher, labels = example()
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    mixed = distillation_loss(one, labels, teacher, Distillation("rkl", kd_weight=0.7, lm_weight=0.2))
    assert mixed["loss"].item() == pytest.approx(0.2 * mixed["ce"].item() + 0.7 * mixed["kd"].item())
    assert not mixed["ce"].requires_grad and not mixed["kd"].requires_grad
    (3 * mixed["loss"]).backward()
    (0.6 * distillation_loss(two, labels, None, Distillation("lm"))["loss"]).backward()
    (2.1 * distillation_loss(two, labels, teacher, Distillation("rkl"))["loss"]).backward()
    assert one.grad is not None and two.grad is not None
    assert torch.allclose(one.grad, two.grad, atol=1e-7)


def test_no_labelled_token_is_a_loss_of_zero() -> None:
    student, teacher, labels = example()
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(leaf, torch.full_like(labels, -100), teacher)["loss"]
    loss.backward()
    assert loss.item() == 0 and leaf.grad is not None and leaf.grad.abs().max() == 0


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher, labels = (part.bfloat16() if part.is_floating_point() else part for part in example())
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(leaf, labels, teacher, Distillation("kl"))["loss"]
    loss.backward()
    expected = oracle("kl", student.double(), teacher.double(), labels, 1, 1)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-6)
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [kind for kind in TAUGHT if kind != "rkl_top"])
def test_a_stored_teacher_of_the_whole_vocabulary_is_the_teacher(kind: Any) -> None:
    student, teacher, labels = example()
    how = Distillation(kind, lm_weight=0.3, temperature=1.7, top_k=5)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    live = distillation_loss(one, labels, teacher, how)
    kept = distillation_loss(two, labels, stored(teacher, labels, WORDS), how)
    live["loss"].backward()
    kept["loss"].backward()
    assert kept["loss"].item() == pytest.approx(live["loss"].item(), rel=1e-5)
    assert one.grad is not None and two.grad is not None
    assert torch.allclose(one.grad, two.grad, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "rkl"])
def test_the_words_left_out_count_as_one_class(kind: Any) -> None:
    student, teacher, labels = example()
    found = distillation_loss(student, labels, stored(teacher, labels, 6), Distillation(kind))["loss"].item()
    total, count = 0.0, 0
    for b in range(BATCH):
        for i in range(POSITIONS - 1):
            if labels[b, i + 1] != -100:
                s, t = softmax(student[b, i].tolist()), softmax(teacher[b, i].tolist())
                kept = best(t, 6)
                s, t = ([row[j] for j in kept] + [1 - sum(row[j] for j in kept)] for row in (s, t))
                total += divergence(t, s) if kind == "kl" else divergence(s, t)
                count += 1
    assert found == pytest.approx(total / count, rel=1e-5)
    assert found < distillation_loss(student, labels, teacher, Distillation(kind))["loss"].item()


@pytest.mark.parametrize("k", [1, 6, WORDS])
def test_cutting_the_logits(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    _, teacher, labels = example()
    found, expected = top_logits(teacher, labels, k), stored(teacher, labels, k)
    assert torch.equal(found.indices, expected.indices.long())
    for name in ("values", "peak", "tail"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5), name
    counted = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    assert torch.allclose(found.gold[:, :-1][counted], expected.gold[:, :-1][counted], atol=1e-5)


def test_stored_words_are_enough_for_top_k() -> None:
    student, teacher, labels = example()
    how = Distillation("kl_top", top_k=4)
    live = distillation_loss(student, labels, teacher, how)["loss"]
    assert distillation_loss(student, labels, stored(teacher, labels, 9), how)[
        "loss"
    ].item() == pytest.approx(live.item(), rel=1e-5)
    with pytest.raises(ConfigError, match="rkl_top"):
        distillation_loss(student, labels, stored(teacher, labels, 9), Distillation("rkl_top"))


def test_padded_vocabularies_are_compared_on_the_words_of_both() -> None:
    student, teacher, labels = example()
    how = Distillation("kl", lm_weight=1.0)
    wider = torch.cat((teacher, torch.full((BATCH, POSITIONS, 9), 5.0)), -1)
    assert distillation_loss(student, labels, wider, how)["kd"].item() == pytest.approx(
        distillation_loss(student, labels, teacher, how)["kd"].item()
    )
    leaf = torch.cat((student, torch.full((BATCH, POSITIONS, 2), 1.0)), -1).requires_grad_()
    padded = distillation_loss(leaf, labels, stored(teacher, labels, WORDS), how, vocabulary=WORDS)
    padded["loss"].backward()
    assert padded["kd"].item() == pytest.approx(
        distillation_loss(student, labels, teacher, how)["kd"].item(), rel=1e-5
    )
    assert leaf.grad is not None and leaf.grad[1, 0, -1] > 0, "cross entropy knows the padding"


def test_wrong_settings_name_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"jsd.*rkl_top"):
        Distillation("jsd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="positive"):
        Distillation("kd", temperature=0)


class _Large(TorchDispatchMode):
    """Counts the new storages of at least some number of bytes."""

    def __init__(self, least: int, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.least, self.seen = least, {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self.least:
                pointer = value.untyped_storage().data_ptr()
                if pointer not in self.seen:
                    self.seen.add(pointer)
                    self.made.append(value)
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_of_the_logits_size_is_made(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    student, teacher, labels = example()
    leaf = student.clone().requires_grad_()
    with _Large(student.nbytes, [leaf, teacher]) as count:
        distillation_loss(leaf, labels, None if kind == "lm" else teacher, Distillation(kind))[
            "loss"
        ].backward()
    assert len(count.made) == 1, [tuple(tensor.shape) for tensor in count.made]


def test_hidden_states() -> None:
    make = torch.Generator().manual_seed(1)
    _, _, labels = example()
    ours = [torch.randn(BATCH, POSITIONS, 5, generator=make, requires_grad=True) for _ in range(2)]
    theirs = [torch.randn(BATCH, POSITIONS, 5, generator=make) for _ in range(2)]
    loss = hidden_loss(ours, theirs, labels)
    values = [
        (a[b, i, c].item() - t[b, i, c].item()) ** 2
        for a, t in zip(ours, theirs, strict=True)
        for b in range(BATCH)
        for i in range(POSITIONS - 1)
        for c in range(5)
        if labels[b, i + 1] != -100
    ]
    assert loss.item() == pytest.approx(sum(values) / len(values), rel=1e-6)
    loss.backward()
    counted = int((labels[:, 1:] != -100).sum())
    expected = 2 * (ours[0][1, 0, 2] - theirs[0][1, 0, 2]) / (counted * 5 * 2)
    assert ours[0].grad is not None and ours[0].grad[1, 0, 2].item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    with pytest.raises(ConfigError, match="5 wide and the teacher's 6"):
        hidden_loss([ours[0]], [torch.zeros(BATCH, POSITIONS, 6)], labels)
