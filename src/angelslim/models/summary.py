"""A model's structure as plain rows, for ``angelslim inspect``."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from .loading import Source


def summarize(source: Source) -> dict[str, Any]:
    """Return facts (plain values) and tables (lists of rows) about an opened model."""
    structure, tensors = source.structure, source.checkpoint.tensors
    dtypes = Counter[str]()
    for info in tensors.values():
        dtypes[str(info.dtype).removeprefix("torch.")] += torch.Size(info.shape).numel()
    return {
        "architecture": type(source.model).__name__,
        "model type": structure.model_type,
        "parameters": f"{sum(dtypes.values()):,}",
        "types": ", ".join(f"{name} {count:,}" for name, count in dtypes.most_common()),
        "size": f"{source.checkpoint.nbytes / 1e6:,.1f} MB in {len({info.file for info in tensors.values()})} file(s)",
        "decoder": structure.decoder,
        "blocks": f"{len(structure.blocks)} ({structure.blocks[0]} ... {structure.blocks[-1]})",
        "head": structure.head or "none",
        "tied embeddings": str(bool(getattr(source.config, "tie_word_embeddings", False))),
        "not in the model": str(sum(name not in source.targets for name in tensors))
        + " tensors, carried over",
        "groups": _groups(source),
        "experts": [
            {"module": item.path, "experts": item.count, "weights": ", ".join(item.weights)}
            for item in structure.experts[:1]
        ],
        "towers": [{"modality": kind, "module": path} for kind, path in structure.towers.items()],
    }


def _groups(source: Source) -> list[dict[str, str]]:
    """Each distinct kind of group once, with the blocks that have it."""
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for index, block in enumerate(source.structure.blocks):
        for group in source.structure.groups[block]:
            key = (
                _local(group.source, block) if group.source else "-",
                ", ".join(_local(name, block) for name in group.linears),
                ", ".join(_local(name, block) for name in group.others),
            )
            kinds.setdefault(key, []).append(index)
    return [
        {"source": origin, "linears": linears, "others": others, "blocks": _ranges(found)}
        for (origin, linears, others), found in kinds.items()
    ]


def _local(name: str, block: str) -> str:
    return name.removeprefix(block + ".")


def _ranges(indices: list[int]) -> str:
    if indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
    return ", ".join(map(str, indices))
