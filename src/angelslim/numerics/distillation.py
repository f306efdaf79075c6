"""Distillation losses: how far a student's next-token distribution lies from its teacher's.

p is the teacher's distribution, s the student's, both over the next token. ``KL(p || s)``, the forward direction,
punishes a student that misses what the teacher holds possible; ``KL(s || p)``, the reverse one, punishes a student
that believes what the teacher does not. A weak student cannot satisfy the first everywhere and spreads itself thin;
the second lets it choose. CAKLD (BitDistiller, arXiv 2402.10631) mixes both token by token, with the teacher's own
probability of the right token as the weight of the reverse direction:

=========  ==========================================================================================
``lm``     no teacher: cross entropy alone
``kl``     KL(p || s)
``rkl``    KL(s || p)
``kd``     KL(p || s) of both at temperature T, times T^2 so that its gradient keeps its size (arXiv 1503.02531)
``cakld``  c KL(s || p) + (1 - c) KL(p || s), c = p(right token)
``kl_top``   KL(p || s) over the teacher's K most likely tokens, both renormalised over them
``rkl_top``  KL(s || p) over the student's K most likely tokens, both renormalised over them
``mse``    squared difference of the logits, mean over the vocabulary
=========  ==========================================================================================

Everything is computed in float32, in nats, and is the mean over the tokens that have a label: logits at position t
belong to the label at t + 1, and labels of -100 do not count. The labels are shifted, not the logits, so that no
logits are copied.

Memory. With 150 000 words, logits of 4 096 tokens in float32 take 2.5 GB, and a plain loss keeps five such tensors.
Here tokens are taken in chunks: the loss *and* its gradient of one chunk are computed together in the forward pass.
What lives from then to the backward pass is one tensor, the gradient, in the dtype of the student's logits; beside it
some temporaries of one chunk (`CHUNK` elements each). The price: backward runs once, and there is no second derivative.

A teacher that ran beforehand is a `TopLogits`: its k largest logits and the log-sum of the others. The others count
as one class, so a divergence of the stored teacher is a lower bound of the true one, and equals it when k is the
whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import ConfigError

Kind = Literal["lm", "kl", "rkl", "kd", "cakld", "kl_top", "rkl_top", "mse"]
KINDS: tuple[str, ...] = get_args(Kind)
IGNORED = -100  # the label of tokens that do not count
CHUNK = {"cpu": 2**21, "cuda": 2**24}  # elements of logits that are worked on at once


class TopLogits(NamedTuple):
    """A teacher's logits cut to the k largest of each position; leading dimensions ``[...]`` as the tokens have."""

    indices: Tensor  # [..., k] integers, from the largest logit to the smallest
    values: Tensor  # [..., k] logits minus the largest: <= 0
    peak: Tensor  # [...] the largest logit
    tail: Tensor  # [...] log-sum-exp of the other logits minus the largest; -inf when there is no other
    gold: Tensor  # [...] log-probability of the next token; what it holds where there is none does not matter

    def flat(self) -> TopLogits:
        """Join the leading dimensions to one."""
        k = self.indices.shape[-1]
        return TopLogits(
            self.indices.reshape(-1, k),
            self.values.reshape(-1, k),
            *(part.reshape(-1) for part in (self.peak, self.tail, self.gold)),
        )

    def rows(self, rows: slice) -> TopLogits:
        """Return some positions of a flat one, ready to compute with."""
        indices, *others = (part[rows] for part in self)
        return TopLogits(indices.long(), *(part.float() for part in others))


@dataclass(frozen=True)
class Distillation:
    """Which loss: ``lm_weight`` x cross entropy + ``kd_weight`` x the loss `kind`."""

    kind: Kind = "kl"
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    temperature: float = 1.0  # of `kd` alone
    top_k: int = 1000  # of `kl_top` and `rkl_top`

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Unknown distillation loss {self.kind!r}.", fix=f"Use {', '.join(KINDS)}.")
        if self.temperature <= 0 or self.top_k < 1:
            raise ConfigError(
                f"The temperature is {self.temperature} and top_k {self.top_k}.",
                fix="The temperature must be positive and top_k at least 1.",
            )


def top_logits(logits: Tensor, labels: Tensor, k: int) -> TopLogits:
    """Cut a teacher's logits ``[batch, positions, vocabulary]`` to the k largest of each position, in float32.

    `labels` ``[batch, positions]`` are those that the student will learn, not shifted.
    """
    width = logits.shape[-1]
    flat, goals = logits.reshape(-1, width), shift(labels).reshape(-1).clamp(min=0)
    step = max(CHUNK.get(logits.device.type, CHUNK["cpu"]) // width, 1)
    pieces: list[tuple[Tensor, ...]] = []
    for start in range(0, len(flat), step):
        rows = flat[start : start + step].float()
        values, indices = rows.topk(k, -1)
        peak = values[:, 0]
        gold = rows.gather(-1, goals[start : start + step, None])[:, 0] - rows.logsumexp(-1)
        tail = rows.scatter(-1, indices, -torch.inf).logsumexp(-1) - peak
        pieces.append((indices, values - peak[:, None], peak, tail, gold))
    joined = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return TopLogits(*(part.reshape(*labels.shape, *part.shape[1:]) for part in joined))


def shift(labels: Tensor) -> Tensor:
    """Move labels ``[batch, positions]`` to the position that predicts them; the last one predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def distillation_loss(
    student: Tensor,
    labels: Tensor,
    teacher: Tensor | TopLogits | None = None,
    how: Distillation | None = None,
    vocabulary: int | None = None,
) -> dict[str, Tensor]:
    """Return ``loss`` (differentiable), and of its parts ``ce`` and ``kd`` those that have a weight, without it.

    `student` and `teacher` hold logits ``[batch, positions, vocabulary]`` of any float dtype, `labels`
    ``[batch, positions]`` token ids, not shifted. The widths may differ where models pad one vocabulary differently:
    the first `vocabulary` words are compared, by default as many as both have.
    """
    how = how or Distillation()
    assert (teacher is None) == (how.kind == "lm"), "a teacher, or the loss lm"
    width = student.shape[-1]
    goals = shift(labels).reshape(-1)
    flat = teacher.flat() if isinstance(teacher, TopLogits) else teacher
    if isinstance(flat, Tensor):
        vocabulary = min(vocabulary or width, width, flat.shape[-1])
        flat = flat.reshape(-1, flat.shape[-1])
    vocabulary = min(vocabulary or width, width)

    def of_rows(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        return _ce_and_kd(logits, goals[rows], _rows(flat, rows, vocabulary), how, vocabulary)

    with torch.autocast(student.device.type, enabled=False):
        loss, parts = _by_chunks(student.reshape(-1, width), goals != IGNORED, of_rows, how)
    computed = {"ce": teacher is None or how.lm_weight, "kd": teacher is not None and how.kd_weight}
    return {
        "loss": loss,
        **{name: part for name, part in zip(computed, parts, strict=True) if computed[name]},
    }


def _rows(teacher: Tensor | TopLogits | None, rows: slice, width: int) -> Tensor | TopLogits | None:
    if isinstance(teacher, TopLogits):
        return teacher.rows(rows)
    return None if teacher is None else teacher[rows, :width].float()


def _ce_and_kd(
    logits: Tensor, goals: Tensor, teacher: Tensor | TopLogits | None, how: Distillation, width: int
) -> tuple[Tensor, Tensor]:
    """Both losses of each token, ``[tokens]``; one that has no weight is not computed, as it costs a softmax."""
    nothing = logits.new_zeros(len(logits))
    lm = 1.0 if teacher is None else how.lm_weight
    ce = F.cross_entropy(logits, goals, ignore_index=IGNORED, reduction="none") if lm else nothing
    if teacher is None or not how.kd_weight:
        return ce, nothing
    return ce, per_token(logits[:, :width], goals, teacher, how)


OfRows = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop of two passes in one: not for a graph
def _by_chunks(logits: Tensor, counts: Tensor, of_rows: OfRows, how: Distillation) -> tuple[Tensor, Tensor]:
    weights = (1.0, 0.0) if how.kind == "lm" else (how.lm_weight, how.kd_weight)
    loss, parts = _Chunked.apply(logits, counts, of_rows, weights)  # type: ignore[no-untyped-call]
    return loss, parts


class _Chunked(torch.autograd.Function):
    """Mean loss over the counted rows of ``logits [tokens, vocabulary]``, its gradient made on the way."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, counts: Tensor, of_rows: OfRows, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        step = max(CHUNK.get(logits.device.type, CHUNK["cpu"]) // logits.shape[1], 1)
        number = counts.sum().clamp(min=1)
        parts = torch.zeros(2, dtype=torch.float32, device=logits.device)
        ctx.gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), step):
            rows = slice(start, min(start + step, len(logits)))
            leaf = logits[rows].detach().float().requires_grad_(ctx.gradient is not None)
            with torch.set_grad_enabled(ctx.gradient is not None):
                each = of_rows(rows, leaf)
                ce, kd = (torch.where(counts[rows], part, 0.0).sum() / number for part in each)
                chosen = weights[0] * ce + weights[1] * kd
            if ctx.gradient is not None:
                ctx.gradient[rows] = _gradient(chosen, leaf)
            parts += torch.stack((ce, kd)).detach()
        ctx.mark_non_differentiable(parts)
        return weights[0] * parts[0] + weights[1] * parts[1], parts

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "this loss goes backward once"
        return gradient.mul_(outer[0].to(gradient.dtype)), None, None, None


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    if not loss.requires_grad:  # both weights are zero
        return torch.zeros_like(leaf)
    return torch.autograd.grad(loss, leaf)[0]


def per_token(student: Tensor, goals: Tensor, teacher: Tensor | TopLogits, how: Distillation) -> Tensor:
    """Return the loss `how.kind` of each token ``[tokens]``; logits ``[tokens, vocabulary]`` in float32."""
    if how.kind == "mse":
        return _logit_error(student, teacher)
    if how.kind in ("kl_top", "rkl_top"):
        log_s, log_p = _best(student, teacher, how)
        return _kl(log_p, log_s) if how.kind == "kl_top" else _kl(log_s, log_p)
    heat = how.temperature if how.kind == "kd" else 1.0
    log_s, log_p, gold = _classes(student, goals, teacher, heat)
    if how.kind == "kl" or how.kind == "kd":
        return _kl(log_p, log_s) * heat**2
    if how.kind == "rkl":
        return _kl(log_s, log_p)
    return gold * _kl(log_s, log_p) + (1 - gold) * _kl(log_p, log_s)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _classes(
    student: Tensor, goals: Tensor, teacher: Tensor | TopLogits, heat: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of both over the same classes, and the teacher's probability of the right token.

    The classes are the words, or the stored words and "another word". At a temperature the stored words alone are
    compared: what the others' sum becomes at another temperature cannot be known.
    """
    log_s = F.log_softmax(student / heat, -1)
    if isinstance(teacher, Tensor):
        log_p = F.log_softmax(teacher / heat, -1)
        gold = log_p.gather(-1, goals.clamp(min=0)[:, None])[:, 0]
        return log_s, log_p, gold.exp()
    found = log_s.gather(-1, teacher.indices)
    if teacher.indices.shape[-1] == student.shape[-1]:
        return found, F.log_softmax(teacher.values / heat, -1), teacher.gold.exp()
    if heat != 1:
        return found.log_softmax(-1), F.log_softmax(teacher.values / heat, -1), teacher.gold.exp()
    rest = log_s.scatter(-1, teacher.indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = F.log_softmax(torch.cat((teacher.values, teacher.tail[:, None]), -1), -1)
    return torch.cat((found, rest), -1), log_p, teacher.gold.exp()


def _best(student: Tensor, teacher: Tensor | TopLogits, how: Distillation) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both over the K words that one of them holds most likely."""
    if isinstance(teacher, TopLogits):
        if how.kind == "rkl_top":
            raise _not_stored("rkl_top", "the teacher's logits of the student's words")
        k = min(how.top_k, teacher.indices.shape[-1])
        chosen, values = teacher.indices[:, :k], teacher.values[:, :k]
        return student.gather(-1, chosen).log_softmax(-1), values.log_softmax(-1)
    leader = teacher if how.kind == "kl_top" else student.detach()
    chosen = leader.topk(min(how.top_k, student.shape[-1]), -1).indices
    return student.gather(-1, chosen).log_softmax(-1), teacher.gather(-1, chosen).log_softmax(-1)


def _not_stored(kind: str, what: str) -> ConfigError:
    return ConfigError(
        f"The loss {kind} needs {what}, which a stored teacher does not hold.",
        fix="Use kl, kl_top, rkl or cakld, or let the teacher run beside the student.",
    )


def _logit_error(student: Tensor, teacher: Tensor | TopLogits) -> Tensor:
    """Squared error of the logits; a stored teacher is compared on the words it holds."""
    if isinstance(teacher, TopLogits):
        return (
            (student.gather(-1, teacher.indices) - (teacher.values + teacher.peak[:, None])).square().mean(-1)
        )
    return (student - teacher).square().mean(-1)


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the mean squared error of hidden states, over pairs of layers, counted tokens and channels.

    Each state is ``[batch, positions, width]``; which layer of the student answers to which of the teacher is the
    caller's choice. Widths that differ are a `ConfigError`: there is no projection between them. It keeps one
    float32 difference for each pair of layers.
    """
    assert student and len(student) == len(teacher), "pairs of layers"
    counts = (shift(labels) != IGNORED).unsqueeze(-1)
    total = torch.zeros((), dtype=torch.float32, device=labels.device)
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape != theirs.shape:
            raise ConfigError(
                f"The student's hidden states are {ours.shape[-1]} wide and the teacher's {theirs.shape[-1]}.",
                fix="Use a teacher of the same width, or a loss on the logits alone.",
            )
        error = torch.where(counts, ours.float() - theirs.float(), 0.0).square().sum()
        total = total + error / (counts.sum().clamp(min=1) * ours.shape[-1])
    return total / len(student)
