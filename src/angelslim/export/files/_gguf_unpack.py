"""A GGUF file as a model folder again: config.json, tokenizer, and codes and scales as compressed-tensors keeps them.

Read are the graphs and types that are written here: dense Llama, Qwen2 and Qwen3; Q4_0 and Q8_0 inside the blocks,
F16, BF16 and F32. Nothing is rounded. Two things look different and are the same numbers: a block that is all zero
gets the scale 1, as no format here wants a scale of zero, and vectors, which GGUF keeps in float32, return to the
model's type where it holds them. Scales below zero are turned with their codes, but for those that meet the code -8
(+8 is no code): they stay below zero. What a file does not tell is refused: the parameters behind Llama 3.1's rotary
factors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.console import bar
from ...base.errors import ModelError, SchemeError
from ...models.checkpoint import UnitWriter, write_atomically
from ...numerics.packing import unpack_int4
from ...numerics.quantize import Quantized
from ...numerics.scheme import PRESETS, Scheme
from ..base import FORMATS, PREFERRED
from ._gguf_model import config_from, layer_names, turned_rows
from ._gguf_read import Header, Stored, read_bytes, read_header
from ._gguf_types import KINDS, PLAIN
from ._gguf_vocab import save_tokenizer

SCHEMES = {"Q4_0": PRESETS["q4_0"], "Q8_0": PRESETS["q8_0"]}
TYPES = {name: dtype for dtype, name in PLAIN.items()}
MAX_SHARD = 5 * 10**9


def unpack(file: Path, folder: Path) -> None:
    """Write the model in `file` as the compressed folder `folder`, which must not be there yet."""
    header = read_header(file)
    config = config_from(header.fields, [tensor.name for tensor in header.tensors], file)
    names = layer_names(header.fields)
    _refuse(header, names, file)
    embedding = next(tensor for tensor in header.tensors if tensor.name == "token_embd.weight")
    config.dtype = TYPES[embedding.kind]
    schemes = {_stem(names, t): SCHEMES[t.kind] for t in header.tensors if t.kind in SCHEMES}
    exporter = FORMATS.get(PREFERRED)
    folder.mkdir(parents=True)
    writer, units = UnitWriter(folder / ".units"), []
    with bar("reading", len(header.tensors)) as progress:
        for number, tensor in enumerate(header.tensors):
            units.append(f"{number:06d}")
            writer.write(units[-1], dict(_tensors(file, tensor, names, config, exporter)))
            progress.advance()
    writer.finish(units, folder, MAX_SHARD)
    for unit in units:
        writer.path(unit).unlink()
    writer.folder.rmdir()
    save_tokenizer(header.fields, folder, file)
    linears = [_stem(names, tensor) for tensor in header.tensors if _is_linear(tensor)]
    kept = [name for name in linears if name not in schemes]
    settings = config.to_diff_dict() | {"quantization_config": exporter.config(schemes, [*kept, "lm_head"])}
    settings["architectures"] = [_class_of(config)]
    settings["dtype"] = str(config.dtype).removeprefix("torch.")
    write_atomically(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())


def _refuse(header: Header, names: dict[str, str], file: Path) -> None:
    """Refuse a file with tensors that have no place in a folder, or of types that are not read."""
    kinds = {tensor.kind for tensor in header.tensors}
    if all(tensor.name != "token_embd.weight" for tensor in header.tensors):
        raise ModelError(f"{file} holds no embedding.", fix="Copy or write it again.")
    if not kinds & SCHEMES.keys():
        raise ModelError(f"{file} holds no Q4_0 or Q8_0 weights.", fix="Nothing in it is compressed exactly.")
    for tensor in header.tensors:
        problem = ""
        if tensor.name.rpartition(".")[0] not in names:
            problem = "has no place in a model folder"
        elif tensor.kind not in SCHEMES and tensor.kind not in TYPES:
            problem = f"has the type {tensor.kind}, which no folder holds"
        elif tensor.kind in SCHEMES and not _is_linear(tensor):
            problem = f"is quantized ({tensor.kind}), and is no linear layer of a block"
        if problem:
            raise SchemeError(
                f"{file}: tensor {tensor.name!r} {problem}.",
                fix="Start from the folder that the file was made of.",
            )


def _is_linear(tensor: Stored) -> bool:
    return tensor.name.startswith("blk.") and len(tensor.shape) == 2


def _stem(names: dict[str, str], tensor: Stored) -> str:
    return names[tensor.name.rpartition(".")[0]]


def _class_of(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def _tensors(
    file: Path, tensor: Stored, names: dict[str, str], config: Any, exporter: Any
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors of one in the file, rows in transformers' order."""
    name, leaf = _stem(names, tensor), tensor.name.rpartition(".")[2]
    data = read_bytes(file, tensor)
    order = turned_rows(name, tensor.shape[0], config, config.model_type)
    back = None if order is None else torch.argsort(order)
    if tensor.kind in SCHEMES:
        data = data if back is None else data[back]
        weight, scheme = _weight(data, tensor, name), SCHEMES[tensor.kind]
        yield from exporter.tensors(name, weight, scheme, None).items()
        return
    values = data.view(TYPES[tensor.kind]).reshape(tensor.shape)
    values = values if back is None else values[back]
    smaller = values.to(config.dtype)
    exact = values.dim() == 1 and torch.equal(smaller.float(), values.float())
    yield f"{name}.{leaf}", smaller if exact else values


def _weight(data: Tensor, tensor: Stored, name: str) -> Quantized:
    """Take blocks ``[out, bytes]`` apart: codes ``[out, in]``, float16 scales ``[out, in / 32]`` above zero."""
    kind, scheme = KINDS[tensor.kind], SCHEMES[tensor.kind]
    rows, columns = tensor.shape
    blocks = data.reshape(-1, kind.nbytes)
    scale = blocks[:, :2].contiguous().view(torch.float16).reshape(rows, -1)
    body = blocks[:, 2:].contiguous()
    if tensor.kind == "Q4_0":
        pairs = unpack_int4(body.view(torch.int32), kind.block).reshape(-1, kind.block // 2, 2)
        codes = pairs.transpose(1, 2).reshape(rows, -1, kind.block)
    else:
        codes = body.view(torch.int8).reshape(rows, -1, kind.block)
    codes, scale = _turned(codes, scale, scheme, name)
    return Quantized(codes.reshape(rows, columns), scale, None, scheme.weight)


def _turned(codes: Tensor, scale: Tensor, scheme: Scheme, name: str) -> tuple[Tensor, Tensor]:
    """Return the same numbers with scales above zero where every code has a negative, and none of zero."""
    if not bool(scale.isfinite().all()):
        raise ModelError(f"Layer {name!r} has a scale that is not finite.", fix="Write the file again.")
    turned = (scale < 0) & (codes != scheme.weight.format.low).all(-1)
    codes = torch.where(turned[..., None], -codes, codes)
    scale = torch.where(turned, -scale, scale)
    codes = torch.where((scale == 0)[..., None], torch.zeros_like(codes), codes)
    return codes, torch.where(scale == 0, torch.ones_like(scale), scale)
