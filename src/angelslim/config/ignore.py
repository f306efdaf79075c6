"""Which modules a configuration leaves alone: the entries of ``ignore_layers`` against module paths.

========================  =======================================================================
entry                     matches a module path such as ``model.layers.3.mlp.gate_proj`` when
========================  =======================================================================
``re:<pattern>``          the regular expression matches from the start of the path
a word: ``lm_head``       the word occurs anywhere in the path
a path: ``mlp.gate_proj`` its components stand side by side in the path, each one whole
========================  =======================================================================

The public dialect matches plain substrings. A word does the same here. A dotted entry must match whole
components, so that ``mlp.gate`` (a router) does not take ``mlp.gate_proj`` with it, which engines that fuse
gate and up would refuse; a plural is the one liberty: ``mlp.shared_expert`` finds ``mlp.shared_experts``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def matches(entry: str, path: str) -> bool:
    """Tell whether one entry of ``ignore_layers`` covers the module at `path`.

    >>> matches("mlp.gate", "model.layers.0.mlp.gate_proj"), matches("gate", "model.layers.0.mlp.gate_proj")
    (False, True)
    """
    if entry.startswith("re:"):
        return re.match(entry[3:], path) is not None
    wanted = entry.strip(".").split(".")
    if wanted == [""]:
        return False
    if "." not in entry:
        return entry in path
    parts = path.split(".")
    return any(
        all(part in (word, word + "s") for word, part in zip(wanted, parts[start:], strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def ignored(path: str, entries: Iterable[str]) -> bool:
    """Tell whether any entry of ``ignore_layers`` covers the module at `path`."""
    return any(matches(entry, path) for entry in entries)
