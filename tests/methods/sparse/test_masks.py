"""What the mask function hands to the hook, against transformers' own boolean masks."""

from __future__ import annotations

import torch
from transformers.masking_utils import (
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from angelslim.methods.sparse._masks import mask_function, pairs, spans


def real(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_plain_causality_stays_implicit() -> None:
    assert mask_function(2, 5, 5, attention_mask=None) is None
    assert mask_function(2, 5, 5, attention_mask=real("xxxxx", "xxxxx")) is None
    padded = real("..xxx", "xxxxx")
    assert mask_function(2, 5, 5, attention_mask=padded) is padded[:, -5:] or torch.equal(
        mask_function(2, 5, 5, attention_mask=padded), padded
    )
    assert mask_function(2, 2, 5, q_offset=3, attention_mask=None) is None, "a chunk"


def test_all_else_is_written_out() -> None:
    window = sliding_window_causal_mask_function(3)
    found = mask_function(1, 6, 6, mask_function=window, local_size=3)
    assert torch.equal(found, sdpa_mask(1, 6, 6, mask_function=window, allow_is_causal_skip=False))
    assert mask_function(1, 3, 3, mask_function=window, local_size=3) is None, "nothing outside the window"
    images = or_masks(causal_mask_function, lambda b, h, q, kv: (q < 3) & (kv < 3))
    found = mask_function(1, 6, 6, mask_function=images)
    assert found.shape == (1, 1, 6, 6) and found[0, 0, 0, 2]
    found = mask_function(1, 3, 3, mask_function=images, local_size=3, allow_is_causal_skip=False)
    assert found[0, 0, 0, 2], "an image inside a window is no plain causality"
    found = mask_function(1, 4, 9)
    assert found.shape == (1, 1, 4, 9) and not found[..., 4:].any(), "a static cache"


def test_spans() -> None:
    assert spans(real("..xxx", "xx...", "xxxxx", ".....")) == [(2, 5), (0, 2), (0, 5), (0, 0)]
    assert spans(real("x.xxx")) is None
    assert spans(real("..xxx").long()) == [(2, 5)]


def test_pairs_agree_with_transformers() -> None:
    device = torch.device("cpu")
    assert pairs(None, 5, 5, None, device) is None and pairs(None, 1, 5, None, device) is None
    assert pairs(None, 5, 5, 5, device) is None
    for q_len, window in [(5, None), (2, None), (5, 3), (2, 3), (1, 3)]:
        function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        rows = real("..xxx", "xxxxx")
        expected = sdpa_mask(
            2,
            q_len,
            5,
            q_offset=5 - q_len,
            mask_function=function,
            attention_mask=rows,
            allow_is_causal_skip=False,
        )
        found = pairs(rows, q_len, 5, window, device)
        used = expected.any(-1)
        assert found is not None and torch.equal(found[used], expected[used])
        assert found.any(-1).all(), "padding gets a number too"
