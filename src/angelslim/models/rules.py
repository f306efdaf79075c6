"""How transformers' stacked experts come about from single matrices, where it has no rule of its own.

transformers joins the matrices of a layer's experts into two 3-D parameters by conversion rules, one set a family. A
family whose checkpoints hold the stacks themselves needs none, and cannot read the single matrices that engines want
of quantized experts. `with_experts` adds what is missing: rules for ``experts.*.gate_proj`` and its siblings.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PARTS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
UNLIKE = ("has_bias", "has_post_expert_norm")  # what single matrices do not say


def transposed(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """Say whether stacks of these shapes hold ``[in, out]``; None if they fit neither way.

    ``[experts, 2 * width, hidden]`` goes with ``[experts, hidden, width]``; no sizes fit both ways.
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    if gate_up[1] == down[2] and gate_up[2] == 2 * down[1]:
        return True
    return False if gate_up[2] == down[1] and gate_up[1] == 2 * down[2] else None


def splittable(module: nn.Module) -> bool:
    """Say whether a stacked module is a gate above an up projection and a down projection, and nothing else."""
    stacks = [getattr(module, name, None) for name in PARTS]
    if any(not isinstance(stack, nn.Parameter) for stack in stacks):
        return False
    plain = getattr(module, "has_gate", True) and getattr(module, "is_concatenated", True)
    return bool(plain) and not any(getattr(module, name, False) for name in UNLIKE)


def turns(rule: Any) -> bool:
    """Say whether a rule swaps rows and columns of what it joins."""
    return any(type(operation).__name__ == "Transpose" for operation in rule.operations)


def pattern_of(name: str) -> str:
    """Return the source pattern of the rule that reads an expert's matrix ``....experts.3.up_proj.weight``."""
    return re.sub(r"^.*experts\.\d+\.", "experts.*.", name)


def with_experts(model: nn.Module, rules: list[Any]) -> list[Any]:
    """Return transformers' rules with those for single experts at the end, where a model's experts need them."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    stacked = next((module for module in model.modules() if splittable(module)), None)
    if stacked is None:
        return rules
    shapes = [tuple(getattr(stacked, name).shape) for name in PARTS]
    turned = transposed(shapes[0], shapes[1])
    if turned is None:
        return rules
    added = []
    for stack, parts in PARTS.items():
        operations = [MergeModulelist(dim=0)]
        operations += [Concatenate(dim=1)] if len(parts) > 1 else []
        operations += [Transpose(1, 2)] if turned else []
        sources = [f"experts.*.{part}.weight" for part in parts]
        added.append(WeightConverter(sources, f"experts.{stack}", operations=operations))
    return [*rules, *added]
