"""GGUF, the file that llama.cpp runs: weights exactly as they were chosen.

`Gguf` makes the file of a compressed folder: Q4_0, Q8_0, Q4_K and MXFP4 (`_gguf_blocks`), whose scales must be numbers of
float16. `write_model` is what it stands on: any model folder, and for some of its matrices `Blocks` that take their
places, so that weights of other kinds (`_gguf_lowbit`) get into a file too. Embeddings and heads in full precision
keep their type, vectors become float32. Written tensor by tensor, in the memory of one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...base.console import bar, chose
from ...base.errors import MissingExtra, ModelError, SchemeError, did_you_mean
from ...models.loading import Source
from ...numerics.scheme import Quant
from .._checkpoint import QuantizedCheckpoint
from .._same import respelled, spellings
from ._gguf_blocks import refuses, to_blocks, type_of
from ._gguf_lowbit import gguf_types, pack
from ._gguf_model import add_shape, architecture, has_place, rope_factors, turned_rows
from ._gguf_read import check_scales, read_header
from ._gguf_types import KINDS, PLAIN
from ._gguf_unpack import unpack
from ._gguf_vocab import add_tokenizer

__all__ = ["FORMAT", "ROUNDED", "Blocks", "Gguf", "gguf_types", "pack", "write_model"]

LOW_BIT = {"ternary": "ternary", "ternary34": "ternary", "seq2": "seq"}  # number format -> kind of weights
FASTEST = (
    "Q2_K",
    "TQ2_0",
    "Q4_0",
    "Q2_0",
    "TQ1_0",
)  # llama.cpp multiplies with Q2_0 one number at a time on x86
ROUNDED = "angelslim.rounded_scales"  # key of the file: layers whose scales were rounded to float16 for it


@dataclass(frozen=True)
class Blocks:
    """What takes the place of one matrix ``[out, in]``: a GGUF type, and its bytes ``[out, bytes of a row]``.

    The bytes may be a function that makes them when they are written, so that one matrix is in memory at a time.
    `rounded` says that they do not hold the scales exactly; the file then names the layer.
    """

    kind: str
    data: Tensor | Callable[[], Tensor]
    rounded: bool = False


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, not read yet."""

    name: str  # llama.cpp's
    kind: str  # GGUF type
    shape: tuple[int, ...]
    make: Callable[[], Tensor]  # its bytes, or the tensor itself, rows as the graph wants them


def write_model(source: Source, out: Path, weights: Mapping[str, Blocks]) -> None:
    """Write an opened model to the file `out`, which appears when it is complete.

    `weights` maps layers (``model.layers.0.mlp.up_proj``) to blocks; every other tensor is written as it is, in its
    own type. What llama.cpp has no graph, place or tokenizer for is a `ModelError`, raised before anything is written.
    """
    library = _library()
    graph = architecture(source.config)
    entries = list(_entries(library, source, weights, graph))
    temporary = out.with_name(out.name + ".tmp")
    writer = library.GGUFWriter(temporary, graph)
    try:
        writer.add_name(source.folder.resolve().name)
        writer.add_file_type(KINDS[_main_kind(entries, weights)].file_type)
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
        if rounded := sorted(name for name, blocks in weights.items() if blocks.rounded):
            writer.add_array(ROUNDED, rounded)
        config = source.config.get_text_config()
        add_shape(writer, config)
        add_tokenizer(writer, source.folder, config.vocab_size)
        _write_tensors(writer, entries)
        writer.close()
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(out)
    finally:
        with suppress(OSError):
            writer.close()
        temporary.unlink(missing_ok=True)


class Gguf:
    """Writes and checks GGUF files."""

    def write(self, source: Source, out: Path, kind: str = "") -> None:
        """Write an opened compressed model; what no type, or not the type `kind`, holds exactly is a `SchemeError`."""
        checkpoint = source.checkpoint
        assert isinstance(checkpoint, QuantizedCheckpoint)
        kind = kind.upper()
        if kind and kind not in KINDS:
            raise SchemeError(f"Unknown GGUF type {kind!r}.", fix=did_you_mean(kind, KINDS))
        weights = {name: _blocks(checkpoint, name, kind) for name in checkpoint.parts}
        if not kind:
            _say_smaller(checkpoint, weights)
        write_model(source, out, weights)

    def unpack(self, file: Path, folder: Path) -> None:
        """Write a file as a compressed-tensors folder with the same numbers."""
        unpack(file, folder)

    def check(self, file: Path) -> int:
        """Return the number of quantized tensors; a damaged file or a scale that is not finite is a `ModelError`."""
        quantized = [tensor for tensor in read_header(file).tensors if tensor.kind not in PLAIN.values()]
        with bar("checking", len(quantized)) as progress:
            for tensor in quantized:
                check_scales(file, tensor)
                progress.advance()
        return len(quantized)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("gguf", "gguf", "Writing GGUF files") from error
    return gguf


def _blocks(checkpoint: QuantizedCheckpoint, name: str, wanted: str) -> Blocks:
    """Return how a compressed layer is written, or refuse it with the reason."""
    rows, columns = checkpoint.tensors[f"{name}.weight"].shape
    scheme = checkpoint.schemes[name]
    if scheme.weight.format.name in LOW_BIT:
        return _low_bit(checkpoint, name, wanted)
    fitting = next((each for each in spellings(scheme) if not refuses(each, (rows, columns))), None)
    if fitting is None:
        raise SchemeError(
            f"GGUF cannot hold {scheme} exactly ({name}): {refuses(scheme, (rows, columns))}.",
            fix="Compress the model again with one of the recipes for GGUF (`angelslim ls`).",
        )
    kind = type_of(fitting.weight)
    if wanted not in ("", kind):
        raise SchemeError(f"{name} fits {kind}, not {wanted}.", fix="Leave the type out.")
    return Blocks(kind, partial(_packed, checkpoint, name, fitting.weight))


def _held(checkpoint: QuantizedCheckpoint, name: str) -> list[str]:
    """Return the types that hold a layer of two bits or less, smallest first."""
    quant, columns = checkpoint.schemes[name].weight, checkpoint.tensors[f"{name}.weight"].shape[1]
    return gguf_types(LOW_BIT[quant.format.name], quant.granularity.columns or columns)


def _say_smaller(checkpoint: QuantizedCheckpoint, weights: Mapping[str, Blocks]) -> None:
    """Say which type was chosen for speed where a smaller one is as exact."""
    for name, blocks in weights.items():
        low = checkpoint.schemes[name].weight.format.name in LOW_BIT
        if low and (smallest := _held(checkpoint, name)[0]) != blocks.kind:
            chose(blocks.kind, f"llama.cpp runs it fastest; gguf:{smallest.lower()} is smaller and as exact")
            return


def _low_bit(checkpoint: QuantizedCheckpoint, name: str, wanted: str) -> Blocks:
    """Return how a layer of two bits or less is written: in the wanted type, or the one that llama.cpp runs fastest."""
    quant, held = checkpoint.schemes[name].weight, _held(checkpoint, name)
    kind = LOW_BIT[quant.format.name]
    chosen = wanted or next((each for each in FASTEST if each in held), "")
    if chosen not in held:
        listed = ", ".join(held) or "none"
        raise SchemeError(
            f"GGUF's {chosen or 'types'} cannot hold {quant} exactly ({name}); those that can: {listed}.",
            fix="Train with one scale a row, or groups of a multiple of 32.",
        )
    return Blocks(chosen, partial(_low_bit_packed, checkpoint, name, kind, chosen))


def _low_bit_packed(checkpoint: QuantizedCheckpoint, name: str, kind: str, chosen: str) -> Tensor:
    weight = checkpoint.restore(name).weight
    codes = weight.codes + 2 if kind == "seq" else weight.codes
    return pack(kind, chosen, codes, weight.scale.float())


def _packed(checkpoint: QuantizedCheckpoint, name: str, quant: Quant) -> Tensor:
    return to_blocks(respelled(checkpoint.restore(name).weight, quant, name), name)


def _main_kind(entries: list[Entry], weights: Mapping[str, Blocks]) -> str:
    """Return the type that most of the quantized matrices have, or most of all matrices if none is quantized."""
    kinds = [blocks.kind for blocks in weights.values()]
    return Counter(kinds or [entry.kind for entry in entries if len(entry.shape) > 1]).most_common(1)[0][0]


def _entries(library: Any, source: Source, weights: Mapping[str, Blocks], graph: str) -> Iterator[Entry]:
    """Name every tensor and choose its type; what cannot be mapped is refused here, before any work."""
    config = source.config.get_text_config()
    kind_of = next(kind for kind, name in library.MODEL_ARCH_NAMES.items() if name == graph)
    names = library.get_tensor_name_map(kind_of, config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    factors = rope_factors(config)
    if factors is not None:
        yield Entry("rope_freqs.weight", "F32", tuple(factors.shape), lambda: factors)
    left = set(weights)
    for tensor, info in source.checkpoint.tensors.items():
        if tensor.endswith("rotary_emb.inv_freq") or (tied and tensor == "lm_head.weight"):
            continue
        stem, _, leaf = tensor.rpartition(".")
        name = names.get_name(stem)
        if name is None or not has_place(tensor, graph):
            raise ModelError(
                f"GGUF has no place for the tensor {tensor!r} in a model of type {graph!r}.",
                fix="Serve the folder with vLLM or SGLang.",
            )
        blocks = weights.get(stem) if leaf == "weight" else None
        left.discard(stem if blocks else "")
        kind = blocks.kind if blocks else "F32" if len(info.shape) == 1 else PLAIN[info.dtype]
        order = turned_rows(stem, info.shape[0], config, graph)
        read = partial(source.checkpoint.read, tensor)
        yield Entry(f"{name}.{leaf}", kind, info.shape, partial(_made, blocks, read, kind, order))
    assert not left, f"no such layers: {sorted(left)}"


def _made(blocks: Blocks | None, read: Callable[[], Tensor], kind: str, order: Tensor | None) -> Tensor:
    """Return what is written of one tensor; a row is turned with its codes and scales, or its bias."""
    if blocks is None:
        tensor = read().float() if kind == "F32" else read()
    else:
        tensor = blocks.data if isinstance(blocks.data, Tensor) else blocks.data()
    return tensor if order is None else tensor[order]


def _write_tensors(writer: Any, entries: list[Entry]) -> None:
    for entry in entries:
        kind = KINDS[entry.kind]
        size = kind.bytes_of(prod(entry.shape))
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind.number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with bar("writing", len(entries)) as progress:
        for entry in entries:
            writer.write_tensor_data(entry.make().contiguous().view(torch.uint8).numpy())
            progress.advance()


FORMAT = Gguf()
