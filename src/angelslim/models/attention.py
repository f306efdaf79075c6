"""See, and change, what attention works on: queries, keys and values as the key-value cache holds them.

Modules of transformers compute their projections and rotary embeddings and hand the result to a function that is
looked up by the name in their configuration (``config._attn_implementation``). `watch` gives them a name of its own:
the function behind it shows query, key and value to whoever asked, and then calls the implementation that the model
would have used, with what came back. No forward is replaced, and modules that nobody watches pass straight through.

The shapes are those of the cache: query ``[batch, heads, tokens, head_dim]``, key and value
``[batch, kv_heads, tokens, head_dim]``, keys after the rotary embedding, before groups of queries share them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..base.errors import ModelError
from .loading import Source

PREFIX = "angelslim_watch_"
States = tuple[Tensor, Tensor, Tensor]
Watch = Callable[[nn.Module, Tensor, Tensor, Tensor], States | None]  # None leaves them as they are

_WATCHES: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()


def watch(modules: Iterable[nn.Module], function: Watch) -> None:
    """Show the attention states of `modules` to `function` from now on; modules without attention are passed over.

    The modules' configurations stay switched to the watching implementation, as do those of modules that share them.
    """
    for module in modules:
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation_internal", None) is None:
            continue
        assert module not in _WATCHES, "attention is watched once at a time"
        _WATCHES[module] = function
        _switch(config)


@contextmanager
def watched(root: nn.Module, function: Watch) -> Iterator[None]:
    """Show the attention states of every module in `root` to `function` inside the ``with`` block."""
    modules = [module for module in root.modules() if module not in _WATCHES]
    configs = {
        id(config): config for module in modules if (config := getattr(module, "config", None)) is not None
    }
    before = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs.values()]
    try:
        watch(modules, function)
        yield
    finally:
        for module in modules:
            _WATCHES.pop(module, None)
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def stored_name(source: Source, path: str) -> str:
    """Return what the checkpoint calls the module at `path`."""
    return next((name for name, module in _names(source, path) if module == path), path)


def module_path(source: Source, stored: str) -> str:
    """Return the path of the module that the checkpoint calls `stored`."""
    return next((module for name, module in _names(source, stored) if name == stored), stored)


def _names(source: Source, last: str) -> Iterator[tuple[str, str]]:
    """Yield the checkpoint's and the model's name of modules whose path ends like `last`."""
    leaf = "." + last.rpartition(".")[2] + "."
    for tensor, target in source.targets.items():
        if target.pattern is None and leaf in tensor and leaf in target.parameter:
            (name, _, tail), (module, _, other) = tensor.rpartition(leaf), target.parameter.rpartition(leaf)
            if tail == other:
                yield name + leaf[:-1], module + leaf[:-1]


def _switch(config: Any) -> None:
    """Register the watching twin of the implementation that `config` names, and name it instead."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    original = config._attn_implementation_internal
    if original.startswith(PREFIX):
        return
    AttentionInterface.register(PREFIX + original, _watching(original))
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(PREFIX + original, ALL_MASK_ATTENTION_FUNCTIONS[original])
    config._attn_implementation_internal = PREFIX + original  # the public setter would change towers as well


def _watching(original: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        function = _WATCHES.get(module)
        changed = function(module, query, key, value) if function is not None else None
        query, key, value = changed or (query, key, value)
        return _implementation(module, original)(module, query, key, value, *args, **kwargs)

    return attention


def _implementation(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return the function that `module` would have called: its own file's table, and its own file's eager one."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    file = sys.modules[owner.__module__]
    table = getattr(file, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    found: Callable[..., Any] | None = table.get_interface(
        name, getattr(file, "eager_attention_forward", None)
    )
    if found is None:
        raise ModelError(
            f"The attention {name!r} of {type(module).__name__} cannot be found, so it cannot be watched.",
            fix="Load the model with the attention implementation sdpa.",
        )
    return found
