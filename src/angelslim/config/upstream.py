"""From the words of a configuration to stages of work: (kind, method, scheme, options, ignored layers).

The public dialect names fifteen "quantization methods" that are really pairs of an algorithm and a scheme:
``int4_gptq`` is GPTQ with int4 groups, ``fp8_static`` is rounding to nearest with per-tensor FP8. `METHODS`
takes each name apart; the granularities of ``quant_method`` then adjust the scheme. The engine looks up the
algorithm by name in its registry, so a name may be known here before anything is built for it: its `Stage`
carries the scheme when `numerics.scheme` can express it and None otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ..base.errors import ConfigError
from ..numerics.scheme import PRESETS, Scheme
from . import quantizers, schemes
from .flat import FlatConfig
from .quantization import Quantization, refuse_judges
from .schema import AnyConfig, Compression, PruningConfig, Transform
from .training import QAD, QAT, SpecialQuantizer

T = TypeVar("T")
Kind = Literal["ptq", "qat", "distill", "sparsity", "pruning", "calibrate", "mcore_qad", "transform"]


@dataclass(frozen=True)
class Stage:
    """One piece of work for the engine."""

    kind: Kind
    method: str  # the algorithm's name in the engine's registry
    scheme: Scheme | None = None
    options: dict[str, object] = field(default_factory=dict)  # what the algorithm reads, by its own names
    ignore: tuple[str, ...] = ()  # entries for `ignore.ignored`
    overrides: tuple[tuple[str, Scheme | None], ...] = ()  # other schemes for some layers; None keeps them

    def __str__(self) -> str:
        others = "".join(f"; {entry}: {scheme or 'full precision'}" for entry, scheme in self.overrides)
        return f"{self.kind} {self.method}" + (f": {self.scheme}{others}" if self.scheme else "")


@dataclass(frozen=True)
class Method:
    """A public method name taken apart."""

    algorithm: str
    base: str  # the scheme it starts from: a preset's name, or one of `schemes.EXTRA`
    options: tuple[tuple[str, object], ...] = ()
    bits: tuple[int, ...] = (8,)
    transforms: tuple[str, ...] = ()  # what it does to the weights before they are rounded


METHODS: dict[str, Method] = {
    "fp8_static": Method("rtn", "fp8_static"),
    "fp8_dynamic": Method("rtn", "fp8_dynamic"),
    "fp8_block": Method("rtn", "fp8_block"),
    "fp8_blockwise": Method("rtn", "fp8_block"),
    "fp8_lepto": Method("lepto", "fp8_static"),
    "daq": Method("daq", "fp8_block"),
    "int8_static": Method("rtn", "int8_static"),
    "int8_dynamic": Method("rtn", "int8_dynamic"),
    "int8_gptq": Method("gptq", "int8_dynamic"),
    "int4_rtn": Method("rtn", "int4", bits=(4,)),
    "int4_awq": Method("rtn", "int4_asym", (("mse_range", True),), bits=(4,), transforms=("awq",)),
    "int4_gptq": Method("gptq", "int4", bits=(4,)),
    "int4_gptaq": Method("gptq", "int4", (("gptaq", True),), bits=(4,)),
    "int4_autoround": Method("learned", "int4", bits=(4,)),
    "w4a8_fp8": Method("rtn", "w4a8_fp8", bits=(4, 8)),
    "w4a8_fp8_static": Method("rtn", "w4a8_fp8_static", bits=(4, 8)),
    "w4a8i8": Method("rtn", "w4a8_int8", bits=(4, 8)),
    "nvfp4": Method("rtn", "nvfp4", bits=(4,)),
    "nvfp4_weight_only": Method("rtn", "nvfp4_weight_only", bits=(4,)),
    "nvfp4_gptq": Method("gptq", "nvfp4_weight_only", bits=(4,)),
    "nvfp4_gptaq": Method("gptq", "nvfp4_weight_only", (("gptaq", True),), bits=(4,)),
    "mxfp4": Method("rtn", "mxfp4", bits=(4,)),
    "mxfp4_weight_only": Method("rtn", "mxfp4_weight_only", bits=(4,)),
    "mxfp8": Method("rtn", "mxfp8"),
}
_SECTION_OF = {  # compression.name -> the section that must be there
    "PTQ": "quantization",
    "PTQWeightOnly": "quantization",
    "QAT": "QAT",
    "QAD": "QAD",
    "Distill": "Distill",
    "MCoreQAD": "MCoreQAD",
    "Sparsity": "sparsity",
}
# Switches of `quantization` and `quant_method` that an algorithm may read, passed on when they were given.
_SWITCHES = (
    "modules_to_quantize", "quant_analyse", "quant_vit", "quant_talker", "save_name", "base_model_path", "metric",
    "base_model_repo", "base_is_fp8", "scale_search", "observer", "percentile", "quantize_embeddings",
)  # fmt: skip
_METHOD_SWITCHES = (
    "mse_range", "actorder", "alpha", "damp", "dequant_to_bf16", "signed_scales", "descent", "aim",
    "true_sequential", "iterations", "lr", "learn_batch", "learn_from", "lepto_extended", "lepto_margin",
    "lepto_accept", "share_gate_up_weight_scale_2",
)  # fmt: skip
_HEADS = ("lm_head", "model.lm_head")


def stages(config: AnyConfig) -> list[Stage]:
    """What the engine has to do, in order. An impossible combination is a `ConfigError`."""
    if isinstance(config, PruningConfig):
        return list(_pruning(config))
    if isinstance(config, FlatConfig):
        return list(_flat(config))
    work = list(_transforms(config.transform)) if config.transform else []
    for index, compression in enumerate(config.compression):
        where = "compression" if len(config.compression) == 1 else f"compression.{index}"
        work += _compression(compression, where, config.transform is not None)
    if not work:
        fix = "Add a compression section, or extend a recipe."
        raise ConfigError("The configuration asks for nothing: it has no compression section.", fix=fix)
    return work


def _compression(stage: Compression, where: str, transformed: bool) -> Iterator[Stage]:
    name: str | None = stage.name or _inferred(stage)
    if name is None:
        sections = ", ".join(dict.fromkeys(_SECTION_OF.values()))
        raise ConfigError("The stage has no method.", where=where, fix=f"Add one of the sections {sections}.")
    if stage.calibrate is not None:
        yield Stage("calibrate", stage.calibrate.backend or "vllm", None, stage.calibrate.given())
    if name in ("PTQ", "PTQWeightOnly"):
        asked = stage.quantization or (Quantization() if transformed else _need(None, where, name))
        if not (asked.name or asked.scheme) and (transformed or asked.quant_helpers):
            refuse_judges(asked, f"{where}.quantization")  # a transform alone is a run too
            yield from _helpers(asked, asked.quant_helpers)
        else:
            yield from _ptq(asked, f"{where}.quantization")
    elif name == "QAT":
        yield _trained(stage.qat or QAT(), stage.quantization, f"{where}.quantization")
    elif name == "QAD":
        yield _trained(stage.qad or QAD(), stage.quantization, f"{where}.quantization")
    elif name == "Distill":
        section = _need(stage.distill, where, name)
        yield Stage("distill", "distill", None, section.given())
    elif name == "MCoreQAD":
        megatron = _need(stage.mcore_qad, where, name)
        yield Stage("mcore_qad", megatron.format or "nvfp4", None, megatron.given())
    else:
        yield Stage("sparsity", _need(stage.sparsity, where, name).name)


def _inferred(stage: Compression) -> str | None:
    """The name of a stage that does not say it, from the section that it has."""
    present = stage.given()
    trained = [
        name for name, section in _SECTION_OF.items() if section in present and section != "quantization"
    ]
    return trained[0] if trained else "PTQ" if "quantization" in present else None


def _need(section: T | None, where: str, name: str) -> T:
    if section is None:
        fix = f"Add the section {where}.{_SECTION_OF[name]}."
        raise ConfigError(f"{where}.name is {name}, but its section is missing.", fix=fix)
    return section


def method_of(section: Quantization, where: str) -> tuple[Method, Scheme | None]:
    """The method and the scheme that a quantization section asks for."""
    name = section.name
    method = METHODS.get(name, Method(name, "")) if name else Method("rtn", "")
    if section.scheme is not None:
        return method, schemes.explicit(section.scheme, section.quant_method, where)
    if not name:
        fix = f"Set {where}.name to one of {', '.join(METHODS)}."
        raise ConfigError(f"{where} names neither a method nor a scheme.", fix=fix)
    base = schemes.base(method.base)
    if name == "w4a8_fp8" and section.quant_method.activation == "per-tensor":
        base = schemes.base("w4a8_fp8_static")  # one number for all tokens is a calibrated one
    if name == "daq" and section.quantization_method in ("per_channel", "per_tensor"):
        base = PRESETS["fp8_dynamic"]
    if base is None:  # the numerics cannot express it (yet): the method's public name says it all
        return Method(name, ""), None
    words = section.quant_method
    if words.weight is None and (section.save_name or "").endswith("blockwise"):
        words = words.model_copy(update={"weight": "per-block"})
    return method, schemes.adjusted(base, words, where)


def _ptq(section: Quantization, where: str) -> Iterator[Stage]:
    method, scheme = method_of(section, where)
    yield from _helpers(section, [*section.quant_helpers, *method.transforms])
    if scheme is not None and scheme.kv is not None:
        yield Stage("transform", "kv_cache", None, {"quant": scheme.kv}, ignored_layers(section))
    options = {**dict(method.options), **switches(section)}
    if scheme is None:
        options |= section.quant_method.given()
    others = schemes.overrides(section, scheme, where)
    yield Stage("ptq", method.algorithm, scheme, options, ignored_layers(section), others)


def _helpers(section: Quantization, names: Iterable[str]) -> Iterator[Stage]:
    for helper in sorted(dict.fromkeys(names), key=lambda name: name != "smooth"):
        yield Stage("transform", helper, None, _helper_options(helper, section), ignored_layers(section))


def _helper_options(helper: str, section: Quantization) -> dict[str, object]:
    if helper == "smooth":
        return {"alpha": 0.5 if section.smooth_alpha is None else section.smooth_alpha}
    duo = section.quant_method.duo
    return {"duo": duo} if helper == "awq" and duo is not None else {}


def switches(section: Quantization) -> dict[str, object]:
    """The algorithm's switches that were given, by their public names."""
    given, inner = section.given(), section.quant_method.given()
    options = {key: given[key] for key in _SWITCHES if key in given}
    if section.observer != "percentile":
        options.pop("percentile", None)
    else:
        options["percentile"] = section.percentile
    return options | {key: inner[key] for key in _METHOD_SWITCHES if key in inner}


def ignored_layers(section: Quantization) -> tuple[str, ...]:
    """The layers to leave alone; the output head is one of them unless the file asks for it."""
    entries = list(dict.fromkeys(section.ignore_layers))
    if section.quantize_lm_head:
        entries = [entry for entry in entries if entry not in _HEADS]
    elif "lm_head" not in entries:
        entries.insert(0, "lm_head")
    if section.quantize_embeddings:
        entries = [entry for entry in entries if entry.rpartition(".")[2] != "embed_tokens"]
    return tuple(entries)


def _trained(section: QAT | QAD, quantization: Quantization | None, where: str) -> Stage:
    """Training of the whole model; by blocks it is a method of post-training quantization."""
    quant = section.plugin_config.quant_config if section.plugin_config else None
    special = quant.special if quant and quant.weight_quantizer == "special" else None
    default = section.training_mode if isinstance(section, QAT) else "distill"
    method = (special.quant_method if special else None) or default or "end2end"
    scheme = None
    if special is None:
        scheme = schemes.trained(quant) if quant and quant.weight else None
        if scheme is None and not (quant and quant.weight) and quantization and quantization.name:
            scheme = method_of(quantization, where)[1]
    ignore = ignored_layers(quantization) if quantization else ("lm_head",)
    if isinstance(section, QAT) and section.training_mode == "blockwise":
        return _blockwise(section, special, scheme, ignore)
    return Stage("qat", method, scheme, section.given(), ignore)


_BLOCK_WORDS = {  # of block_wise_config -> the method's options
    "epochs": "epochs",
    "batch_size": "learn_batch",
    "quant_lr": "quant_lr",
    "weight_lr": "weight_lr",
    "min_lr_factor": "min_lr_factor",
    "wd": "weight_decay",
    "val_size": "val_size",
}
_BLOCK_SILENT = frozenset(
    ["training_mode", "plugin_config", "block_wise_config", "do_train", "hf_dataset", "hf_cache_dir"]
)


def _blockwise(
    section: QAT, special: SpecialQuantizer | None, scheme: Scheme | None, ignore: tuple[str, ...]
) -> Stage:
    """One block after another; the scheme is what the quantizer leaves, two bits of SEQ if nothing is named."""
    name, own = "seq", dict[str, Any]()
    if special is not None:
        name, own = quantizers.special(special)
    elif scheme is not None:
        name, own = quantizers.plain(scheme)
    inputs = scheme.input if scheme is not None else None
    found = Scheme(quantizers.scheme_of(name, own).weight, inputs)
    options: dict[str, object] = {"quantizer": name, "quantizer_options": own}
    words = section.block_wise_config.given() if section.block_wise_config else {}
    options |= {_BLOCK_WORDS[key]: value for key, value in words.items() if key in _BLOCK_WORDS}
    # What only training end to end reads; a run says that it has no effect.
    options |= {key: value for key, value in section.given().items() if key not in _BLOCK_SILENT}
    return Stage("ptq", "blockwise_qat", found, options, ignore)


def _transforms(section: Transform) -> Iterator[Stage]:
    name = (section.name or "SpinQuant").lower()
    spin = section.spin_config
    options: dict[str, object] = {"output_log": section.output_log}
    if spin is not None:
        options |= {"rotation": spin.rotation, "rotation_mode": spin.rotation_mode, "had_dim": spin.had_dim}
        options |= {"seed": spin.seed, "ignore_layers": spin.ignore_layers}
    ignore = tuple(spin.ignore_layers) if spin else ()
    yield Stage("transform", "spin" if name in ("spin", "spinquant") else name, None, options, ignore)


def _pruning(config: PruningConfig) -> Iterator[Stage]:
    places = config.compressor.strategies.by_place()
    if not places:
        fix = "Add compressor.strategies.global.strategy."
        raise ConfigError("compressor.strategies is empty.", fix=fix)
    for place, strategy in places.items():
        options: dict[str, object] = dict(strategy.params.given())
        options["layer"] = None if place == "global" else int(place)
        options["requirements"] = config.compressor.requirements.given()
        if strategy.model_related_params is not None:
            options |= strategy.model_related_params.given()
        yield Stage("pruning", strategy.strategy, None, options)


def _flat(config: FlatConfig) -> Iterator[Stage]:
    given = config.given()
    if config.ptq_data_path or config.output_dir:
        smooths = any(key.startswith(("smooth_", "alpha_")) for key in given)
        method = "smooth" if smooths else "kv_cache" if "per_head" in given else "activations"
        yield Stage("calibrate", method, None, given)
    if config.output_nvfp4_hf_path:
        yield Stage("ptq", "nvfp4", schemes.base("nvfp4_weight_only"), given, ("lm_head",))
    if config.output_fp8_hf_path:
        block = bool(config.block_size and config.block_size[0] > 0)
        yield Stage("ptq", "rtn", PRESETS["fp8_block" if block else "fp8_static"], given, ("lm_head",))
    if not (
        config.ptq_data_path or config.output_dir or config.output_nvfp4_hf_path or config.output_fp8_hf_path
    ):
        yield Stage("calibrate", "activations", None, given)
