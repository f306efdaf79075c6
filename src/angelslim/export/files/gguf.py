"""GGUF, the file that llama.cpp runs: Q4_0, Q8_0 and MXFP4 weights exactly as they were chosen.

Weights keep their codes and scales (`_gguf_blocks`), so scales must be numbers of float16; embeddings and heads in
full precision keep their type, vectors become float32. Written tensor by tensor, in the memory of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.console import bar
from ...base.errors import MissingExtra, ModelError, SchemeError
from ...models.loading import Source
from ...numerics.quantize import Quantized
from ...numerics.scheme import Quant
from .._checkpoint import QuantizedCheckpoint
from .._same import respelled, spellings
from ._gguf_blocks import TYPES, refuses, to_blocks
from ._gguf_model import add_shape, architecture, rope_factors, turned_rows
from ._gguf_vocab import add_tokenizer

if TYPE_CHECKING:
    import numpy as np

PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q8_0": "MOSTLY_Q8_0", "MXFP4": "MOSTLY_MXFP4_MOE"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, not read yet."""

    name: str  # llama.cpp's
    source: str  # the checkpoint's
    kind: str  # GGUF type
    shape: tuple[int, ...]
    quant: Quant | None  # of a quantized weight


class Gguf:
    """Writes and checks GGUF files."""

    def write(self, source: Source, out: Path) -> None:
        """Write an opened compressed model to the file `out`, which appears when it is complete."""
        library = _library()
        checkpoint = source.checkpoint
        assert isinstance(checkpoint, QuantizedCheckpoint)
        config = source.config.get_text_config()
        graph = architecture(source.config)
        entries = list(_entries(library, source, checkpoint, graph))
        temporary = out.with_name(out.name + ".tmp")
        writer = library.GGUFWriter(temporary, graph)
        try:
            kinds = [entry.kind for entry in entries if entry.quant is not None]
            writer.add_name(source.folder.resolve().name)
            writer.add_file_type(library.LlamaFileType[FILE_TYPES[max(set(kinds), key=kinds.count)]])
            writer.add_quantization_version(library.GGML_QUANT_VERSION)
            add_shape(writer, config)
            add_tokenizer(writer, source.folder, config.vocab_size)
            self._write_tensors(writer, library, entries, checkpoint, config, graph)
            writer.close()
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(out)
        finally:
            with suppress(OSError):
                writer.close()
            temporary.unlink(missing_ok=True)

    def _write_tensors(
        self,
        writer: Any,
        library: Any,
        entries: list[Entry],
        checkpoint: QuantizedCheckpoint,
        config: Any,
        graph: str,
    ) -> None:
        factors = rope_factors(config)
        if factors is not None:
            _announce(writer, library, "rope_freqs.weight", "F32", tuple(factors.shape))
        for entry in entries:
            _announce(writer, library, entry.name, entry.kind, entry.shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        with bar("writing", len(entries)) as progress:
            for entry in entries:
                writer.write_tensor_data(_bytes(entry, checkpoint, config, graph))
                progress.advance()

    def check(self, file: Path) -> int:
        """Decode every quantized tensor with the format's own library."""
        library = _library()
        try:
            tensors = library.GGUFReader(file).tensors
        except (ValueError, IndexError, OSError) as error:
            raise ModelError(f"{file} is no complete GGUF file ({error}).", fix="Write it again.") from error
        import numpy as np

        quantized = [tensor for tensor in tensors if tensor.tensor_type.name in FILE_TYPES]
        with bar("checking", len(quantized)) as progress:
            for tensor in quantized:
                if not np.isfinite(library.quants.dequantize(tensor.data, tensor.tensor_type)).all():
                    raise ModelError(
                        f"{file}: tensor {tensor.name!r} has a scale that is not finite.",
                        fix="Write it again.",
                    )
                progress.advance()
        return len(quantized)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("gguf", "gguf", "Writing GGUF files") from error
    return gguf


def _entries(library: Any, source: Source, checkpoint: QuantizedCheckpoint, graph: str) -> Iterator[Entry]:
    """Name every tensor and choose its type; what cannot be mapped or held is refused here, before any work."""
    config = source.config.get_text_config()
    kind_of = next(kind for kind, name in library.MODEL_ARCH_NAMES.items() if name == graph)
    names = library.get_tensor_name_map(kind_of, config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for tensor, info in checkpoint.tensors.items():
        if tensor.endswith("rotary_emb.inv_freq") or (tied and tensor == "lm_head.weight"):
            continue
        stem, _, leaf = tensor.rpartition(".")
        name = names.get_name(stem)
        if name is None or leaf not in ("weight", "bias"):
            raise ModelError(
                f"GGUF has no place for the tensor {tensor!r} in a model of type {graph!r}.",
                fix="Serve the folder with vLLM or SGLang.",
            )
        if stem in checkpoint.parts and leaf == "weight":
            quant = _quant(checkpoint, stem, (info.shape[0], info.shape[1]))
            yield Entry(f"{name}.{leaf}", tensor, TYPES[quant.format.name], info.shape, quant)
        else:
            kind = "F32" if len(info.shape) == 1 else PLAIN[info.dtype]
            yield Entry(f"{name}.{leaf}", tensor, kind, info.shape, None)


def _quant(checkpoint: QuantizedCheckpoint, name: str, shape: tuple[int, int]) -> Quant:
    """Return how a layer is written, or refuse it with the reason."""
    scheme = checkpoint.schemes[name]
    fitting = next((each for each in spellings(scheme) if not refuses(each, shape)), None)
    if fitting is None:
        raise SchemeError(
            f"GGUF cannot hold {scheme} exactly ({name}): {refuses(scheme, shape)}.",
            fix="Compress the model again with one of the recipes for GGUF (`angelslim ls`).",
        )
    return fitting.weight


def _announce(writer: Any, library: Any, name: str, kind: str, shape: tuple[int, ...]) -> None:
    import numpy as np

    raw = library.GGMLQuantizationType[kind]
    stored = library.quants.quant_shape_to_byte_shape(shape, raw)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=raw)


def _bytes(entry: Entry, checkpoint: QuantizedCheckpoint, config: Any, graph: str) -> np.ndarray[Any, Any]:
    """Read one tensor and return its bytes as the file has them."""
    stem = entry.source.rpartition(".")[0]
    order = turned_rows(stem, entry.shape[0], config, graph)
    if entry.quant is not None:
        weight = respelled(checkpoint.restore(stem).weight, entry.quant, stem)
        return to_blocks(weight if order is None else _reordered(weight, order), stem).numpy()
    tensor: Tensor = checkpoint.read(entry.source)
    tensor = tensor if order is None else tensor[order]
    tensor = tensor.float() if entry.kind == "F32" else tensor
    return tensor.contiguous().view(torch.uint8).numpy()


def _reordered(weight: Quantized, order: Tensor) -> Quantized:
    """Return the weight with its rows in another order; scales of whole columns stay."""
    scale = weight.scale[order] if weight.scale.shape[0] == weight.codes.shape[0] else weight.scale
    codes = weight.codes.view(torch.uint8)[order].view(weight.codes.dtype)
    return Quantized(codes, scale, None, weight.quant, weight.global_scale)


FORMAT = Gguf()
