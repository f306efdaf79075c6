"""GGUF's types for tensors: their numbers, how many values a block has, how many bytes it takes.

A row is a run of blocks, and a block has its own scale, so the length of a row must be a multiple of `block`. The
numbers are those of ``enum ggml_type`` and ``enum llama_ftype``; they never change once a release has them. (The
table is our own because the Python library does not have ``Q2_0`` yet.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kind:
    """One type; `scales` are the bytes of a block, from and to, that hold its float16 scales."""

    number: int
    block: int
    nbytes: int
    file_type: int  # what a file that mostly consists of it calls itself
    scales: tuple[int, int] = (0, 0)

    def bytes_of(self, values: int) -> int:
        """Return the bytes of that many values; a part of a block is a programmer's mistake."""
        assert values % self.block == 0, (values, self)
        return values // self.block * self.nbytes


KINDS = {
    "F32": Kind(0, 1, 4, 0),
    "F16": Kind(1, 1, 2, 1),
    "BF16": Kind(30, 1, 2, 32),
    "Q8_0": Kind(8, 32, 34, 7, (0, 2)),
    "Q4_0": Kind(2, 32, 18, 2, (0, 2)),
    "Q4_K": Kind(12, 256, 144, 14, (0, 4)),
    "MXFP4": Kind(39, 32, 17, 38),
    "Q2_K": Kind(10, 256, 84, 10, (80, 84)),
    "Q2_0": Kind(42, 64, 18, 41, (0, 2)),
    "TQ2_0": Kind(35, 256, 66, 37, (64, 66)),
    "TQ1_0": Kind(34, 256, 54, 36, (52, 54)),
}
BY_NUMBER = {kind.number: name for name, kind in KINDS.items()}
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
