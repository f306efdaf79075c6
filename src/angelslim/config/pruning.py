"""The token pruning dialect: two top-level sections, ``model_mapping`` and ``compressor``.

`compressor.strategies` maps ``global`` (after the vision tower) or a layer index of the language model to a
strategy. `model_mapping` names the modules that the public tool wraps; here modules are found by structure, so
the mapping is accepted and checked but not needed.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ConfigDict, Field

from .fields import Int, Ints, Number, Section, Share, Word

KNOWN_STRATEGIES = (
    "baseline",
    "dart",
    "divprune",
    "hiprune",
    "idpruner",
    "random",
    "scope",
    "special_token_based_attention",
    "vision_selector",
    "visionzip",
    "vispruner",
)


class ModelMapping(Section):
    """One module of the model and the class that the public tool puts in its place."""

    name: str | None = None
    path: str | None = None
    wrapper_module: str | None = None
    wrapper_class: str | None = None


class Requirements(Section):
    """Which activations the strategies read."""

    feature_map: bool | None = None
    image_grid_thw: bool | None = None
    inputs_embeds: bool | None = None
    vision_token_mask: bool | None = None
    vit_q_layers: Ints | None = None
    vit_k_layers: Ints | None = None
    llm_q_layers: Ints | None = None
    llm_k_layers: Ints | None = None


class QuerySource(Section):
    """Which tokens ask, when attention to the media tokens is the score."""

    strategy: Word | None = None


class StrategyArguments(Section):
    """The knobs of all strategies; `ratio` is the share of media tokens removed."""

    ratio: Share | None = None
    alpha: Number | None = None
    important_ratio_of_kept: Share | None = None
    last_vit_layer: Int | None = None
    layer_idx: Int | None = None
    mmr_lambda: Number | None = None
    object_layer: Int | None = None
    parallel_k: Int | None = None
    pivot_image_token: Int | None = None
    pivot_text_token: Int | None = None
    query_source: QuerySource | None = None
    selector_path: str | None = None
    use_post_rope: bool | None = None
    zip_ratio: Share | None = None


class ModelRelated(Section):
    """Arguments that depend on the model's size: ``selector_path: {7b: ..., 3b: ...}``."""

    selector_path: dict[str, str | None] | None = None


class Strategy(Section):
    """One pruning strategy and its arguments."""

    strategy: str
    params: StrategyArguments = Field(default_factory=StrategyArguments)
    model_related_params: ModelRelated | None = None


class Strategies(Section):
    """``global``, or the index of a decoder layer, to the strategy applied there."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Strategy]

    global_: Strategy | None = Field(default=None, alias="global")

    @classmethod
    def extra_section(cls, key: str) -> type[Section] | None:
        """A layer index holds a `Strategy`."""
        return Strategy if re.fullmatch(r"-?\d+", key) else None

    def by_place(self) -> dict[str, Strategy]:
        """``global`` first, then the layer indices in rising order."""
        layers: dict[str, Any] = self.__pydantic_extra__ or {}
        first = {"global": self.global_} if self.global_ else {}
        return {**first, **{key: layers[key] for key in sorted(layers, key=int)}}


class Compressor(Section):
    """What is pruned where."""

    requirements: Requirements = Field(default_factory=Requirements)
    strategies: Strategies = Field(default_factory=lambda: Strategies.model_validate({}))
