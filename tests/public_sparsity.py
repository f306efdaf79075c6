"""The knobs of sparse attention as the public files write them, and the options of ours that they become."""

from __future__ import annotations

from typing import Any

PUBLIC: dict[
    str, tuple[dict[str, Any], dict[str, Any]]
] = {  # as public files write it -> the selector's options
    "a_shape": ({"n_init": 128, "n_local": 3968}, {"n_init": 128, "n_local": 3968}),
    "tri_shape": (
        {"n_init": 128, "n_local": 3968, "n_last": 100},
        {"n_init": 128, "n_local": 3968, "n_last": 100},
    ),
    "minference": ({}, {}),
    "flexprefill": ({"gamma": 0.9, "tau": 0.1, "block_size": 128}, {"gamma": 0.9, "tau": 0.1}),
    "xattention": (
        {"threshold": 0.9, "stride": 8, "norm": 1, "block_size": 128, "chunk_size": 2048},
        {"threshold": 0.9, "stride": 8, "norm": 1},
    ),
    "stem": (
        {
            "backend": "torch",
            "stem_alpha": 0.7,
            "stride": 8,
            "block_size": 128,
            "chunk_size": 2048,
            "initial_blocks": 4,
            "window_size": 4,
        },
        {"alpha": 0.7, "stride": 8, "initial_blocks": 4, "window_blocks": 4},
    ),
    "flashprefill": (
        {"alpha": 0.2, "block_size": 128, "sink": 256, "window": 512, "last_n_block_full": 2},
        {"alpha": 0.2, "sink": 256, "window": 512, "last_blocks": 2},
    ),
    "vecattention": (
        {"threshold": 0.1, "block_size_q": 64, "block_size_k": 16, "group_k_block": 16},
        {"threshold": 0.1, "rows": 64},
    ),
    "cosa": (
        {"topp": 0.95, "skipsoftmax_threshold": 1000, "block_size": 128, "chunk_size": 65536, "stride": 8},
        {"threshold": 0.95, "stride": 8},
    ),
}
