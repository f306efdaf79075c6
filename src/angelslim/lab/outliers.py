"""Give a small model the activation outliers of a large one, without changing what it computes.

Large language models have a few channels whose activations are hundreds of times the others', the same ones in every
layer; models of a few million parameters have none, and so cannot tell methods apart that were made for them
(SmoothQuant, LeptoQuant, rotations, clipping). `plant_outliers` multiplies a few channels of every norm's gain by a
factor and divides the matching columns of the linears that read the norm by it. Factors are powers of two, so
nothing is rounded, in any floating-point type: the new folder computes the original's logits, bit for bit, and its
linears see inputs with outliers. That it does is checked before the folder gets its name.

This is not all that outliers are: those of large models also come with single tokens, and only the inputs that follow
a norm get them here (those of the output and down projections stay as they are).
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..base.errors import ConfigError, ModelError, UserError
from ..models.checkpoint import UnitWriter
from ..models.loading import Source, open_model
from ..models.structure import Group
from ..reopen import load

MAX_SHARD = 5 * 10**9
CHECKED_TOKENS = 64


def plant_outliers(
    folder: str | Path, out: str | Path, *, factor: float = 1024.0, channels: int = 4, seed: int = 0
) -> Path:
    """Write the model in `folder` to `out` with `channels` outlier channels, each `factor` times as large as before.

    The channels are drawn with `seed`, the same ones for every norm of a width. Returns `out`.
    """
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} already exists.", fix="Choose another folder.")
    if factor <= 0 or math.frexp(factor)[0] != 0.5:
        raise ConfigError(f"factor is {factor}; only powers of two round nothing.", fix="Use 64, 1024, 4096.")
    source = open_model(folder)
    source.check()
    edits = _edits(source, factor, channels, seed)
    if not edits:
        raise ModelError(f"{folder} has no norm whose gain could be scaled.", fix="Use another small model.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    result = partial / "result"
    result.mkdir(parents=True)
    for file in source.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copyfile(file, result / file.name)
    writer = UnitWriter(partial / "units")
    names = list(source.checkpoint.tensors)
    for index, name in enumerate(names):
        value = source.checkpoint.read(name)
        writer.write(f"{index:06d}", {name: value * edits[name].to(value.dtype) if name in edits else value})
    writer.finish([f"{index:06d}" for index in range(len(names))], result, MAX_SHARD)
    _check(source, result, seed)
    result.rename(target)
    shutil.rmtree(partial)
    return target


def _edits(source: Source, factor: float, channels: int, seed: int) -> dict[str, Tensor]:
    """Return what each checkpoint tensor is multiplied with: ``[in]``, for a norm's gain and for columns alike."""
    stored = {target.parameter: name for name, target in source.targets.items() if target.pattern is None}
    drawn: dict[int, Tensor] = {}
    edits: dict[str, Tensor] = {}
    for groups in source.structure.groups.values():
        for group in groups:
            readers = [stored.get(f"{linear}.weight") for linear in group.linears]
            gain = stored.get(f"{group.source}.weight")
            if gain is None or group.others or None in readers or not _is_gain(source, group):
                continue
            width = source.checkpoint.tensors[gain].shape[0]
            if width not in drawn:
                generator = torch.Generator().manual_seed(seed)
                scale = torch.ones(width)
                scale[torch.randperm(width, generator=generator)[:channels]] = factor
                drawn[width] = scale
            edits[gain] = drawn[width]
            edits |= {reader: 1 / drawn[width] for reader in readers if reader is not None}
    return edits


def _is_gain(source: Source, group: Group) -> bool:
    """Say whether a group's source multiplies what it normalised by its weight, and adds nothing."""
    assert group.source is not None
    module = source.materialize(group.source, torch.device("cpu"))
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dim() != 1 or getattr(module, "bias", None) is not None:
        return False
    values = torch.randn(1, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        before = module(values)
        weight.mul_(2)
        after = module(values)
    source.free(group.source)
    return bool(torch.equal(2 * before, after))


def _check(source: Source, result: Path, seed: int) -> None:
    """Refuse a result that does not compute what the original did."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = source.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, CHECKED_TOKENS), generator=generator)
    with torch.no_grad():
        before, after = (load(folder)(input_ids=ids).logits for folder in (source.folder, result))
    if not torch.allclose(before.float(), after.float(), rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{source.folder} reads its norms in a way that was not seen; planting outliers changed its function.",
            fix="Use a model of another family.",
        )
