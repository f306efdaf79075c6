"""What a run says aloud about its configuration before it begins: words without effect, and names that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from ..base.errors import ConfigError, did_you_mean
from . import schemes, sparsity
from .flat import FlatConfig
from .pruning import KNOWN_STRATEGIES
from .schema import AnyConfig, Compression, Config, PruningConfig
from .upstream import METHODS


def remarks(config: AnyConfig) -> list[str]:
    """What a run should say aloud about its configuration; a name that is a clear slip is a `ConfigError`."""
    notes: list[str] = []
    if not isinstance(config, FlatConfig) and config.model.trust_remote_code:
        notes.append("model.trust_remote_code is true: Python code that comes with the model may run.")
    if isinstance(config, PruningConfig):
        for strategy in config.compressor.strategies.by_place().values():
            notes += _unknown("pruning strategy", strategy.strategy, KNOWN_STRATEGIES, closed=False)
    if isinstance(config, Config):
        spin = config.transform.spin_config if config.transform else None
        online = [name for name in spin.rotation if name.upper() in ("R3", "R4")] if spin else []
        if online:
            notes.append(
                f"The rotation {' and '.join(online)} is left out: it cannot be fused into the weights, and engines that "
                "load an ordinary checkpoint do not compute it."
            )
        if config.dataset.share < 1 and not any(stage.trains for stage in config.compression):
            notes.append("dataset.share has no effect: nothing is trained.")
        for stage in config.compression:
            notes += _stage_remarks(stage)
    return notes


def _stage_remarks(stage: Compression) -> Iterator[str]:
    for teacher in (stage.qad, stage.distill):
        if teacher is not None and teacher.teacher_trust_remote_code:
            yield "teacher_trust_remote_code is true: Python code that comes with the teacher may run."
    for trained in (stage.qat, stage.qad):
        if trained is not None and trained.plugin_config and trained.plugin_config.enable_rotation:
            yield "plugin_config.enable_rotation is not used; the section transform rotates the weights."
    if stage.sparsity is not None:
        for part in sparsity.parts(stage.sparsity):
            yield from _unknown(
                "sparse attention method", part.name, (*sparsity.KNOWN_PATTERNS, sparsity.DENSE)
            )
        yield from sparsity.remarks(stage.sparsity)
    section = stage.quantization
    if section is None or section.name is None:
        return
    yield from _unknown("quantization method", section.name, METHODS)
    method = METHODS.get(section.name)
    if method and section.bits is not None and section.bits not in method.bits:
        yield f"quantization.bits is {section.bits}, but {section.name} has {method.bits[0]}; the name decides."
    inner = section.quant_method
    base = schemes.base(method.base) if method else None
    if base and base.input is None and inner.activation is not None:
        yield f"quant_method.activation is not used: {section.name} quantizes weights only."
    if method and 4 in method.bits and inner.weight == "per-group" and inner.group_size == -1:
        yield "group_size -1 means one scale per output channel here; the public tool takes 128."


def _unknown(kind: str, name: str, known: Iterable[str], closed: bool = True) -> Iterator[str]:
    """Refuse a slip of a known name (one letter off) when all names are known; tell of any other."""
    names = list(known)
    if name in names:
        return
    near = [word for word in get_close_matches(name, names, cutoff=0.85) if abs(len(word) - len(name)) <= 1]
    if near and closed:
        raise ConfigError(f"Unknown {kind} {name!r}.", fix=f"Did you mean {near[0]!r}?")
    yield f"The {kind} {name!r} is not known here. {did_you_mean(name, names)}"
