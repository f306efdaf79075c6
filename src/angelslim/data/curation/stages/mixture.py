"""Choose how often each document is taken, so that sources have the wanted shares; always the last stage.

Training below four bits loses reasoning and long context first, so science, mathematics and long documents are given a
larger share than they have by nature. With the weights ``w`` and a budget ``B`` a source is to fill ``B w / sum(w)``. It
may not repeat a document more than `max_repeats` times (four passes over text are worth nearly as much as new text, arXiv
2305.16264); what a small source cannot fill goes to the others in proportion to their weights, and the report says so.
`long_documents` asks for a least share of the budget in documents from a given length on; their sources' shares stay, the
long documents in each are taken more often, within the same limit.

Within a source each document is taken ``floor(target / available)`` times, and a random choice (seeded) once more until
the next would exceed the target: each part stays below its target by less than one document. Sizes are counted in
characters, documents, or a tokenizer's tokens; kept in memory: one number a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from ....base.errors import ConfigError, DataError, did_you_mean
from ....config.fields import Int, Section, Share, Size, Word, not_a_truth_value
from ..base import Context, Documents
from ..ledger import Ledger

LEFT_OUT = "not drawn"
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(not_a_truth_value)]
Sizes = NDArray[np.int64]


class LongDocuments(Section):
    """How much of the budget long documents get at least."""

    share: Share = 0.0
    length: Annotated[Int, Field(ge=1)] = 32_768  # from this many units on a document is long


class Options(Section):
    """What the set is made of."""

    weights: dict[str, Weight] = Field(
        default_factory=dict
    )  # source -> weight; sources not named: other_weight
    other_weight: Weight = 1.0
    unit: Literal["characters", "tokens", "documents"] = "characters"
    tokenizer: Word | None = None  # folder, for unit: tokens
    budget: Size | None = None  # in units; none: as much as there is
    max_repeats: Annotated[Int, Field(ge=1, le=1000)] = 4
    long_documents: LongDocuments = Field(default_factory=LongDocuments)


class Mixture:
    """Takes documents by weight."""

    section: ClassVar[type[Section]] = Options
    changes: ClassVar[bool] = False
    last: ClassVar[bool] = True

    def __init__(self, options: Options, context: Context) -> None:
        self.options, self.context = options, context
        strange = [name for name in options.weights if name not in context.sources]
        if strange:
            raise ConfigError(
                f"weights names {strange[0]!r}, which is no source.",
                where=context.where,
                fix=did_you_mean(strange[0], context.sources),
            )
        self.weights = np.array([options.weights.get(name, options.other_weight) for name in context.sources])
        if not self.weights.any():
            raise ConfigError(
                "Every weight is 0.", where=context.where, fix="Give one source a weight above 0."
            )
        if (options.unit == "tokens") != (options.tokenizer is not None):
            fix = "Give both 'unit: tokens' and a tokenizer's folder, or neither."
            raise ConfigError("Tokens and a tokenizer belong together.", where=context.where, fix=fix)
        if options.long_documents.share and options.unit == "documents":
            fix = "Use the unit characters or tokens."
            raise ConfigError("A document has no length in documents.", where=context.where, fix=fix)
        self._tokenizer = _load_tokenizer(options.tokenizer, context.where) if options.tokenizer else None

    def reads(self) -> Sequence[Path]:
        """Return the tokenizer's files."""
        folder = self.options.tokenizer
        return sorted(Path(folder).expanduser().glob("tokenizer*")) if folder else ()

    def run(self, documents: Documents, ledger: Ledger) -> None:
        """Measure every document, choose, and name what is left out."""
        ledger.expect([LEFT_OUT])
        rows = [(document.index, document.source, self._size(document.text)) for document in documents]
        index, source, size = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        times, notes = mix(source, size, self.weights, self.options, self.context)
        ledger.notes += notes
        chosen = dict(zip(index.tolist(), times.tolist(), strict=True))
        for document in documents:
            if chosen[document.index]:
                ledger.take(document.index, chosen[document.index])
            else:
                ledger.drop(document, LEFT_OUT)

    def _size(self, text: str) -> int:
        if self._tokenizer is not None:
            return max(len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), 1)
        return 1 if self.options.unit == "documents" else max(len(text), 1)


def mix(
    source: Sizes, size: Sizes, weights: NDArray[np.float64], options: Options, context: Context
) -> tuple[Sizes, list[str]]:
    """Return how often each document is taken, and remarks; arrays have one entry a document."""
    count, most, unit = len(weights), options.max_repeats, options.unit
    long = size >= options.long_documents.length
    have = np.array(
        [[int(size[(source == s) & (long == kind)].sum()) for kind in (False, True)] for s in range(count)]
    )
    available = have.sum(axis=1)
    budget = options.budget or int(available[weights > 0].sum())
    wanted = budget * weights / weights.sum()
    target = share_out(budget, weights, most * available)
    notes = [
        f"{context.sources[s]} would need {wanted[s] / available[s]:.1f} repeats for its share; "
        f"it stops at {most} and gives {target[s] / max(target.sum(), 1):.1%} of the set."
        if available[s]
        else f"Of {context.sources[s]} the earlier stages left nothing; its share goes to the others."
        for s in range(count)
        if wanted[s] > most * available[s]
    ]
    if target.sum() < 0.999 * budget:
        notes.append(
            f"The budget of {budget:,} {unit} cannot be filled: {int(target.sum()):,} within {most} repeats."
        )
    natural = target * have[:, 1] / np.maximum(available, 1)
    least = options.long_documents.share * target.sum()
    long_target = natural
    if least > natural.sum():
        # Every source gives long documents in proportion to what it would give anyway, as far as it can; and what
        # its short documents cannot fill is no reason to exceed the limit of repeats.
        long_target = np.maximum(natural, share_out(least, natural, np.minimum(most * have[:, 1], target)))
        if long_target.sum() < 0.999 * least:
            notes.append(
                f"Long documents give {long_target.sum() / max(target.sum(), 1):.1%} of the set, "
                f"less than the asked {options.long_documents.share:.1%}: there are too few."
            )
    parts = np.stack([np.minimum(target - long_target, most * have[:, 0]), long_target], axis=1)
    times = np.zeros(len(size), dtype=np.int64)
    rng = np.random.default_rng([context.seed, 2])
    for s in range(count):
        for kind in (0, 1):
            members = np.flatnonzero((source == s) & (long == bool(kind)))
            times[members] = np.minimum(draw(size[members], parts[s, kind], rng), most)
    if not times.any():
        raise DataError(
            f"The budget of {budget:,} {unit} is smaller than any document.",
            where=context.where,
            fix="Raise it.",
        )
    return times, notes


def share_out(total: float, weights: NDArray[np.float64], caps: NDArray[Any]) -> NDArray[np.float64]:
    """Divide `total` in proportion to `weights`, none above its cap; what is cut off goes to the others.

    >>> share_out(100, np.array([1.0, 1.0, 2.0]), np.array([10, 100, 100])).tolist()
    [10.0, 30.0, 60.0]
    """
    given = np.zeros(len(weights))
    open_ = weights > 0
    while open_.any():
        rest = total - given[~open_].sum()
        share = np.where(open_, rest * weights / weights[open_].sum(), 0.0)
        full = open_ & (share >= caps)
        if not full.any():
            given[open_] = share[open_]
            break
        given[full] = caps[full]
        open_ &= ~full
    return given


def draw(sizes: Sizes, target: float, rng: np.random.Generator) -> Sizes:
    """Return how often to take each document so that together they come up to `target`, and not above it."""
    total = int(sizes.sum())
    if not total:
        return np.zeros(len(sizes), dtype=np.int64)
    goal = int(target + 1e-9 * total)  # a share computed in floating point may lie a hair below the whole
    times = np.full(len(sizes), goal // total, dtype=np.int64)
    order = rng.permutation(len(sizes))
    filled = np.cumsum(sizes[order])
    times[order[: int(np.searchsorted(filled, goal % total, side="right"))]] += 1
    return times


def _load_tokenizer(folder: str, where: str) -> Any:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"The tokenizer's folder {folder!r} does not exist.", where=where, fix="Check the path."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        fix = "Name the folder of a model that transformers opens."
        raise ConfigError(f"There is no tokenizer in {folder!r}.", where=where, fix=fix) from error


STAGE = Mixture
