"""Make language, vision-language and speech models small and fast, and ship them.

>>> import angelslim
>>> result = angelslim.compress("tiny-lm", "fp8_dynamic")  # doctest: +SKIP
>>> result.save_pretrained("tiny-lm-fp8")  # doctest: +SKIP

Names are loaded when first used: importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine as Engine
    from .engine import compress as compress
    from .methods.sparse.using import sparse_attention as sparse_attention
    from .models.builtin import builtin_model as builtin_model
    from .reopen import load as load

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "builtin_model", "compress", "load", "sparse_attention"]

_HOMES = {
    "compress": "engine",
    "Engine": "engine",
    "load": "reopen",
    "builtin_model": "models.builtin",
    "sparse_attention": "methods.sparse.using",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
