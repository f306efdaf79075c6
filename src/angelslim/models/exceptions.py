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
    the structural search would miss it.
    """

    keep: tuple[str, ...] = ()
    towers: tuple[tuple[str, str], ...] = ()


NONE = Exceptions()
TABLE: dict[str, Exceptions] = {
    "hunyuan_v1_moe": Exceptions(keep=("mlp.gate.wg",)),
}


def exceptions_of(model_type: str) -> Exceptions:
    """Return the family's row, or an empty one."""
    return TABLE.get(model_type, NONE)
