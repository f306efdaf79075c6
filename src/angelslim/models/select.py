"""Decide which tensors of a checkpoint are quantized, and say why the others are not.

Names are those of the checkpoint (what engines load), without the trailing ``.weight``. Per-expert matrices
that transformers stacks into one parameter are layers of their own here, because that is how they are stored
and how engines read them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ..base.errors import SchemeError
from ..config.ignore import matches
from ..numerics.quantize import tile_of
from ..numerics.scheme import Scheme
from .loading import Source
from .overrides import Overrides
from .rules import PARTS
from .stacks import stacks_of
from .structure import Group

STACKED = "experts stored as one stack whose parts no engine reads one by one"


@dataclass(frozen=True)
class Layer:
    """One matrix to be quantized."""

    name: str  # "model.layers.0.mlp.down_proj"
    tensor: str  # checkpoint tensor, "model.layers.0.mlp.down_proj.weight"
    module: str | None  # path of its nn.Linear; None for one expert of a fused stack
    shape: tuple[int, int]  # (out, in)
    block: int | None  # decoder block, None outside the stack
    scheme: Scheme


@dataclass(frozen=True)
class Selection:
    """What will be quantized, and the reason for every matrix that will not."""

    layers: tuple[Layer, ...]
    skipped: dict[str, str]

    def in_block(self, block: int | None) -> tuple[Layer, ...]:
        """Return the layers of one decoder block, or those outside the stack for None."""
        return tuple(layer for layer in self.layers if layer.block == block)


@dataclass(frozen=True)
class Choice:
    """What a recipe asks for beyond the linears of the decoder blocks, and what it leaves alone."""

    ignore: tuple[str, ...] = ()  # entries of `ignore_layers`
    overrides: tuple[tuple[str, Scheme | None], ...] = ()  # other schemes for some layers; None keeps them
    head: bool = False
    embeddings: bool = False
    towers: frozenset[str] = frozenset()  # "vision", "audio", "projector"


def select(source: Source, scheme: Scheme, choice: Choice = Choice()) -> Selection:
    """Choose the layers of a model for one scheme.

    An embedding is looked up, not multiplied with, so it gets the scheme's weight and no input. A scheme whose
    groups do not fit is refused at once, naming every offending layer. What is ignored stays so, whatever the
    overrides say.
    """
    _refuse_tied(source, choice)
    overrides = Overrides(choice.overrides, scheme)
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    schemes: dict[str, Scheme | None] = {}  # of the layers by their own names, for those that engines join
    for tensor, info in source.checkpoint.tensors.items():
        if len(info.shape) < 2:
            continue
        name = tensor.removesuffix(".weight")
        module, reason = _destination(source, tensor)
        embedding = module in source.structure.embeddings
        if not reason:
            reason = _refusal(source, name, module or name, choice)
        own = None if reason else overrides.scheme_of(name, module or name)
        schemes[module or name] = own
        if own is None:
            skipped[name] = reason or f"override: {overrides.decided[module or name]}"
            continue
        shape = (info.shape[0], info.shape[1])
        path = source.targets[tensor].parameter
        own = Scheme(own.weight) if embedding else own
        layers.append(Layer(name, tensor, module, shape, source.structure.block_of(path), own))
    overrides.refuse_unused(skipped)
    overrides.refuse_mixed(schemes, source.structure)
    _check_fit(layers)
    return Selection(tuple(layers), skipped)


def kept_stacks(source: Source, scheme: Scheme, choice: Choice) -> frozenset[str]:
    """Return the stacks of experts of which nothing is quantized, for a model that `unstacked` returned.

    They are better left as the checkpoint has them.
    """
    overrides = Overrides(choice.overrides, scheme)

    def quantized(tensor: str) -> bool:
        name = tensor.removesuffix(".weight")
        return not _refusal(source, name, name, choice) and overrides.scheme_of(name, name) is not None

    return frozenset(stack for stack, names in stacks_of(source).items() if not any(map(quantized, names)))


def _destination(source: Source, tensor: str) -> tuple[str | None, str]:
    """Return (module path, reason to skip); a module of None is one expert of a stack."""
    target = source.targets.get(tensor)
    if target is None:
        return None, "not part of the transformers model; carried over"
    info = source.checkpoint.tensors[tensor]
    if target.pattern is not None or not target.parameter.endswith(".weight"):
        stacked = any(target.parameter.startswith(experts.path + ".") for experts in source.structure.experts)
        if stacked and len(info.shape) == 2 and tensor.endswith(".weight"):
            return None, ""
        return None, STACKED if stacked else "not the weight of a linear layer"
    module = target.parameter.removesuffix(".weight")
    if module not in source.structure.linears and module not in source.structure.embeddings:
        return None, "not the weight of a linear layer"
    return module, ""


def _refuse_tied(source: Source, choice: Choice) -> None:
    if (choice.head or choice.embeddings) and getattr(source.config, "tie_word_embeddings", False):
        raise SchemeError(
            f"The head of {source.name} is tied to its embedding, so neither can be quantized by itself.",
            fix="Leave out quantize_lm_head and quantize_embeddings.",
        )


def _refusal(source: Source, name: str, module: str, choice: Choice) -> str:
    structure = source.structure
    pattern = next((entry for entry in choice.ignore if matches(entry, name) or matches(entry, module)), None)
    tower = structure.tower_of(module)
    if module == structure.head:
        return "" if choice.head else "head (ask with quantize_lm_head: true)"
    if module in structure.embeddings:
        if tower is not None:
            return f"embedding of the {tower} tower"
        return "" if choice.embeddings else "embedding (ask with quantize_embeddings: true)"
    if pattern is not None:
        return f"ignore_layers: {pattern}"
    if module in structure.keep:
        return "router, kept in full precision"
    if tower is not None and tower not in choice.towers:
        return f"{tower} tower" if tower != "projector" else "projector"
    if tower is None and structure.block_of(module) is None:
        return "outside the decoder blocks"
    return ""


def _check_fit(layers: Sequence[Layer]) -> None:
    """Refuse groups that do not divide a layer's input, of weights or of activations, naming the layers."""
    problems: dict[str, SchemeError] = {}
    for layer in layers:
        try:
            tile_of(layer.scheme.weight.granularity, layer.shape)
            if layer.scheme.input is not None:
                tile_of(layer.scheme.input.granularity, layer.shape)
        except SchemeError as error:
            problems[layer.name] = error
    if problems:
        what = " ".join(dict.fromkeys(error.what for error in problems.values()))
        names, more = list(problems)[:4], len(problems) - 4
        shown = ", ".join(names) + (f" and {more} more" if more > 0 else "")
        raise SchemeError(f"{what} Layers: {shown}.", fix=next(iter(problems.values())).fix)


def groups_by_linear(source: Source) -> dict[str, Group]:
    """Return, for each linear inside the blocks, the group it belongs to."""
    return {
        linear: group
        for groups in source.structure.groups.values()
        for group in groups
        for linear in group.linears
    }


def kept_matrices(source: Source, quantized: Collection[str | None]) -> list[str]:
    """Return the matrices in full precision that engines might take for linears.

    `quantized` are modules and, of experts, layers. Both the model's and the checkpoint's names are listed. Routers
    belong to them: transformers computes them as functions, vLLM builds them as linears. So do experts: engines ask
    for each by its own name, also where the checkpoint has a stack.
    """
    structure = source.structure
    routers = {name for groups in structure.groups.values() for group in groups for name in group.others}
    kept = [name for name in structure.linears if name not in quantized]
    stored = [
        tensor.removesuffix(".weight")
        for tensor, target in source.targets.items()
        if target.pattern is None and target.parameter.removesuffix(".weight") in routers | set(kept)
    ]
    return list(dict.fromkeys([*kept, *stored, *_kept_experts(source, quantized)]))


def _kept_experts(source: Source, quantized: Collection[str | None]) -> Iterator[str]:
    counts = {experts.path: experts.count for experts in source.structure.experts}
    for tensor, target in source.targets.items():
        path, _, parameter = target.parameter.rpartition(".")
        if path not in counts:
            continue
        name = tensor.removesuffix(".weight")
        if tensor != name:
            yield from [name] if name not in quantized else []
            continue
        for index in range(counts[path]):
            yield from (f"{tensor.rpartition('.')[0]}.{index}.{part}" for part in PARTS.get(parameter, ()))
