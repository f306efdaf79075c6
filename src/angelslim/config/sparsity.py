"""The section ``compression.sparsity``: sparse attention for the prefill of long prompts."""

from __future__ import annotations

from pydantic import Field

from .fields import Int, Number, Section, Word

KNOWN_PATTERNS = (
    "a_shape",
    "cosa",
    "flashprefill",
    "flexprefill",
    "minference",
    "stem",
    "tri_shape",
    "vecattention",
    "xattention",
)


class AttentionArguments(Section):
    """The knobs of all sparse attention methods; each method reads its own."""

    alpha: Number | None = None
    backend: Word | None = None
    block_size: Int | None = None
    block_size_k: Int | None = None
    block_size_q: Int | None = None
    chunk_size: Int | None = None
    gamma: Number | None = None
    group_k_block: Int | None = None
    initial_blocks: Int | None = None
    last_n_block_full: Int | None = None
    layer_keep_ratios: list[Number] | None = None
    n_init: Int | None = None
    n_last: Int | None = None
    n_local: Int | None = None
    norm: Number | None = None
    pattern_path: str | None = None
    sink: Int | None = None
    skipsoftmax_threshold: Number | None = None
    stem_alpha: Number | None = None
    stride: Int | None = None
    tau: Number | None = None
    threshold: Number | None = None
    topp: Number | None = None
    window: Int | None = None
    window_size: Int | None = None


class Sparsity(Section):
    """Which tokens each query block attends to."""

    name: str
    allow_pseudo_sparse: bool = False
    attn_kwargs: AttentionArguments = Field(default_factory=AttentionArguments)
