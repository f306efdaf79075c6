"""Find a model's blocks, groups, experts and towers by running it once on tensors without memory.

A *group* is a set of linears that receive the same tensor (q, k, v; gate and up), together with the module that
produced it, its *source* (usually a norm). Smoothing folds a scale into the source, fused engine layers need
one weight scale over the group, and a Hessian has to be computed once for it. Instead of a table per
architecture, one forward at full size on the meta device with hooks reads the groups off: tensors are told
apart by their storage, so views of one tensor stay one tensor.

The probe attention and the batched experts make the forward free of data-dependent branches, which is all that
the meta device asks for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from .exceptions import exceptions_of
from .rules import splittable

PROBE_TOKENS = 8
PROBE = "angelslim_probe"
Key = tuple[int, int, int]


@dataclass(frozen=True)
class Group:
    """Linears that share one input. Names are full module paths.

    `others` are modules with weights of their own that read the same tensor without being linears (functional
    routers, fused experts): who rescales the tensor must rescale them too, or refuse.
    """

    source: str | None
    linears: tuple[str, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experts:
    """A fused expert module: `weights` are its 3-D parameters, first dimension the expert.

    `sorted` ones are called with the tokens of one expert after those of another, not with the router's choice. `plain`
    ones are a gate above an up projection and a down projection, and nothing else.
    """

    path: str
    count: int
    weights: tuple[str, ...]
    sorted: bool = False
    plain: bool = True


@dataclass(frozen=True)
class Structure:
    """The parts of a model that compression cares about, as module paths."""

    model_type: str
    decoder: str  # module that holds the blocks' list ("model", "model.language_model")
    blocks: tuple[str, ...]
    groups: dict[str, tuple[Group, ...]]  # block -> groups, in the order in which they run
    linears: dict[str, tuple[int, int]]  # every nn.Linear -> (out, in)
    embeddings: tuple[str, ...]
    head: str | None
    experts: tuple[Experts, ...] = ()
    towers: dict[str, str] = field(default_factory=dict)  # "vision" | "audio" -> path
    keep: frozenset[str] = frozenset()  # linears that stay in full precision
    tuple_outputs: bool = False  # blocks return (hidden, ...) instead of hidden

    def block_of(self, name: str) -> int | None:
        """Return the index of the decoder block that holds a module, or None outside the stack."""
        for index, block in enumerate(self.blocks):
            if name.startswith(block + "."):
                return index
        return None

    def tower_of(self, name: str) -> str | None:
        """Return the modality whose tower (or projector) holds a module."""
        return next((kind for kind, path in self.towers.items() if _inside(name, path)), None)


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def discover(model: nn.Module) -> Structure:
    """Read the structure off a model on the meta device (see `loading.meta_model`)."""
    config: Any = model.config
    decoder_path, blocks = find_blocks(model)
    exceptions = exceptions_of(config.model_type)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    head = next((name for name in linears if _is_head(model, name)), None)
    towers = find_towers(model, decoder_path, head) | dict(exceptions.towers)
    keep = {f"{block}.{name}" for block in blocks for name in exceptions.keep if f"{block}.{name}" in linears}
    groups, tuple_outputs = probe(model, blocks)
    experts, groups = _with_sorted(tuple(find_experts(model)), groups, exceptions.sorted_experts)
    return Structure(
        model_type=config.model_type,
        decoder=decoder_path,
        blocks=blocks,
        groups=groups,
        linears=linears,
        embeddings=tuple(n for n, m in model.named_modules() if isinstance(m, nn.Embedding)),
        head=head,
        experts=experts,
        towers=towers,
        keep=frozenset(keep),
        tuple_outputs=tuple_outputs,
    )


def _is_head(model: nn.Module, name: str) -> bool:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head is not None and model.get_submodule(name) is get_head()


def find_blocks(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Return (path of the text decoder, paths of its blocks).

    The blocks are the module list with the most parameters inside the decoder; expert lists lie inside a block
    and are smaller than the stack.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model
    paths = {id(module): name for name, module in model.named_modules()}
    root = paths.get(id(decoder), "")
    best, best_size = "", 0
    for name, module in (decoder or model).named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best_size:
                best, best_size = name, size
    if not best:
        raise ModelError(
            f"No stack of decoder blocks was found in {type(model).__name__}.",
            fix="Only models with a list of transformer blocks can be compressed.",
        )
    stack = ".".join(part for part in (root, best) if part)
    return root, tuple(f"{stack}.{index}" for index in range(len(model.get_submodule(stack))))  # type: ignore[arg-type]


def find_experts(model: nn.Module) -> Iterator[Experts]:
    """Yield modules whose own parameters are stacks of expert matrices."""
    for name, module in model.named_modules():
        stacks = {key: value for key, value in module.named_parameters(recurse=False) if value.dim() == 3}
        counts = Counter(value.shape[0] for value in stacks.values())
        if len(stacks) >= 2 and len(counts) == 1 and not isinstance(module, (nn.Conv1d, nn.Conv2d)):
            yield Experts(name, next(iter(counts)), tuple(stacks), plain=splittable(module))


def _with_sorted(
    experts: tuple[Experts, ...], groups: dict[str, tuple[Group, ...]], names: tuple[str, str] | None
) -> tuple[tuple[Experts, ...], dict[str, tuple[Group, ...]]]:
    """Mark sorted experts, and let them join the group of the linear whose input they get scaled copies of."""
    if names is None:
        return experts, groups
    joined = {}
    for block, found in groups.items():
        stack, reader = (f"{block}.{name}" for name in names)
        joined[block] = tuple(
            replace(group, others=(*group.others, stack)) if reader in group.linears else group
            for group in found
            if group.others != (stack,)
        )
    marked = (replace(each, sorted=each.path.endswith(f".{names[0]}")) for each in experts)
    return tuple(marked), joined


def find_towers(model: nn.Module, decoder: str, head: str | None) -> dict[str, str]:
    """Return the encoders beside the decoder: modality -> path, and "projector" for what joins them.

    Siblings of the decoder (or of its ancestors) that own matrices are towers when they hold a list of blocks,
    projectors otherwise.
    """
    towers: dict[str, str] = {}
    parts = decoder.split(".") if decoder else []
    for depth in range(len(parts)):
        parent = ".".join(parts[:depth])
        for name, module in model.get_submodule(parent).named_children():
            path = f"{parent}.{name}" if parent else name
            if _inside(decoder, path) or path == head or not any(map(_has_matrix, module.modules())):
                continue
            stacked = any(isinstance(child, nn.ModuleList) and len(child) for child in module.modules())
            towers.setdefault(_modality(name, type(module).__name__) if stacked else "projector", path)
    return towers


def _modality(*names: str) -> str:
    text = " ".join(names).lower()
    for kind, words in {
        "audio": ("audio", "speech", "whisper"),
        "vision": ("vis", "image", "clip", "siglip"),
    }.items():
        if any(word in text for word in words):
            return kind
    return "encoder"


def probe(model: nn.Module, blocks: tuple[str, ...]) -> tuple[dict[str, tuple[Group, ...]], bool]:
    """Run one forward on the meta device; return the groups, and whether blocks return tuples."""
    readers: dict[Key, list[str]] = {}
    makers: dict[Key, str] = {}
    alive: list[Tensor] = []  # a storage's address names a tensor only while the tensor lives
    returned: list[bool] = []
    handles = [
        model.get_submodule(blocks[0]).register_forward_hook(
            lambda _module, _args, output: returned.append(isinstance(output, tuple))
        )
    ]
    for block in blocks:
        for local, module in model.get_submodule(block).named_modules():
            name = f"{block}.{local}" if local else block
            handles.append(module.register_forward_hook(_note_output(name, makers, alive)))
            if any(True for _ in module.parameters(recurse=False)) and _has_matrix(module):
                handles.append(
                    module.register_forward_pre_hook(_note_input(name, readers, alive), with_kwargs=True)
                )
    try:
        with torch.no_grad(), torch.device("meta"):
            ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ModelError(
            f"The structure of {type(model).__name__} could not be probed ({error}).",
            fix="Methods that need no data still work; please report the architecture.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _collect(model, blocks, readers, makers), any(returned)


def _collect(
    model: nn.Module, blocks: tuple[str, ...], readers: dict[Key, list[str]], makers: dict[Key, str]
) -> dict[str, tuple[Group, ...]]:
    groups: dict[str, list[Group]] = {block: [] for block in blocks}
    for key, names in readers.items():
        unique = tuple(dict.fromkeys(names))
        linears = tuple(name for name in unique if isinstance(model.get_submodule(name), nn.Linear))
        others = tuple(name for name in unique if name not in linears)
        block = next(block for block in blocks if unique[0].startswith(block + "."))
        groups[block].append(Group(makers.get(key), linears, others))
    return {block: tuple(found) for block, found in groups.items()}


def groups_in_run(
    model: nn.Module, names: Sequence[str], runs: Sequence[Callable[[], object]]
) -> list[Group]:
    """Return groups of the linears `names` that received the same tensor while `runs` ran, in the order of running."""
    readers: dict[Key, list[str]] = {}
    alive: list[Tensor] = []
    handles = []
    for name in names:
        hook = _note_input(name, readers, alive)
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        for run in runs:
            run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Group] = {}
    for linears in readers.values():
        group = Group(None, tuple(name for name in dict.fromkeys(linears) if name not in found))
        found |= dict.fromkeys(group.linears, group)
    return list(dict.fromkeys(found.values()))


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _key(tensor: Tensor) -> Key:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), math.prod(tensor.shape)


def _note_input(name: str, readers: dict[Key, list[str]], alive: list[Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is not None:
            alive.append(tensor)
            readers.setdefault(_key(tensor), []).append(name)

    return hook


def _note_output(name: str, makers: dict[Key, str], alive: list[Tensor]) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, Tensor):
            alive.append(tensor)
            makers.setdefault(_key(tensor), name)  # the innermost module returns first

    return hook


def register_probe() -> None:
    """Register the attention that only knows shapes; used by models built for probing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def attention(
        _module: nn.Module, query: Tensor, _key_: Tensor, value: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, None]:
        batch, heads, tokens, _ = query.shape
        return query.new_empty(batch, tokens, heads, value.shape[-1]), None

    AttentionInterface.register(PROBE, attention)
    AttentionMaskInterface.register(PROBE, lambda *_args, **_kwargs: None)
