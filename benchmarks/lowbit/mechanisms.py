"""What the methods say happens inside: weights that leave the dead zone, zeros that move, gradients of many directions.

Looked at before every fiftieth step and after the last one, over all quantized layers:

``zeros``        share of ternary weights that are zero
``escaped``      of the weights that were zero at the last look, the share that is not now
``never_left``   of the weights that were zero at the first look, the share that was zero at every look since
``changed``      share of codes that changed since the last look
``fours_moved``  share of fours of inputs whose zero moved since the last look (3:4 sparse weights alone)
``rank``         effective rank of the gradient that one layer in the middle hands to its input, e to the entropy of the
                 normalised singular values (Roy & Vetterli 2007), over the tokens of a fixed batch of training rows
``training``     loss on that batch as the run computes it, with what fades
``exported``     loss on it without: the model that would be handed out now; the difference is what has to be unlearnt
``pull``         of the gradient of that layer's dead weights, the share of its size that comes through Tequila's bias
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from angelslim.methods.qat.base import master_weight, quantizers, set_progress
from angelslim.numerics.lowbit.record import LowBit
from angelslim.numerics.lowbit.sparse34 import FOUR

EVERY = 50
ROWS = 8


def effective_rank(matrix: Tensor) -> float:
    """Return e to the entropy of the normalised singular values of ``[tokens, channels]``.

    >>> round(effective_rank(torch.eye(4)), 3)
    4.0
    """
    values = matrix.double()
    values = values / values.abs().max().clamp(min=1e-300)
    singular = torch.linalg.eigvalsh(values.T @ values).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))


def transitions(before: Tensor | None, now: Tensor, stayed: Tensor) -> Tensor:
    """Return counts of one layer's int8 codes ``[out, in]``.

    They are: weights, zeros, zeros before, zeros that escaped, changed codes, fours whose zero moved, `stayed` ones.
    """
    zero = now == 0
    was, moved = (zero, torch.zeros_like(zero)) if before is None else (before == 0, now != before)
    fours = (zero ^ was).view(now.shape[0], -1, FOUR).any(-1)
    counts = (torch.ones_like(zero), zero, was, was & ~zero, moved, fours, stayed & zero)
    return torch.stack([count.sum() for count in counts]).double()


class Watch:
    """Tells the quantizers where the run is, and looks at them from time to time."""

    def __init__(self, model: Any, batch: Tensor, bf16: bool, looking: bool) -> None:
        self.model, self.batch, self.bf16 = model, batch[:ROWS].long(), bf16
        self.looking = looking and any(True for _ in quantizers(model))
        self.looks: list[dict[str, float]] = []
        self.codes: dict[str, Tensor] = {}
        self.stayed: dict[str, Tensor] = {}
        self.first_zeros = 0.0

    def __call__(self, step: int, steps: int) -> None:
        """Come before a step."""
        set_progress(self.model, step, steps)
        if self.looking and step % EVERY == 0:
            self.look(step)

    def finish(self, steps: int) -> list[dict[str, float]]:
        """Come after the last step and return all looks."""
        set_progress(self.model, steps, steps)
        if self.looking:
            self.look(steps)
        return self.looks

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Note what the codes do and how many directions the gradient has."""
        totals: Tensor | None = None
        ternary = sparse = True
        for name, linear, quantizer in quantizers(self.model):
            record = quantizer.merged(master_weight(linear))
            assert isinstance(record, LowBit)
            ternary = ternary and record.levels == "ternary"
            sparse = sparse and type(quantizer).__name__ == "Sherry"
            stayed = self.stayed.get(name, torch.ones_like(record.codes, dtype=torch.bool))
            counts = transitions(self.codes.get(name), record.codes, stayed)
            totals = counts if totals is None else totals + counts
            self.codes[name], self.stayed[name] = record.codes, stayed & (record.codes == 0)
        assert totals is not None
        weights, zeros, was, escaped, changed, fours, stayed_on = totals.tolist()
        self.first_zeros = self.first_zeros or zeros
        found = {"step": float(step), "changed": changed / weights}
        if ternary:
            found |= {"zeros": zeros / weights, "escaped": escaped / max(was, 1.0)}
            found["never_left"] = stayed_on / max(self.first_zeros, 1.0)
        if sparse:
            found["fours_moved"] = fours * FOUR / weights
        found |= self.gradients()
        self.model.eval()
        with self.arithmetic():
            loss = self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss
        self.model.train()
        self.looks.append(found | {"exported": loss.item()})

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Compute as the run does."""
        kind = self.batch.device.type
        return torch.autocast(kind, torch.bfloat16) if self.bf16 else nullcontext()

    @torch.enable_grad()
    def gradients(self) -> dict[str, float]:
        """Return loss, effective rank of dL/dX of the middle block's up projection, and pull where there is a bias."""
        self.model.train()
        blocks = self.model.model.layers
        layer: nn.Module = blocks[len(blocks) // 2].mlp.up_proj
        caught: list[Tensor] = []
        handle = layer.register_full_backward_hook(
            lambda _m, into, out: caught.extend([into[0].detach(), out[0].detach()])
        )
        found: dict[str, float] = {}
        try:
            with self.arithmetic():
                loss = self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss
            loss.backward()
            for _, linear, quantizer in quantizers(layer):
                if type(quantizer).__name__ == "Tequila":
                    found["pull"] = pull(linear, quantizer, caught[1].flatten(0, -2).float().sum(0))
        finally:
            handle.remove()
            self.model.zero_grad(set_to_none=True)
        return {"training": loss.item(), "rank": effective_rank(caught[0].flatten(0, -2)), **found}


@torch.no_grad()
def pull(linear: nn.Linear, quantizer: Any, to_bias: Tensor) -> float:
    """Return ``|lambda b| / |g|`` over a layer's dead weights, b the bias's gradient ``[out]``, g the weights' own."""
    weight = master_weight(linear)
    dead = quantizer.merged(weight).codes == 0
    through = quantizer.peak * to_bias[:, None] * dead
    assert weight.grad is not None
    return float(through.norm() / (weight.grad * dead).norm().clamp(min=1e-30))


@torch.no_grad()
def bias_sizes(model: Any, batch: Tensor) -> dict[str, float]:
    """Return, over the layers with a bias, how large it is beside the output: ``|b| / mean over tokens of |y|``."""
    sizes: list[Tensor] = []

    def measure(layer: Any, _inputs: Any, output: Tensor) -> None:
        sizes.append(layer.bias.norm() / output.flatten(0, -2).norm(dim=-1).mean())

    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    handles = [layer.register_forward_hook(measure) for layer in layers]
    model(input_ids=batch[:ROWS].long(), use_cache=False)
    for handle in handles:
        handle.remove()
    if not sizes:
        return {}
    values = torch.stack(sizes)
    return {"median": values.median().item(), "max": values.max().item()}
