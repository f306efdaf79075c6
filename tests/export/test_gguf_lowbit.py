"""Two-bit and ternary blocks against slow decoders written from the bit layout, and against the format's library."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from angelslim.base.errors import SchemeError
from angelslim.export.files import _gguf_lowbit as lowbit
from angelslim.export.files import gguf as gguf_file
from angelslim.export.files._gguf_types import KINDS
from angelslim.numerics.scheme import Quant, Scheme, format_named, per_group

LEVELS = {"ternary": {-1: -1.0, 0: 0.0, 1: 1.0}, "seq": {0: -1.5, 1: -0.5, 2: 0.5, 3: 1.5}}


def half(data: bytes) -> float:
    return float(np.frombuffer(data, dtype="<f2")[0])


def decode_q2_0(block: bytes) -> list[float]:
    d, codes = half(block[:2]), block[2:]
    return [d * ((codes[j // 4] >> 2 * (j % 4) & 3) - 1) for j in range(64)]


def decode_tq2_0(block: bytes) -> list[float]:
    d, values = half(block[64:]), []
    for j in range(256):
        part, lane = divmod(j, 128)
        values.append(d * ((block[32 * part + lane % 32] >> 2 * (lane // 32) & 3) - 1))
    return values


def decode_tq1_0(block: bytes) -> list[float]:
    d, values = half(block[52:]), []
    for j in range(256):
        if j < 160:
            byte, place = block[j % 32], j // 32
        elif j < 240:
            byte, place = block[32 + (j - 160) % 16], (j - 160) // 16
        else:
            byte, place = block[48 + (j - 240) % 4], (j - 240) // 4
        values.append(d * ((((byte * 3**place) & 255) * 3 >> 8) - 1))
    return values


def decode_q2_k(block: bytes) -> list[float]:
    d, dmin, values = half(block[80:82]), half(block[82:84]), []
    for j in range(256):
        part, lane = divmod(j, 128)
        small, code = block[j // 16], block[16 + 32 * part + lane % 32] >> 2 * (lane // 32) & 3
        values.append(d * (small & 15) * code - dmin * (small >> 4))
    return values


def decode_q4_0(block: bytes) -> list[float]:
    d = half(block[:2])
    return [d * ((block[2 + j % 16] >> 4 * (j // 16) & 15) - 8) for j in range(32)]


DECODE = {
    "Q2_0": decode_q2_0,
    "TQ2_0": decode_tq2_0,
    "TQ1_0": decode_tq1_0,
    "Q2_K": decode_q2_k,
    "Q4_0": decode_q4_0,
}


def made(
    kind: str, group: int, rows: int = 3, columns: int = 512
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Random codes, float16 scales of all sizes (0, a negative and a subnormal one among them), the float64 weight."""
    generator = torch.Generator().manual_seed(group)
    low, high = lowbit.CODES[kind]
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, columns // group, generator=generator).half().float()
    scale.view(-1)[: min(3, scale.numel())] = torch.tensor([-0.75, 0.0, 2.0**-22])[: scale.numel()]
    levels = np.vectorize(LEVELS[kind].get)(codes.numpy())
    return codes, scale, levels * np.repeat(scale.double().numpy(), group, axis=1)


@pytest.mark.parametrize("group", [512, 256, 128, 64, 32])
@pytest.mark.parametrize("kind", lowbit.TYPES)
def test_every_type_that_is_said_to_hold_the_numbers_does(kind, group):
    codes, scale, wanted = made(kind, group)
    names = lowbit.gguf_types(kind, group)
    for name in names:
        data = lowbit.pack(kind, name, codes, scale)
        assert data.dtype == torch.uint8 and data.shape == (3, KINDS[name].bytes_of(512))
        rows = [bytes(row.tolist()) for row in data.reshape(-1, KINDS[name].nbytes)]
        decoded = np.array([DECODE[name](row) for row in rows]).reshape(3, 512)
        assert np.array_equal(decoded, wanted), name
        if name in gguf.GGMLQuantizationType.__members__:
            theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
            assert np.array_equal(theirs, wanted.astype(np.float32)), name
    assert "Q4_0" in names
    for name in set(lowbit.TYPES[kind]) - set(names):
        with pytest.raises(SchemeError, match=f"{group} is no multiple of that") as refused:
            lowbit.pack(kind, name, codes, scale)
        assert "Q4_0" in refused.value.fix


@pytest.mark.parametrize(
    ("scheme", "chosen", "said"),
    [("ternary", "Q4_0", "gguf:q2_0"), ("seq2", "Q4_0", ""), ("int4", "Q4_0", "")],
)
def test_a_smaller_type_that_holds_the_same_is_named(scheme, chosen, said, caplog):
    weight = Quant(format_named(scheme), per_group(64), scale="float16")
    checkpoint = SimpleNamespace(
        schemes={"up": Scheme(weight)}, tensors={"up.weight": SimpleNamespace(shape=(8, 128))}
    )
    with caplog.at_level("INFO", "angelslim"):
        gguf_file._say_smaller(checkpoint, {"up": gguf_file.Blocks(chosen, torch.zeros(0))})
    assert (said in caplog.text) if said else not caplog.text


def test_the_function_of_each_type_packs_it():
    codes, scale, _ = made("ternary", 256)
    for name in ("TQ1_0", "TQ2_0", "Q2_0"):
        assert torch.equal(
            getattr(lowbit, f"pack_{name.lower()}")(codes, scale), lowbit.pack("ternary", name, codes, scale)
        )
    codes, scale, _ = made("seq", 256)
    assert torch.equal(lowbit.pack_q2_k(codes, scale), lowbit.pack("seq", "Q2_K", codes, scale))
    assert torch.equal(lowbit.pack_q4_0("seq", codes, scale), lowbit.pack("seq", "Q4_0", codes, scale))


def test_the_library_packs_ternary_weights_as_we_do():
    codes, _, _ = made("ternary", 256)
    codes[:, ::256] = 1  # the library takes the largest magnitude of a block as its scale
    scale = torch.full((3, 2), 0.37).half().float()
    weight = (codes * scale.repeat_interleave(256, 1)).numpy()
    for name in ("TQ1_0", "TQ2_0"):
        theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])
        assert np.array_equal(lowbit.pack("ternary", name, codes, scale).numpy(), theirs), name


def test_types_that_have_no_such_weights_are_refused_and_the_others_named():
    codes, scale, _ = made("seq", 256)
    with pytest.raises(SchemeError, match="TQ2_0 has no seq weights") as refused:
        lowbit.pack("seq", "TQ2_0", codes, scale)
    assert refused.value.fix == "Use Q2_K or Q4_0."
    codes, scale, _ = made("ternary", 16)
    with pytest.raises(SchemeError) as refused:
        lowbit.pack("ternary", "Q4_0", codes, scale)
    assert refused.value.fix == "Share scales among 32, 64, 128 or 256 inputs."


@pytest.mark.parametrize(
    "kind, name", [("ternary", "TQ1_0"), ("ternary", "Q2_0"), ("seq", "Q2_K"), ("seq", "Q4_0")]
)
def test_scales_that_float16_does_not_hold_are_refused_unless_rounding_is_asked_for(kind, name):
    codes, _, _ = made(kind, 512)
    scale = torch.tensor([[0.1], [0.25], [3.0]])
    assert not lowbit.holds_scales(kind, name, scale) and lowbit.holds_scales(kind, name, scale[1:])
    with pytest.raises(SchemeError, match=f"{name} keeps scales in float16"):
        lowbit.pack(kind, name, codes, scale)
    rounded = lowbit.pack(kind, name, codes, scale, round_scales=True)
    assert torch.equal(rounded, lowbit.pack(kind, name, codes, scale.half().float()))
    with pytest.raises(SchemeError, match="65504"):
        lowbit.pack(kind, name, codes, scale * 1e6, round_scales=True)


def test_half_of_a_seq_scale_must_be_a_float16_too():
    scale = torch.tensor([[3 * 2.0**-24]])  # a float16; its half is none
    assert torch.equal(scale.half().float(), scale)
    assert not lowbit.holds_scales("seq", "Q2_K", scale) and lowbit.holds_scales("ternary", "TQ2_0", scale)
    codes = torch.arange(256, dtype=torch.int8)[None] % 4
    block = bytes(lowbit.pack_q2_k(codes, scale, round_scales=True)[0].tolist())
    values = decode_q2_k(block)
    assert [value / values[2] for value in values[:4]] == [-3, -1, 1, 3]  # the levels stay symmetric


def test_the_table_of_types_is_the_librarys():
    for name, kind in KINDS.items():
        if name in gguf.GGMLQuantizationType.__members__:
            theirs = gguf.GGMLQuantizationType[name]
            assert kind.number == theirs and (kind.block, kind.nbytes) == gguf.GGML_QUANT_SIZES[theirs], name
    types = {gguf.LlamaFileType(kind.file_type).name for name, kind in KINDS.items() if name != "Q2_0"}
    assert types == {"ALL_F32", "MOSTLY_MXFP4_MOE", "MOSTLY_Q4_K_S"} | {
        f"MOSTLY_{name}" for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q2_K", "TQ2_0", "TQ1_0")
    }
