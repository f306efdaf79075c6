"""How `tiny-long` learns: short rows until looking things up works, then longer ones.

Trained on long rows from the start, a small model stays for thousands of steps at naming any value of the row. Rows of 256
tokens with repeated random tokens and a question for every fact get it to the circuit that retrieves (an earlier token
like this one, and what followed: "In-context Learning and Induction Heads", arXiv 2209.11895) within minutes; longer rows
then only have to sharpen it. A stage ends when its answers are right often enough, or with its steps; the last one runs to
its end, since its learning rate falls there.

A batch is a pure function of the stage, the seed and the batch's number.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import Maker, Rows
from .tokens import Tokens

KINDS = ("repeats", "middle", "ending", "needle", "chains", "common", "text")
RETRIEVAL = ("middle", "ending", "needle")  # their accuracy says when a stage may end
TRAINED = 0.25  # share of a row's positions whose loss is taken, the heaviest ones


@dataclass(frozen=True)
class Stage:
    """Rows of one length: how many a step, the most steps, the accuracy that suffices, the shares of the kinds."""

    length: int
    rows: int
    steps: int
    lr: float
    shares: tuple[float, ...]  # in the order of KINDS
    enough: float | None = None  # accuracy at which the stage ends early
    least: int = 0  # steps before it may

    def counts(self) -> list[int]:
        """Return how many rows of each kind a batch has; text gets what rounding leaves."""
        counts = [round(share * self.rows) for share in self.shares]
        counts[-1] += self.rows - sum(counts)
        return counts


WARM = (0.30, 0.40, 0.10, 0.02, 0.04, 0.04, 0.10)
LONGER = (0.08, 0.30, 0.20, 0.10, 0.12, 0.08, 0.12)
LAST = (0.03, 0.27, 0.22, 0.14, 0.12, 0.08, 0.14)


@dataclass(frozen=True)
class Batches:
    """Makes the batches of one stage on `device`."""

    stage: Stage
    number: int
    seed: int
    tokens: Tokens
    corpus: Tensor
    device: str

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return ``tokens`` [R, T], ``positions`` and ``weights`` [R, T/4] of what is to be predicted, ``kinds`` [R]."""
        rng = random.Random(f"tiny-long/{self.seed}/{self.number}/{index}")  # noqa: S311  not for secrets
        generator = torch.Generator(self.device).manual_seed(rng.getrandbits(60))
        maker = Maker(self.tokens, self.corpus, generator)
        made, kinds = [], []
        for kind, count in enumerate(self.stage.counts()):
            if count:
                made.append(draw(KINDS[kind], maker, rng, count, self.stage.length))
                kinds += [kind] * count
        tokens, weights = torch.cat([one for one, _ in made]), torch.cat([one for _, one in made])
        noise = torch.rand(weights.shape, generator=generator, device=self.device)
        heaviest = (weights + 0.01 * noise)[:, 1:].topk(int(TRAINED * self.stage.length), -1).indices + 1
        return {
            "tokens": tokens,
            "positions": heaviest,
            "weights": weights.gather(1, heaviest),
            "kinds": torch.tensor(kinds, device=self.device),
        }


def draw(kind: str, maker: Maker, rng: random.Random, rows: int, length: int) -> Rows:
    """Draw `rows` rows of one kind; their sizes come from `rng`, from small ones up to what a row holds."""
    width = rng.choice((1, 1, 1, 2, 4))
    if kind == "text":
        return maker.text(rows, length)
    if kind == "repeats":
        return maker.repeats(rows, length, rng.randint(8, length // 2))
    if kind == "middle":
        return maker.middle(rows, length, _log_uniform(rng, 2, _most(maker, length, 2 * (width + 3))), width)
    if kind == "ending":
        width = rng.choice((1, 1, 2, 4, 16))
        asked = rng.randint(1, 8) if length > 16 * (width + 3) else 1
        most = _most(maker, length - asked * (width + 3), width + 3)
        return maker.ending(rows, length, max(_log_uniform(rng, 2, most), asked), width, asked)
    if kind == "needle":
        return maker.ending(rows, length, rng.choice((1, 1, 2, 4)), width, 1)
    if kind == "chains":
        hops = rng.randint(1, 3)
        most = _most(maker, length - 8, 4 * (hops + 1), maker.tokens.keys // (hops + 1))
        return maker.chains(rows, length, _log_uniform(rng, 1, min(most, 16)), hops)
    return maker.common(rows, length, _log_uniform(rng, 4, 64), rng.randint(3, 8))


def _most(maker: Maker, length: int, width: int, keys: int | None = None) -> int:
    return max(min(int(0.95 * length) // width, keys or maker.tokens.keys), 2)


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(int(low * (max(high, low) / low) ** rng.random() + 0.5), max(high, low))


def answer_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weighted mean cross-entropy in nats at the chosen positions, and each kind's share of right answers.

    Only those positions go through the head: its output is the largest tensor of a step.
    """
    # a mask of None for each kind of layer keeps the causal kernel; without it, a compiled model builds [T, T] masks
    hidden = model.model(  # type: ignore[operator]
        input_ids=batch["tokens"], attention_mask={"full_attention": None}, use_cache=False
    ).last_hidden_state
    before = (batch["positions"] - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    logits = model.lm_head(hidden.gather(1, before)).float()  # type: ignore[operator]
    targets = batch["tokens"].gather(1, batch["positions"])
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    weights = batch["weights"]
    found = {"loss": (each.view_as(weights) * weights).sum() / weights.sum()}
    right = (logits.detach().argmax(-1) == targets).float()
    for index, kind in enumerate(KINDS):
        # of text every word counts, elsewhere the answers
        chosen = (batch["kinds"] == index)[:, None] * (weights > (0.0 if kind == "text" else 0.5)).float()
        found[kind] = (right * chosen).sum() / chosen.sum().clamp_min(1)
    return found
