"""Static scales for a quantized key-value cache, read off the keys and values that attention sees.

An FP8 cache halves the memory of long contexts and of many requests at once. Engines store the keys after their
rotary embedding and the values as they are, so that is where the samples are watched (`models.attention`), in the
block as the steps before left it; the largest magnitude seen becomes the largest code (`numerics.kv_cache`). Weights
are not touched. Queries are never stored, but attention kernels on GPUs may multiply them in FP8 when the cache is
FP8: they get a scale too, which other kernels ignore.

Blocks without attention, such as the linear ones of hybrid models, have no cache and get no scales. Models with
latent attention (MLA) cache another thing than keys and values, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...base import parallel
from ...base.errors import ModelError, SchemeError
from ...models.attention import stored_name, watched
from ...models.block import Block
from ...models.inputs import Makers
from ...models.loading import Source
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.kv_cache import HeadRanges
from ...numerics.scheme import Quant, Scheme

ROLES = ("q", "k", "v")


class KeyValueCache:
    """Options: `quant`, how keys and values are quantized."""

    reads = frozenset({"quant"})
    follows_original = False
    keeps_function = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        quant = options["quant"]
        assert isinstance(quant, Quant)
        self.quant = quant

    def needs_data(self, scheme: Scheme) -> bool:
        """Static scales come from calibration."""
        if self.quant.dynamic:
            raise SchemeError(
                "The key-value cache cannot have dynamic scales.", fix="Remove dynamic from kv."
            )
        return True

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """Nothing beside the block."""
        return 0

    def statistics(self, block: Block) -> Makers:
        """Keys and values are no inputs of a linear."""
        return {}

    def process(self, block: Block) -> None:
        """Watch the block's attention and hand in its scales; an expert has none."""
        if block.index is None or block.runner is None:
            return
        path = block.source.structure.blocks[block.index]
        if block.module is not block.source.model.get_submodule(path):
            return
        _refuse(block.source)
        ranges: dict[nn.Module, tuple[HeadRanges, ...]] = {}

        def note(module: nn.Module, *states: Tensor) -> None:
            for seen, values in zip(ranges.setdefault(module, _empty()), states, strict=True):
                seen.update(values)

        with watched(block.module, note):
            block.collect({})
        modules = list(block.module.modules())
        reached = parallel.highest(torch.tensor([int(module in ranges) for module in modules]))
        for module in (modules[number] for number in reached.nonzero().flatten().tolist()):
            for seen in ranges.setdefault(
                module, _empty()
            ):  # here no sample may have come by, unlike elsewhere
                seen.merge()
        for name, module in block.module.named_modules():
            for role, seen in zip(ROLES, ranges.get(module, ()), strict=False):
                stored = stored_name(block.source, f"{path}.{name}")
                block.extra(f"{stored}.{role}_scale", seen.scale(self.quant))  # noqa: S610 (no SQL here)


def _empty() -> tuple[HeadRanges, ...]:
    return tuple(HeadRanges() for _ in ROLES)


def _refuse(source: Source) -> None:
    if getattr(source.config.get_text_config(), "kv_lora_rank", None):
        raise ModelError(
            f"{source.name} has latent attention: its cache holds a latent vector, not keys and values.",
            fix="Remove kv_cache.",
        )
    if not source.model._can_set_attn_implementation():
        raise ModelError(
            f"{type(source.model).__name__} computes its attention in a way that cannot be watched.",
            fix="Remove kv_cache.",
        )


METHOD = KeyValueCache
