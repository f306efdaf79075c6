"""The models that come with the package, so that a first run needs no download.

`tiny-lm` is a Qwen3 of 5.8 million parameters that adds three-digit numbers, with or without thinking, looks
up keys in a list, and continues Python text. ``angelslim.lab.tiny_lm`` trains it; its folder holds the card.
"""

from __future__ import annotations

from pathlib import Path

from ..base.errors import ModelError, did_you_mean

BUILTIN = ("tiny-lm", "tiny-long")

_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def builtin_model(name: str) -> Path:
    """Return the folder of a built-in model; an unknown name or a missing folder is a `ModelError`."""
    if name not in BUILTIN:
        raise ModelError(f"Unknown built-in model {name!r}.", fix=did_you_mean(name, BUILTIN))
    folder = _ASSETS / name
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"The built-in model {name!r} is missing from this installation.",
            where=str(folder),
            fix="Install the package again.",
        )
    return folder
