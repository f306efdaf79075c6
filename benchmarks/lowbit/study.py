"""What the low-bit study compares: sizes, methods, and its runs in their order. Nothing here computes.

Every method starts from the same checkpoint, trains on the same batches in the same order (a seed decides the order),
and tries the same learning rates, a third of the steps each, judged on the dev split. The test split is read once a
final run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from angelslim.numerics.distillation import Distillation

RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
PARTS = (10, 25, 50)  # per cent of the steps; 100 is the final run
RECOVERY = ("seq2", "tequila_1e-3", "sherry_cosine", "absmean_g128")
# What is said to help, its baselines, and ours: one seed with every look inside.
MECHANISMS = (
    "fp",
    "absmean_g128",
    "twn",
    "tequila_1e-3",
    "tequila_1e-2",
    "tequila_1e-1",
    "sherry_none",
    "sherry_linear",
    "sherry_cosine",
    "sherry_exponential",
    "sherry_early",
    "sherry_phase",
    "twn_phase",
)
SPEED = ("absmean_g128", "tequila_1e-3", "sherry_cosine", "seq2", "twn", "lsq2")
WIDE_SPEED = ("absmean_g128", "tequila_1e-3", "sherry_cosine", "seq2")
VOCABULARY = 4096

Kind = Literal["base", "trial", "final", "part", "plain", "ptq"]
CE = Distillation("lm")


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings and heads of 64."""

    hidden: int
    layers: int
    inner: int

    @property
    def linears(self) -> int:
        """How many weights its quantized layers have."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.inner)

    def bytes(self, bits: float) -> float:
        """Return the size of the model with `bits` a linear weight and 16 an embedding's, norms left out."""
        return self.linears * bits / 8 + VOCABULARY * self.hidden * 2


@dataclass(frozen=True)
class Study:
    """The size of everything. `dense` is the model of the 2-bit model's bytes."""

    size: str
    shape: Shape
    dense: Shape
    length: int  # tokens a row
    rows: int  # rows a batch
    steps: int  # of quantization-aware training
    base_steps: int  # of the training before it
    train_tokens: int
    held_tokens: int  # dev, and test

    @property
    def trial_steps(self) -> int:
        """Steps of a learning rate's trial."""
        return max(self.steps // 3, 1)

    def shortened(self, steps: int | None) -> Study:
        """Return the study with `steps` of quantization-aware training, and the rest in proportion."""
        if steps is None or steps == self.steps:
            return self
        return replace(self, steps=steps, base_steps=max(self.base_steps * steps // self.steps, 1))


STUDIES = {
    "full": Study("full", Shape(512, 6, 1536), Shape(256, 4, 832), 512, 64, 370, 1830, 25_000_000, 300_000),
    "small": Study("small", Shape(256, 4, 768), Shape(128, 4, 448), 256, 4, 200, 1172, 1_500_000, 8_192),
}


@dataclass(frozen=True)
class Method:
    """A quantizer and a loss; `family` says what it is compared with."""

    name: str
    title: str
    family: Literal["full", "ternary", "tequila", "sherry", "arenas", "two", "ours", "untrained"]
    quantizer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    loss: Distillation = CE
    extra: bool = False  # not asked for by the comparison; what explains it


def _methods() -> Iterable[Method]:
    group = {"granularity": "group", "group_size": 128}
    yield Method("fp", "full precision, trained on", "full")
    kl = Distillation("kl")
    yield Method("llmqat", "LLM-QAT style, row", "ternary", "minmax", {"bits": "ternary"}, kl)
    yield Method("absmean_tensor", "BitNet absmean, tensor", "ternary", "absmean")
    yield Method("absmean_g128", "BitNet absmean, 128 (lambda 0)", "ternary", "absmean", group)
    yield Method("twn", "TWN, row", "ternary", "twn")
    yield Method("seq_ternary", "ParetoQ SEQ ternary, row", "ternary", "seq", {"bits": "ternary"})
    for value in ("1e-3", "1e-2", "1e-1"):
        options = {"lambda": float(value)}
        yield Method(f"tequila_{value}", f"Tequila, lambda {value}, 128", "tequila", "tequila", options)
    yield Method("sherry_none", "Sherry alone, 128", "sherry", "sherry", {"anneal": "none"})
    for kind in ("linear", "cosine", "exponential"):
        yield Method(f"sherry_{kind}", f"Sherry, Arenas {kind}, 128", "arenas", "sherry", {"anneal": kind})
    yield Method("seq2", "SEQ 2-bit, row", "two", "seq", {"bits": 2})
    both = Distillation("cakld", kd_weight=1.0, lm_weight=1.0)
    yield Method("seq2_cakld", "SEQ 2-bit, row, CE + CAKLD", "two", "seq", {"bits": 2}, both)
    yield Method("lsq2", "LSQ 2-bit, row", "two", "lsq", {"bits": 2})
    half = {"phase_in": 0.5}
    yield Method("sherry_phase", "ours: 3:4, rounding phased in, 128", "ours", "sherry", half)
    yield Method("twn_phase", "ours: TWN, row, rounding phased in", "ours", "twn", half)
    title = "ours: TWN, row, rounding phased in, CE + CAKLD"
    yield Method("twn_phase_cakld", title, "ours", "twn", half, both)
    title = "ours: SEQ 2-bit, row, rounding phased in, CE + CAKLD"
    yield Method("seq2_phase_cakld", title, "ours", "seq", {"bits": 2, **half}, both)
    fit = {"bits": 2, "init": "fit"}
    title = "ours: SEQ 2-bit, row, ranges fitted, CE + CAKLD"
    yield Method("seq2_fit_cakld", title, "ours", "seq", fit, both)
    yield Method("seq2_fit", "ours: SEQ 2-bit, row, ranges fitted", "ours", "seq", fit, extra=True)
    title = "ours: SEQ 2-bit, 128, ranges fitted, CE + CAKLD"
    yield Method("seq2_fit_g128_cakld", title, "ours", "seq", {**fit, **group}, both, extra=True)
    early = {"anneal": "cosine", "ends": 0.5}
    yield Method(
        "sherry_early", "Sherry, Arenas cosine, gone at half, 128", "arenas", "sherry", early, extra=True
    )
    yield Method("twn_cakld", "TWN, row, CE + CAKLD", "ternary", "twn", loss=both, extra=True)
    rounding = {"activations": "int8"}
    title = "BitNet absmean, tensor, int8 inputs"
    yield Method("absmean_int8", title, "ternary", "absmean", rounding, extra=True)
    yield Method("twn_g128", "TWN, 128", "ternary", "twn", group, extra=True)
    seq = {"bits": "ternary", **group}
    yield Method("seq_ternary_g128", "ParetoQ SEQ ternary, 128", "ternary", "seq", seq, extra=True)
    yield Method("rtn_ternary", "rounded to ternary (TWN rule), 128, untrained", "untrained", "twn", group)
    yield Method("rtn_2bit", "rounded to 2 bits (SEQ levels), 128, untrained", "untrained", "seq", group)


METHODS = {method.name: method for method in _methods()}
TRAINED = [method for method in METHODS.values() if method.family != "untrained"]
POST = {"int4_rtn": "INT4 RTN, 128", "int4_gptq": "INT4 GPTQ, 128"}
DENSE = "dense"  # the smaller model; trained from nothing with all tokens
TITLES = {name: m.title for name, m in METHODS.items()} | POST | {DENSE: "smaller dense model, BF16"}


@dataclass(frozen=True)
class Run:
    """One thing to do, with one result file. `rate` 0 means the one that its method's trials chose."""

    name: str
    kind: Kind
    method: str
    steps: int = 0
    seed: int = 0
    rate: float = 0.0
    needs: tuple[str, ...] = ()


def trial_name(method: str, rate: float) -> str:
    """Name the trial of a learning rate."""
    return f"trial-{method}-{rate:g}"


def final_name(method: str, seed: int) -> str:
    """Name a final run."""
    return f"final-{method}-s{seed}"


def _trials(study: Study, method: str) -> list[Run]:
    dense = method == DENSE
    steps = (study.base_steps + study.steps) // 3 if dense else study.trial_steps
    needs = () if dense else ("base",)
    return [Run(trial_name(method, rate), "trial", method, steps, 0, rate, needs) for rate in RATES]


def _trained(study: Study, method: str, seed: int, part: int = 100) -> Run:
    steps = study.base_steps + study.steps if method == DENSE else max(study.steps * part // 100, 1)
    needs = (*(() if method == DENSE else ("base",)), *(trial_name(method, rate) for rate in RATES))
    if part == 100:
        return Run(final_name(method, seed), "final", method, steps, seed, needs=needs)
    return Run(f"part-{method}-{part}-s{seed}", "part", method, steps, seed, needs=needs)


def runs_of(study: Study, seeds: Iterable[int] = SEEDS, only: Iterable[str] = ()) -> list[Run]:
    """Return every run, the most important first; `only` keeps the base and the methods of these names."""
    asked, seeds = set(only), list(seeds)
    main = [method.name for method in TRAINED if not method.extra]
    extra = [method.name for method in TRAINED if method.extra]
    runs = [Run("base", "base", "base", study.base_steps)]
    untrained = [name for name, method in METHODS.items() if method.family == "untrained"]
    runs += [Run(f"plain-{name}", "plain", name, needs=("base",)) for name in untrained]
    runs += [Run(f"ptq-{name}-base", "ptq", name, needs=("base",)) for name in POST]
    for methods in ((*main, DENSE), extra):
        runs += [run for name in methods for run in _trials(study, name)]
        for seed in seeds:
            runs += [_trained(study, name, seed) for name in methods]
            if methods is not extra:
                needs = (final_name("fp", seed),)
                runs += [Run(f"ptq-{name}-s{seed}", "ptq", name, seed=seed, needs=needs) for name in POST]
        if methods is not extra:
            runs += [_trained(study, name, seeds[0], part) for name in RECOVERY for part in PARTS]
    runs += [_trained(study, name, seed, part) for seed in seeds[1:] for name in RECOVERY for part in PARTS]
    return [run for run in runs if not asked or run.method in asked or run.kind == "base"]


def best_rate(method: str, row_of: Callable[[str], dict[str, Any] | None]) -> float:
    """Return the learning rate with the lowest dev loss of a method's trials; one that diverged has none."""
    losses: dict[float, float] = {}
    for rate in RATES:
        row = row_of(trial_name(method, rate))
        if row is not None and row.get("dev") is not None:
            losses[rate] = row["dev"]
    assert losses, f"no trial of {method} came to an end"
    return min(losses, key=lambda rate: losses[rate])
