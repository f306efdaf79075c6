"""Curves for TensorBoard, which comes with the extra ``train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..base.errors import MissingExtra


class Board:
    """Event files of one run; a restart hides what an earlier try wrote beyond the checkpoint."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise MissingExtra("tensorboard", "train", "The setting tensorboard") from error
        self._writer = SummaryWriter(str(folder), purge_step=done or None)  # type: ignore[no-untyped-call]

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each named curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Let a running TensorBoard see the newest points."""
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()  # type: ignore[no-untyped-call]
