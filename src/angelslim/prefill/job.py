"""From a recipe of sparse attention and a model to a run whose every choice is made.

Like `job.prepare`, `prepare_prefill` refuses what cannot be done before any work. Selectors are rehearsed: each chooses
blocks of a few hundred random tokens for every layer, so options that do not fit the model's layers, heads or blocks are
found here, by the code that will use them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..base.console import chose, log
from ..base.errors import ConfigError, DataError, ResourceError
from ..config.recipe import Resolved
from ..config.schema import Config
from ..config.sparsity import Measure, Sparsity, block_of, numbers, rules_of
from ..export._checkpoint import open_any
from ..job import device_of
from ..kernels.attention.base import Case
from ..kernels.attention.choose import choose
from ..methods.sparse._patterns import read_patterns
from ..methods.sparse.assign import selector_of
from ..methods.sparse.metadata import HeadRule, Metadata, fingerprint
from ..methods.sparse.plan import Context
from ..models.loading import Source, torch_dtype

SHORTEST, LONGEST_ON_CPU, LONGEST_ON_GPU = 1024, 8192, 131_072


@dataclass
class PrefillJob:
    """One run, decided; nothing has been written."""

    resolved: Resolved
    config: Config
    source: Source
    name: str  # of the section's own selector
    metadata: Metadata  # with the crossover that is asked for
    lengths: tuple[int, ...]
    measure: Measure
    search_heads: bool
    device: torch.device

    @property
    def shape(self) -> Shape:
        """The sizes of the model's attention."""
        return shape_of(self.source.config.get_text_config())

    def fingerprint(self) -> str:
        """Identify what the run is asked for."""
        settings = self.config.model_dump(mode="json", exclude={"global_": {"save_path"}})
        files = sorted({info.file for info in self.source.checkpoint.tensors.values()})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        parts: list[Any] = [settings, stats, str(self.source.folder.resolve()), __version__]
        parts += [torch.__version__, self.device.type]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Shape:
    """The sizes of attention in a text tower: layers, query and key-value heads, widths of keys and values."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    longest: int  # positions


def shape_of(config: Any) -> Shape:
    """Read the sizes from the configuration of a text tower; latent attention has more heads and other widths."""
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    value = getattr(config, "v_head_dim", None)
    if value is not None and getattr(config, "qk_nope_head_dim", None) is not None:
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
    return Shape(
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=heads if value is not None else int(getattr(config, "num_key_value_heads", None) or heads),
        width=int(width),
        value_width=int(value or width),
        longest=int(getattr(config, "max_position_embeddings", None) or LONGEST_ON_GPU),
    )


def prepare_prefill(resolved: Resolved, model: str | Path | None = None) -> PrefillJob:
    """Make every choice of a run; refuse what cannot be done."""
    config = resolved.config
    assert isinstance(config, Config)
    if len(config.compression) > 1 or config.transform is not None:
        raise ConfigError(
            "Sparse attention changes no weights and joins no other stage in one recipe yet.",
            fix="Run the other stages first, then this one on the folder that they leave.",
        )
    section = config.compression[0].sparsity
    if section is None:
        raise ConfigError(
            "The recipe has no section compression.sparsity.", fix="Extend sparse_stem, for example."
        )
    reference = model or config.model.model_path
    if not reference:
        raise ConfigError("No model is named.", fix="Give a folder or 'tiny-lm', or set model.model_path.")
    _check_data(config)
    source = open_any(reference, trust_remote_code=config.model.trust_remote_code)
    source.check()
    device = device_of(config.global_.device)
    text = source.config.get_text_config()
    shape = shape_of(text)
    metadata = Metadata(
        rules=_rules(section, shape),
        block=block_of(section),
        crossover=section.crossover,
        kernel=_kernel(section, shape, device, torch_dtype(source.config)),
        model=fingerprint(text),
    )
    for rule in metadata.rules:
        if rule.options.get("patterns"):
            read_patterns(str(rule.options["patterns"]), metadata.model)
    rehearse(metadata, shape)
    return PrefillJob(
        resolved=resolved,
        config=config,
        source=source,
        name=section.name,
        metadata=metadata,
        lengths=_lengths(section, shape, device),
        measure=section.measure,
        search_heads=section.search_heads and section.name == "minference",
        device=device,
    )


def rehearse(metadata: Metadata, shape: Shape) -> None:
    """Let every selector choose blocks of random tokens for each layer, on the CPU."""
    rules = metadata.make_rules()
    length = 2 * metadata.block + 1
    generator = torch.Generator().manual_seed(0)

    def states(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, heads, length, width, generator=generator)

    q, k = states(shape.heads, shape.width), states(shape.kv_heads, shape.width)
    v = states(shape.kv_heads, shape.value_width)
    for layer in range(shape.layers):
        selector = selector_of(rules, layer, shape.heads)
        if selector is not None:
            selector(q, k, v, Context(layer, shape.layers, shape.width**-0.5, 0, length, metadata.block))


def _rules(section: Sparsity, shape: Shape) -> tuple[HeadRule, ...]:
    return tuple(
        HeadRule(
            rule.selector,
            _absolute(rule.options),
            numbers(rule.layers, shape.layers, "layer"),
            numbers(rule.heads, shape.heads, "head"),
        )
        for rule in rules_of(section)
    )


def _absolute(options: Any) -> dict[str, Any]:
    """Paths in a recipe start where the run does; the result may lie anywhere."""
    path = options.get("patterns")
    return dict(options) if not path else {**options, "patterns": str(Path(str(path)).expanduser().resolve())}


def _kernel(section: Sparsity, shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel's name, or "auto" where one that is sparse will be found."""
    case = Case(device, dtype, shape.width, shape.value_width, block_of(section), block_of(section))
    kernel, why = choose(case, section.kernel)
    if section.kernel != "auto" or kernel.name != "dense":
        return section.kernel
    if not section.allow_pseudo_sparse:
        raise ResourceError(
            f"No sparse kernel runs here: {why}.",
            fix="Set compression.sparsity.allow_pseudo_sparse to true to measure quality all the same, without speed.",
        )
    chose("the masked reference kernel, as slow as dense attention", why)
    return "dense"


def _lengths(section: Sparsity, shape: Shape, device: torch.device) -> tuple[int, ...]:
    """The lengths that are measured, ascending; what the model has no positions for is refused or left out."""
    given = section.measure.lengths
    if given:
        if max(given) > shape.longest:
            raise ConfigError(
                f"compression.sparsity.measure.lengths asks for {max(given)} tokens; the model has positions for "
                f"{shape.longest}.",
                fix="Shorten the lengths.",
            )
        return tuple(sorted(set(given)))
    most = min(shape.longest, LONGEST_ON_GPU if device.type == "cuda" else LONGEST_ON_CPU)
    found, length = [], SHORTEST
    while length <= most:
        found.append(length)
        length *= 2
    if not found:
        log.warning("The model has positions for %d tokens: sparse attention is made for long prompts.", most)
    return tuple(found) or (most,)


def _check_data(config: Config) -> None:
    path = config.dataset.data_path
    if path and not Path(path).expanduser().exists() and "/" not in path:
        raise DataError(f"There is no data file {path!r}.", fix="Check dataset.data_path.")
