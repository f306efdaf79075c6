"""Layer 5: sparse prefill inside vLLM, by its registry of attention backends.

vLLM finds this module as a plug-in (entry point ``vllm.general_plugins``) in each of its processes. It does nothing unless the
environment names what to attach: a selector, or the folder that a run of sparse attention left::

    ANGELSLIM_SPARSE_ATTENTION=tiny-sparse vllm serve MODEL --no-enable-prefix-caching --max-num-batched-tokens 131072

`register` then puts a subclass in the place of the stock backends for GPUs (FLASH_ATTN) and CPUs (CPU_ATTN). A request whose whole
prompt arrives in one step, long enough, is computed by selector and kernel from the step's own queries, keys and values;
everything else is the stock backend's, exactly as before, and counted with its reason in `STATS`: decoding, chunks of a prompt and
prompts with a cached prefix (their earlier keys lie in the engine's paged cache, whose layout differs from backend to
backend), short prompts, sliding windows. Where such requests share a step with others, the stock backend computes the
step first and their rows are then replaced, which costs what was to be saved: long prompts should not be chunked.

Written against vLLM 0.32. Under tensor parallelism a process sees some heads only, so rules for single heads are refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base.errors import ConfigError
from .kernels.attention.base import Case
from .kernels.attention.choose import choose
from .methods.sparse.assign import Rule, selector_of
from .methods.sparse.attach import Settings
from .methods.sparse.metadata import made
from .methods.sparse.plan import Context
from .methods.sparse.selectors.base import SELECTORS
from .methods.sparse.stats import LayerStats
from .methods.sparse.using import find

VARIABLE = "ANGELSLIM_SPARSE_ATTENTION"
BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
STATS: dict[int, LayerStats] = {}
_LAYER = re.compile(r"\blayers\.(\d+)\b")


@dataclass
class Prefill:
    """What is attached in this process, for all layers."""

    rules: list[Rule]
    settings: Settings
    layers: int
    selectors: dict[tuple[int, int], Any] = field(default_factory=dict)

    def selector(self, layer: int, heads: int) -> Any:
        """The selector of a layer, or None."""
        if (layer, heads) not in self.selectors:
            self.selectors[layer, heads] = selector_of(self.rules, layer, heads)
        return self.selectors[layer, heads]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor | None:
        """One whole prompt, q [L, H, D], k and v [L, Hkv, D], to [L, H, D]; None if it stays with the stock backend."""
        stats, settings = STATS.setdefault(layer, LayerStats()), self.settings
        selector, length = self.selector(layer, q.shape[1]), q.shape[0]
        kernel, why = choose(Case.of(q, v, settings.block), settings.kernel)
        least = Settings().crossover if settings.crossover == "auto" else settings.crossover
        reason = "set dense" if selector is None else ""
        assert least != "auto"
        if length < max(least, settings.block):
            reason = "below the crossover length"
        elif settings.kernel == "auto" and kernel.name == "dense":
            reason = f"no sparse kernel: {why}"
        if reason:
            stats.fallbacks[reason] += 1
            return None
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        ctx = Context(layer, self.layers, scaling, 0, length, settings.block)
        with stats.selector.running(q.device, settings.measure):
            plan = selector(q, k, v, ctx)
        with stats.kernel.running(q.device, settings.measure):
            out = kernel.run(q, k, v, plan, scaling=scaling)
        stats.calls += 1
        stats.kernels[kernel.name] += 1
        if settings.measure:
            stats.read(plan.kept(), length, length)
        return out[0].transpose(0, 1)


_PREFILL: list[Prefill] = []


def register() -> None:
    """What vLLM calls in each process: replace the backends, if the environment asks for it."""
    if not os.environ.get(VARIABLE):
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in BACKENDS:
        register_backend(AttentionBackendEnum[name], f"{__name__}.Sparse_{name}")


def use(source: str, config: Any = None, layers: int = 0, **changes: Any) -> Prefill:
    """Attach a selector by name, or a folder's settings, from the next step on; `config` is that of the text tower."""
    if source in SELECTORS:
        options = changes.pop("options", {})
        rules, settings = [Rule(made(source, options).select)], Settings(measure=False, **changes)
    else:
        found = find(source)
        if config is not None:
            found.check(config)
        rules, settings = found.make_rules(), found.settings(measure=False, **changes)
    _PREFILL[:] = [Prefill(rules, settings, layers or int(config.num_hidden_layers))]
    return _PREFILL[0]


def _prefill() -> Prefill:
    """What the environment names, made when the first layer is."""
    if not _PREFILL:
        from vllm.config import get_current_vllm_config

        settings = get_current_vllm_config()
        made_now = use(os.environ[VARIABLE], settings.model_config.hf_text_config)
        if settings.parallel_config.tensor_parallel_size > 1 and any(rule.heads for rule in made_now.rules):
            raise ConfigError(
                "Rules for single heads do not work under tensor parallelism.",
                fix="Give rules by layer alone.",
            )
    return _PREFILL[0]


def __getattr__(name: str) -> Any:
    """``Sparse_CPU_ATTN``: the subclass of a stock backend, made when vLLM asks for it by its path."""
    stock = name.removeprefix("Sparse_")
    if stock == name or stock not in BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    globals()[name] = _subclass(resolve_obj_by_qualname(AttentionBackendEnum[stock].value), name)
    return globals()[name]


def _subclass(stock: Any, name: str) -> Any:
    from vllm.v1.attention.backend import AttentionCGSupport

    once = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE  # a captured graph could not choose blocks

    class Builder(stock.get_builder_cls()):  # type: ignore[misc]
        _cudagraph_support = once

        @classmethod
        def get_cudagraph_support(cls, *given: Any, **more: Any) -> Any:
            own = super().get_cudagraph_support(*given, **more)
            return min(own, once, key=lambda support: support.value)

    class Impl(stock.get_impl_cls()):  # type: ignore[misc]
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            _prefill()

        def forward(
            self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, output: Any,
            *rest: Any, **more: Any,
        ) -> Any:  # fmt: skip
            def dense() -> Any:
                return super(Impl, self).forward(
                    layer, query, key, value, kv_cache, attn_metadata, output, *rest, **more
                )

            if attn_metadata is None:  # a profiling run
                return dense()
            return _forward(self, layer, (query, key, value), attn_metadata, output, dense)

    parts = {"get_impl_cls": staticmethod(lambda: Impl), "get_builder_cls": staticmethod(lambda: Builder)}
    return type(name, (stock,), parts)


def _forward(
    impl: Any, layer: Any, states: tuple[Tensor, ...], metadata: Any, output: Tensor, dense: Any
) -> Any:
    """One layer of one step: whole prompts sparsely, all else as the stock backend does."""
    number = int(found[1]) if (found := _LAYER.search(layer.layer_name)) else 0
    stats = STATS.setdefault(number, LayerStats())
    reason = _why_dense(impl)
    whole: list[tuple[int, int]] = []
    for start, stop, length in _requests(metadata):
        other = reason or (
            "decode" if stop - start == 1 else "" if stop - start == length else "chunk or cached prefix"
        )
        if other:
            stats.fallbacks[other] += 1
        else:
            whole.append((start, stop))
    results = []
    with torch.inference_mode():
        for start, stop in whole:
            q, k, v = (x[start:stop] for x in states)
            results.append(_prefill().attend(number, q, k, v, float(impl.scale)))
    if sum(result is not None for result in results) < len(_requests(metadata)):
        dense()
    for (start, stop), result in zip(whole, results, strict=True):
        if result is not None:
            output[start:stop] = result.reshape(output[start:stop].shape)
    return output


def _requests(metadata: Any) -> list[tuple[int, int, int]]:
    """(first query, the one after the last, keys) of each request; read from the device once a step."""
    if not hasattr(metadata, "_angelslim_requests"):
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        count = len(lengths)
        metadata._angelslim_requests = list(zip(starts[:count], starts[1 : count + 1], lengths, strict=True))
    requests: list[tuple[int, int, int]] = metadata._angelslim_requests
    return requests


def _why_dense(impl: Any) -> str:
    """What a plan cannot express of this layer, or an empty string."""
    window = getattr(impl, "sliding_window", None)
    if window not in (None, -1, (-1, -1)):
        return "sliding window"
    for name in ("alibi_slopes", "sinks"):
        if getattr(impl, name, None) is not None:
            return f"attention with {name}"
    if getattr(impl, "logits_soft_cap", 0):
        return "attention with softcap"
    kind = str(getattr(impl, "attn_type", "decoder")).lower()
    return "" if kind.endswith("decoder") and not kind.startswith("encoder") else "not causal"


def total_fallbacks() -> Counter[str]:
    """Requests a layer that stayed with the stock backend, by reason, over all layers."""
    counts: Counter[str] = Counter()
    for stats in STATS.values():
        counts.update(stats.fallbacks)
    return counts
