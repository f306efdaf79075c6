"""The hook: sparse prefill on any transformers model that uses the attention interface, with nothing patched.

`attach` registers one attention function and one mask function under a name and selects that name for the model's
text tower. The model's own code applies positions and normalisation, fills the cache, and hands over queries
[B, H, Lq, D] with keys and values that are not repeated. From there:

    selector(q, k, v, context) -> plan -> kernel(q, k, v, plan)

for prompts, whole or in chunks. Decoding, prompts below the crossover, and whatever a plan cannot express stay
dense and exact, and each such call is counted with its reason. A padded batch is computed row by row, each row on its
own real tokens: it gets the plan that it would get alone.

    with attach(model, selector, Settings(crossover=8192)) as attached:
        model.generate(...)
    attached.stats[0].row()

Densities and times are in `Attached.stats`; `Attached.remove` gives the model its attention back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...base.errors import ConfigError, ModelError
from ...kernels.attention.base import Case, Kernel
from ...kernels.attention.choose import KERNELS, choose
from ._exact import EAGER_ONLY, exact
from ._index import is_causal, narrowed, picked, share_read
from ._masks import mask_function, spans
from .assign import Rule, selector_of
from .crossover import find
from .plan import BlockPlan, Context, Selector
from .stats import LayerStats, total

NAME = "angelslim_sparse"
Observer = Callable[
    [Tensor, Tensor, Tensor, BlockPlan, Context], None
]  # of each sparse call, outside its times
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Attached] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Settings:
    """How plans are made and computed.

    `block` is the side of a block in tokens. Prompts shorter than `crossover` tokens stay dense, since choosing blocks costs
    more than it saves there; "auto" measures that length at the first prompt (`crossover.find`). `kernel` names a kernel or
    is "auto", `measure` records densities and times, `prompt_len` is the length of the whole prompt, where it is known and
    the prompt comes in chunks.
    """

    block: int = 128
    crossover: int | Literal["auto"] = 4096
    kernel: str = "auto"
    measure: bool = True
    prompt_len: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no kernel could compute."""
        if self.block < 1:
            raise ConfigError(f"A block has {self.block} tokens.", fix="Use 128, or 64.")
        if self.kernel != "auto" and self.kernel not in KERNELS:
            choose(Case(torch.device("cpu"), torch.float32, 64, 64, 128, 128), self.kernel)


class Attached:
    """A hook on a model; a context manager that removes itself."""

    def __init__(self, model: Any, rules: Sequence[Rule], settings: Settings) -> None:
        self.settings, self.rules = settings, rules
        self.observer: Observer | None = None
        self.stats: dict[int, LayerStats] = {}
        tower = tower_of(model)
        self._tower = weakref.ref(tower)  # the model knows its hook, so the hook must not keep the model
        self._layers = int(getattr(tower.config, "num_hidden_layers", 0))
        self._before: str = tower.config._attn_implementation
        self._selectors: dict[tuple[int, int], Selector | None] = {}
        self._crossovers: dict[tuple[object, ...], float] = {}
        self._spans: tuple[Tensor, list[tuple[int, int]] | None] | None = None
        register()
        if any(module in _ATTACHED for module in tower.modules()):
            raise ModelError(
                "The model has sparse attention already.", fix="Call remove() on the first hook."
            )
        tower.set_attn_implementation(NAME)
        if tower.config._attn_implementation != NAME:
            raise ModelError(
                f"{type(tower).__name__} does not use transformers' attention interface.",
                fix="Sparse attention needs a model whose attention can be chosen with attn_implementation.",
            )
        for module in tower.modules():
            _ATTACHED[module] = self

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model its attention back; the stats stay readable. A second call does nothing."""
        tower = self._tower()
        mine = [module for module in tower.modules() if _ATTACHED.get(module) is self] if tower else []
        for module in mine:
            del _ATTACHED[module]
        if tower and mine:
            tower.set_attn_implementation(self._before)

    def total(self) -> dict[str, Any]:
        """All layers together, as plain values."""
        return total(self.stats)

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        """One call of one layer: [B, Lq, H, Dv]."""
        layer = int(getattr(module, "layer_idx", None) or 0)
        stats = self.stats.setdefault(layer, LayerStats())
        indices = arguments.pop("indices", None)
        if indices is not None and mask is not None:
            return self._indexed(module, layer, (q, k, v), mask, indices, arguments)
        given = arguments.pop("is_causal", None)
        causal = bool(getattr(module, "is_causal", True) if given is None else given)
        reason = why_dense(q, k, v, mask, causal, arguments)
        rows = None
        if not reason and mask is not None:
            rows = self._rows(mask)
            reason = "" if rows else "padding inside a row"
        if reason:
            stats.fallbacks[reason] += 1
            return exact(module, q, k, v, mask, causal, arguments)
        if rows is None:
            return self._prefill(module, layer, q, k, v, arguments)
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        offset = k.shape[2] - q.shape[2]
        for b, (start, stop) in enumerate(rows):
            queries = slice(max(start - offset, 0), max(stop - offset, 0))
            if queries.start < queries.stop:
                one, keys = slice(b, b + 1), slice(start, stop)
                out[one, queries] = self._prefill(
                    module, layer, q[one, :, queries], k[one, :, keys], v[one, :, keys], arguments
                )
        return out

    def crossover(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, scaling: float) -> float:
        """The length from which such calls are sparse: as set, or measured once with a layer from the model's middle."""
        given, layer = self.settings.crossover, self._layers // 2
        if given != "auto":
            return given
        key = (q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device)
        if key not in self._crossovers:
            selector = self._selector(layer, q.shape[1])
            ctx = Context(layer, self._layers, scaling, 0, k.shape[2], self.settings.block)
            found = find(selector, kernel, (q, k, v), ctx) if selector else None
            self._crossovers[key] = found or float("inf")
        return self._crossovers[key]

    def _selector(self, layer: int, heads: int) -> Selector | None:
        if (layer, heads) not in self._selectors:
            self._selectors[layer, heads] = selector_of(self.rules, layer, heads)
        return self._selectors[layer, heads]

    def _rows(self, mask: Tensor) -> list[tuple[int, int]] | None:
        """The real tokens of each row; all layers of a forward share one mask, which is read once."""
        if self._spans is None or self._spans[0] is not mask:
            self._spans = (mask, spans(mask))
        return self._spans[1]

    def _indexed(
        self,
        module: nn.Module,
        layer: int,
        states: tuple[Tensor, Tensor, Tensor],
        mask: Tensor,
        indices: Tensor,
        arguments: dict[str, Any],
    ) -> Tensor:
        """A layer that picks its own keys: [B, Lq, H, Dv]; the selector takes away more of them (`_index`)."""
        (q, k, v), settings, stats = states, self.settings, self.stats[layer]
        read, prompt_len = picked(mask, indices), max(settings.prompt_len or 0, k.shape[2])
        selector = self._selector(layer, q.shape[1])
        reason = why_dense(q, k, v, None, True, arguments)
        if not reason and selector is None:
            reason = "set dense"
        elif not reason and (settings.crossover == "auto" or prompt_len < settings.crossover):
            reason = "below the crossover length"  # nothing is gained in time: "auto" is never reached
        elif not reason and not is_causal(mask):
            reason = "padding beside an index"
        if reason or selector is None:
            stats.fallbacks[reason] += 1
            return exact(module, q, k, v, read, True, arguments)
        offset = k.shape[2] - q.shape[2]
        ctx = Context(
            layer, self._layers, arguments["scaling"], offset, prompt_len, settings.block, kv_len=k.shape[2]
        )
        with torch.no_grad(), stats.selector.running(q.device, settings.measure):
            plan = selector(q, k, v, ctx)
        read = narrowed(read, plan)
        stats.calls += 1
        stats.kernels["masked, on the model's own index"] += 1
        if settings.measure:
            stats.read(share_read(read), q.shape[2], k.shape[2])
        with stats.kernel.running(q.device, settings.measure):
            return exact(module, q, k, v, read, True, arguments)

    def _prefill(
        self, module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        """Rows without padding: [B, Lq, H, Dv], sparse if it pays."""
        settings, stats = self.settings, self.stats[layer]
        prompt_len = max(settings.prompt_len or 0, k.shape[2])
        selector = self._selector(layer, q.shape[1])
        kernel, why = choose(Case.of(q, v, settings.block), settings.kernel)
        reason = ""
        if q.shape[2] < min(settings.block, k.shape[2]):
            reason = "fewer queries than a block"
        elif selector is None:
            reason = "set dense"
        elif settings.kernel == "auto" and kernel.name == "dense":
            reason = f"no sparse kernel: {why}"
        elif prompt_len < self.crossover(q, k, v, kernel, arguments["scaling"]):
            reason = "below the crossover length"
        if reason or selector is None:
            stats.fallbacks[reason] += 1
            return exact(module, q, k, v, None, True, arguments)
        ctx = Context(
            layer=layer,
            layers=self._layers,
            scaling=arguments["scaling"],
            q_offset=k.shape[2] - q.shape[2],
            prompt_len=prompt_len,
            block=settings.block,
            kv_len=k.shape[2],
        )
        with torch.no_grad(), stats.selector.running(q.device, settings.measure):
            plan = selector(q, k, v, ctx)
        with torch.no_grad(), stats.kernel.running(q.device, settings.measure):
            out = kernel.run(q, k, v, plan, scaling=ctx.scaling)
        if self.observer is not None:
            self.observer(q, k, v, plan, ctx)
        stats.calls += 1
        stats.kernels[kernel.name] += 1
        if settings.measure:
            stats.read(plan.kept(), q.shape[2], k.shape[2])
        return out.transpose(1, 2).contiguous()


def attach(model: Any, selector: Selector | Sequence[Rule], settings: Settings | None = None) -> Attached:
    """Switch the text tower of a loaded model to sparse prefill; `selector` chooses for all, or rules say who does."""
    rules = selector if isinstance(selector, Sequence) else [Rule(selector)]
    return Attached(model, rules, settings or Settings())


def why_dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, arguments: dict[str, Any]
) -> str:
    """Why a call cannot be sparse whatever the settings are, or an empty string."""
    window = arguments.get("sliding_window")
    if not causal or k.shape[2] < q.shape[2]:
        return "not causal"
    if q.shape[2] == 1:
        return "decode"
    if mask is not None and mask.dim() != 2:
        return "sliding window" if window is not None else "a mask that is not plain causality"
    if window is not None and k.shape[2] > window:
        return "sliding window"
    for name in EAGER_ONLY:
        if arguments.get(name) is not None:
            return f"attention with {name}"
    if arguments.get("dropout"):
        return "dropout"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "gradients"
    return ""


def tower_of(model: Any) -> Any:
    """The part of a model that reads text: its decoder, whose configuration names the attention."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not hasattr(decoder, "set_attn_implementation"):
        raise ModelError(
            f"{type(model).__name__} has no decoder of transformers' kind.", fix="Load it with transformers."
        )
    return decoder


def register() -> None:
    """Make the attention and its masks known to transformers; again is no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, mask_function)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """What transformers calls."""
    attached = _ATTACHED.get(module)
    if attached is None:
        raise ModelError(
            f"{type(module).__name__} was told to use {NAME!r} without a hook.",
            fix="Call angelslim.methods.sparse.attach.attach(model, selector).",
        )
    if more.get("scaling") is None:
        more["scaling"] = query.shape[-1] ** -0.5
    return attached.attend(module, query, key, value, attention_mask, more), None
