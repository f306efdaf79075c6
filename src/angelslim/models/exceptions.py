"""What discovery cannot see, one row per family: the only per-model data in the package.

Keys are `config.model_type` of the whole model. A family without a row needs none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exceptions:
    """Facts about one family.

    `keep` names module paths, relative to a block, that must stay in full precision although they are plain
    linears (routers, whose rounding changes which experts run). `towers` maps a modality to a module path when
    the structural search would miss it. `sorted_experts` are stacked experts, relative to a block, that are called
    with every token once for each expert, scaled by the router's weight (zero where it was not chosen), beside the
    linear that reads the unscaled tokens.
    """

    keep: tuple[str, ...] = ()
    towers: tuple[tuple[str, str], ...] = ()
    sorted_experts: tuple[str, str] | None = None


NONE = Exceptions()
LLAMA_4 = Exceptions(
    keep=("feed_forward.router",), sorted_experts=("feed_forward.experts", "feed_forward.router")
)
TABLE: dict[str, Exceptions] = {
    "llama4": LLAMA_4,
    "llama4_text": LLAMA_4,
    "hunyuan_v1_moe": Exceptions(keep=("mlp.gate.wg",)),
}


def exceptions_of(model_type: str) -> Exceptions:
    """Return the family's row, or an empty one."""
    return TABLE.get(model_type, NONE)
