from __future__ import annotations

import pytest
import torch

from angelslim.base.errors import SchemeError
from angelslim.export._words import exactly, pack_words, unpack_words, whole_words


def test_words_by_hand():
    words = pack_words(torch.arange(8)[None], 4)
    assert words.tolist() == [[0x76543210]]
    assert pack_words(torch.arange(8)[None], 4, (0, 2, 4, 6, 1, 3, 5, 7)).tolist() == [[0x75316420]]
    assert pack_words(torch.tensor([[1, 2, 3, 255]]), 8).tolist() == [[0xFF030201 - 2**32]]


@pytest.mark.parametrize("bits", [4, 8])
def test_round_trip(bits):
    values = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(0))
    order = (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else None
    assert torch.equal(unpack_words(pack_words(values, bits, order), bits, order), values.int())


def test_words_are_whole():
    assert not whole_words((8, 16), 4) and not whole_words((4, 12), 8)
    assert "8 x 12 are not multiples of 8" in whole_words((8, 12), 4)


def test_exactly():
    fine = torch.tensor([0.5, 1.25, 2.0**-24, 65504.0])
    assert exactly(fine, torch.float16, "a").dtype == torch.float16
    for value in (1e-9, 1 / 3, 65519.9, 1e6):
        with pytest.raises(SchemeError, match="'a' has scales that float16"):
            exactly(torch.tensor([1.0, value]), torch.float16, "a")
