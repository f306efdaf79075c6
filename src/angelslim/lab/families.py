"""Ask transformers what the blocks of common dense families look like, and write ``models/families.json``.

    python -m angelslim.lab.families

Each family is built twice without memory, with sizes that tell apart what a tensor's sides stand for. Run it when a
family is added to `FAMILIES`, or for a new major version of transformers.
"""

from __future__ import annotations

import json
from itertools import combinations_with_replacement
from typing import Any

from ..models.families import FILE, NUMBER
from ..models.loading import probe_model
from ..models.structure import Structure, discover

FAMILIES = (  # others of the kind differ from block to block (OLMo 2), or cannot be run without memory (Helium)
    "arcee", "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite",
    "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "nemotron", "olmo", "phi3", "qwen2", "qwen3",
    "seed_oss", "smollm3",
)  # fmt: skip
OPTIONS = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias")
BLOCKS = 2
SETTINGS: dict[str, Any] = {
    "hidden_size": 84, "intermediate_size": 112, "vocab_size": 304, "num_attention_heads": 6, "num_key_value_heads": 2,
    "num_hidden_layers": BLOCKS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEAD = 16
SIZES = {"hidden": 84, "inner": 112, "vocabulary": 304, "head": HEAD, "queries": 6 * HEAD, "keys": 2 * HEAD}


def describe(family: str) -> dict[str, Any]:
    """Return one family as ``families.json`` holds it; a ValueError where it does not follow the rule."""
    plain = _config(family, head_dim=HEAD)
    options = {name: getattr(plain, name) for name in OPTIONS if hasattr(plain, name)}
    base = _config(family, head_dim=HEAD, **dict.fromkeys(options, False))
    model = probe_model(base)
    structure = discover(model)
    first, second = structure.blocks
    if structure.experts or structure.towers or structure.keep or structure.tuple_outputs:
        raise ValueError(f"{family} has parts that no pattern here speaks of")
    if not structure.head or any(group.others for each in structure.groups.values() for group in each):
        raise ValueError(f"{family} has no head of its own, or weights beside its linears")
    block = _inside(model, first)
    if block != _inside(model, second) or _groups(structure, first) != _groups(structure, second):
        raise ValueError(f"the blocks of {family} differ")
    every = dict(model.named_parameters(remove_duplicate=False))
    outside = {
        name: list(value.shape)
        for name, value in every.items()
        if not name.startswith((f"{first}.", f"{second}."))
    }
    return {
        "architecture": type(model).__name__,
        "head_dim": _head_dim(family),
        "tied": bool(plain.tie_word_embeddings),
        "decoder": structure.decoder,
        "block": first.removesuffix("0") + NUMBER,
        "embeddings": list(structure.embeddings),
        "head": structure.head,
        "groups": _groups(structure, first),
        "linears": [
            name.removeprefix(f"{first}.") for name in structure.linears if name.startswith(f"{first}.")
        ],
        "parameters": _named(block),
        "outside": _named(outside),
        "options": options,
        "added": {option: _named(_added(family, base, option, block)) for option in options},
    }


def write() -> None:
    """Ask about every family and write the file."""
    import transformers

    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(describe(name))}" for name in FAMILIES)
    version = json.dumps(transformers.__version__)
    FILE.write_text(f'{{"transformers": {version}, "families": {{\n{lines}\n}}}}\n', "utf-8")


def _config(family: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SETTINGS, **settings})


def _head_dim(family: str) -> int | None:
    """Return the size of a head where config.json names none; None where it follows from the others."""
    size = getattr(_config(family, hidden_size=60), "head_dim", None)
    return None if size == 60 // 6 else size


def _inside(model: Any, block: str) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.get_submodule(block).named_parameters()}


def _added(family: str, base: Any, option: str, block: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the parameters that an option adds to a block."""
    chosen = {name: False for name in OPTIONS if hasattr(base, name)} | {option: True}
    model = probe_model(_config(family, head_dim=HEAD, **chosen))
    larger = _inside(model, discover(model).blocks[0])
    return {name: shape for name, shape in larger.items() if name not in block}


def _groups(structure: Structure, block: str) -> list[list[Any]]:
    prefix = f"{block}."
    return [
        [
            None if group.source is None else group.source.removeprefix(prefix),
            [name.removeprefix(prefix) for name in group.linears],
        ]
        for group in structure.groups[block]
    ]


def _named(shapes: dict[str, list[int]]) -> dict[str, list[str]]:
    return {name: [_size(side) for side in shape] for name, shape in shapes.items()}


def _size(side: int) -> str:
    """Return the name of a side's length, or the sum of names that it is."""
    for count in (1, 2, 3):
        for names in combinations_with_replacement(SIZES, count):
            if sum(SIZES[name] for name in names) == side and (
                count < 3 or set(names) == {"queries", "keys"}
            ):
                return "+".join(names)
    raise ValueError(f"no size of the configuration is {side}")


if __name__ == "__main__":
    write()
