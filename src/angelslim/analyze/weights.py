"""All layers of a checkpoint in one pass: the figures of each, and what quantization changed if the original is given.

Without the original, errors come from the run's own record (``run.json``) where there is one. With it they are
measured, which assumes that a stored weight stands for the original one. Methods that move scales between layers
(smoothing, AWQ, rotations) break that on purpose; they also change tensors that are not quantized, which is how they
are noticed and said.
"""

from __future__ import annotations

import heapq
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..base.console import bar
from ..base.errors import ModelError
from ..base.memory import return_large_blocks, trim
from ..numerics.analysis import at_limit, clipped, compare, describe, zero_share
from ..numerics.error import LayerRecord
from ..report.findings import Analysis, LayerFinding, places
from ..report.record import RunRecord
from .folders import Matrix, Opened, changed, check_pair, matrices, open_folder, read
from .outliers import SCALE_LIMIT, SPREAD, flag, ranked

HISTOGRAMS = 12
PARTED = 1.0  # dB that the measured SQNR may lie below the recorded one


def analyze(
    first: str | Path,
    second: str | Path | None = None,
    *,
    scale_limit: float = SCALE_LIMIT,
    spread: float = SPREAD,
    histograms: int = HISTOGRAMS,
) -> Analysis:
    """Analyze a checkpoint, or an original and its compressed copy; layers come back worst first.

    The `histograms` layers with the lowest SQNR keep their distributions.
    """
    return_large_blocks()
    subject = open_folder(first if second is None else second)
    original = None if second is None else open_folder(first)
    if original is not None:
        check_pair(original, subject)
    names = matrices(subject)
    if not names:
        raise ModelError(f"{subject.folder} holds no matrices.", fix="Name a model folder.")
    where, recorded = places(names), _recorded(subject.folder)
    layers: dict[str, LayerFinding] = {}
    kept: list[tuple[float, str]] = []  # a heap of the worst layers, the least bad on top
    with bar("analyzing", len(names)) as progress:
        for name in names:
            found = _finding(read(subject, name, original), where[name], recorded.get(name))
            layers[name] = found
            if found.histogram is not None:
                heapq.heappush(kept, (-(found.sqnr_db or 0.0), name))
                if len(kept) > histograms:
                    _, least = heapq.heappop(kept)
                    layers[least] = replace(layers[least], histogram=None)
            trim()
            progress.advance()
    flagged = flag(list(layers.values()), scale_limit, spread)
    return Analysis(
        compressed=subject.name,
        original=None if original is None else original.name,
        format=subject.format,
        measured=original is not None,
        layers=ranked(flagged),
        limits={"scale": scale_limit, "spread": spread},
        notes=_notes(subject, original, flagged),
    )


def _recorded(folder: Path) -> dict[str, LayerRecord]:
    """Return what the run that made the folder recorded of its layers."""
    with suppress(ModelError):
        return {layer.name: layer for layer in RunRecord.load(folder).layers}
    return {}


def _finding(matrix: Matrix, place: tuple[int | None, str], record: LayerRecord | None) -> LayerFinding:
    stored, restored, original = matrix.stored, matrix.restored, matrix.original
    values = describe(restored if original is None else original)
    found = LayerFinding(
        name=matrix.name,
        block=place[0],
        role=place[1],
        scheme=str(stored.scheme) if stored else "full precision",
        shape=tuple(restored.shape),
        amax=values.amax,
        p999=values.p999,
        p9999=values.p9999,
        kurtosis=values.kurtosis,
        zeros=zero_share(restored),
        scale=stored.weight.scale.float().abs().max().item() if stored else None,
        input_scale=_input_scale(matrix),
        at_limit=at_limit(stored.weight) if stored else None,
        sqnr_db=record.sqnr_db if record else None,
        relative_error=record.relative_error if record else None,
        output_error=record.output_error if record else None,
        note=record.note if record else "",
    )
    if original is None or stored is None:
        return found
    difference = compare(original, restored)
    return replace(
        found,
        clipped=clipped(original, stored.weight),
        flushed=difference.flushed,
        sqnr_db=difference.sqnr_db,
        relative_error=difference.relative_error,
        max_error=difference.max_error,
        mean_error=difference.mean_error,
        kl=difference.kl,
        wasserstein=difference.wasserstein,
        histogram=difference.histogram,
        note=_parted(found, difference.sqnr_db),
    )


def _input_scale(matrix: Matrix) -> float | None:
    """Return the static activation scale; NVFP4's is a divisor, and no scale in this sense."""
    stored = matrix.stored
    if stored is None or stored.input_scale is None or stored.scheme.input is None:
        return None
    return None if stored.scheme.input.dynamic else stored.input_scale.float().max().item()


def _parted(found: LayerFinding, measured: float) -> str:
    """Return the layer's note, with a word if the weight that was rounded is not the original's."""
    if found.sqnr_db is None or measured > found.sqnr_db - PARTED:
        return found.note
    text = f"the run rounded another weight (SQNR {found.sqnr_db:.1f} dB there): it was changed before"
    return f"{found.note}; {text}" if found.note else text


def _notes(subject: Opened, original: Opened | None, layers: list[LayerFinding]) -> list[str]:
    notes = []
    if original is not None:
        moved = list(changed(original, subject))
        if moved:
            notes.append(
                f"{len(moved)} tensors that were not quantized differ from the original's, such as {moved[0]}: the "
                "method moved scales between layers, so weights need not match and their errors say little."
            )
    parted = sum("rounded another weight" in layer.note for layer in layers)
    if parted:
        notes.append(
            f"{parted} layers were changed before they were rounded; their errors here include that."
        )
    flat = [layer.name for layer in layers if layer.amax == 0]
    notes += [f"{len(flat)} layers are zero throughout, such as {flat[0]}."] if flat else []
    return notes
