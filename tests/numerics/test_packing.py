from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from angelslim.numerics.packing import pack_fp4, pack_int4, pack_ints, unpack_fp4, unpack_int4, unpack_ints


def codes(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)


def test_first_code_lies_in_the_lowest_bits_with_an_offset_of_eight():
    assert pack_int4(torch.tensor([[-7, -8, -8, -8, -8, -8, -8, -8]], dtype=torch.int8)).tolist() == [[1]]
    assert pack_int4(torch.full((1, 8), 7, dtype=torch.int8)).tolist() == [[-1]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 19), st.integers(1, 19), st.sampled_from([0, 1]))
def test_equals_compressed_tensors_for_any_length(rows, columns, dim):
    values = codes(rows, columns)
    packed = pack_int4(values, dim)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, pack_to_int32(values, 4, packed_dim=dim))
    assert torch.equal(unpack_from_int32(packed, 4, values.shape, packed_dim=dim), values)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 31])
def test_round_trip(length, dim):
    values = codes(length, 5) if dim == 0 else codes(5, length)
    assert torch.equal(unpack_int4(pack_int4(values, dim), length, dim), values)


def test_two_fp4_codes_share_a_byte_the_first_in_the_lower_half():
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.tensor([magnitudes, [-value for value in magnitudes]]).to(torch.float8_e4m3fn)
    packed = pack_fp4(codes)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]]
    assert torch.equal(unpack_fp4(packed).view(torch.uint8), codes.view(torch.uint8))


def test_fp4_packing_equals_compressed_tensors():
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8

    bytes_ = torch.randint(0, 256, (7, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = unpack_fp4(bytes_)
    assert codes.shape == (7, 64)
    assert torch.equal(codes.float(), unpack_fp4_from_uint8(bytes_, 7, 64, torch.float32))
    assert torch.equal(pack_fp4(codes), pack_fp4_to_uint8(codes.float()))
    assert torch.equal(pack_fp4(codes), bytes_)


@pytest.mark.parametrize("dim", [0, 1])
def test_eight_bits_pack_as_compressed_tensors_packs_them(dim):
    codes = torch.randint(-128, 128, (9, 21), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_ints(codes, 8, dim)
    assert torch.equal(packed, pack_to_int32(codes, 8, dim))
    assert torch.equal(unpack_ints(packed, 8, codes.shape[dim], dim), codes)
