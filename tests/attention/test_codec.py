"""The codec against plain loops over single numbers and single bits."""

from __future__ import annotations

import pytest
import torch

from avlprof.attention.codec import decode, degraded, encode, packed_bytes
from avlprof.policy import packed_share, scale_group

BITS = (8, 4, 3, 2)
SIZES = (1, 7, 8, 20, 32, 48, 64, 80, 128)


def states(size, seed=0, dtype=torch.float32, tokens=5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, tokens, size, generator=generator) * 3 + 1).to(dtype)


def plain(row, bits):
    """Codes, scales, offsets and values of one token of one head, number by number."""
    size, most = len(row), 2**bits - 1
    group = max(n for n in range(1, 33) if size % n == 0)
    codes, scales, offsets, values = [], [], [], []
    for start in range(0, size, group):
        part = [float(x) for x in row[start : start + group]]
        offset = float(torch.tensor(min(part)).half())
        scale = max(float(torch.tensor((max(part) - offset) / most).half()), 0.0)
        scales.append(scale)
        offsets.append(offset)
        for x in part:
            code = 0 if scale == 0 else min(max(round((x - offset) / scale), 0), most)
            codes.append(code)
            values.append(code * scale + offset)
    return codes, scales, offsets, values


def read_bits(stream, bits, index):
    """Code `index` of bytes that are one string of bits, the lowest bit of each byte first."""
    string = [byte >> bit & 1 for byte in stream for bit in range(8)]
    return sum(bit << place for place, bit in enumerate(string[index * bits : (index + 1) * bits]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
def test_codes_and_values_are_those_of_the_formula(bits, size):
    x = states(size, seed=size + bits)
    packed, near = encode(x, bits), 0
    for row, codes, scale, offset, value in zip(
        x.flatten(0, 2), *(part.flatten(0, 2) for part in (*packed.parts, decode(packed))), strict=True
    ):
        wanted, scales, offsets, values = plain(row, bits)
        assert scale.tolist() == pytest.approx(scales, rel=1e-3)
        assert offset.tolist() == offsets
        mine = [read_bits(codes.tolist(), bits, i) for i in range(size)]
        near += sum(a != b for a, b in zip(mine, wanted, strict=True))
        step = torch.tensor(scales).max()
        assert (value - torch.tensor(values)).abs().max() <= step * 1.01 + 1e-6
    assert near <= 1  # of a number half-way between two codes, fp32 may say either


@pytest.mark.parametrize("bits", BITS)
def test_no_number_moves_by_more_than_half_a_step(bits):
    x = states(64, seed=bits)
    steps = encode(x, bits).scale.float().repeat_interleave(32, dim=-1)
    offsets = encode(x, bits).offset.float().abs().repeat_interleave(32, dim=-1)
    assert ((degraded(x, bits) - x).abs() <= 0.5 * steps + offsets * 2**-10 + steps * 2**-9).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
def test_what_few_bits_leave_needs_no_packing(bits, size):
    for dtype in (torch.float32, torch.bfloat16):
        x = states(size, seed=5, dtype=dtype)
        before = x.clone()
        assert torch.equal(degraded(x, bits), decode(encode(x, bits), dtype))
        assert torch.equal(x, before)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_those_that_policies_count(bits, size):
    packed = encode(states(size), bits)
    own = sum(part[0, 0, 0].numel() * part.element_size() for part in packed.parts)
    assert own == packed_bytes(size, bits)
    assert packed.nbytes == own * 30
    if size * bits % 8 == 0 and (bits != 3 or size % 8 == 0):
        assert own == pytest.approx(2 * size * packed_share(bits, scale_group(size)))


def test_the_format_is_that_of_the_table():
    """Nibbles low first, two bits low first, three bytes of eight codes; a kernel reads them so."""
    ramp = torch.arange(16, dtype=torch.float32).view(1, 1, 1, 16)
    assert encode(ramp, 4).codes.flatten().tolist() == [i | (i + 1) << 4 for i in range(0, 16, 2)]
    assert encode(ramp * 17, 8).codes.flatten().tolist() == [i * 17 for i in range(16)]
    quarter = torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0]).view(1, 1, 1, 8)
    assert encode(quarter, 2).codes.flatten().tolist() == [0b11100100, 0b00011011]
    eighth = torch.arange(8.0).view(1, 1, 1, 8)
    assert encode(eighth, 3).codes.flatten().tolist() == list(
        0b111110101100011010001000.to_bytes(3, "little")
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_stored_once_is_stored_again_without_loss(bits, dtype):
    """In fp32; in half precision a value lies within a step of what it was."""
    once = degraded(states(64, seed=3, dtype=dtype), bits)
    again = degraded(once, bits)
    if dtype is torch.float32:
        assert torch.equal(once, again)
    step = encode(once, bits).scale.float().repeat_interleave(32, dim=-1)
    assert ((once.float() - again.float()).abs() <= step + once.float().abs() * 2**-7).all()


def test_constant_huge_and_empty_groups():
    flat = torch.full((1, 1, 2, 32), 2.5)
    assert torch.equal(degraded(flat, 2), flat)
    huge = torch.tensor([-1e9, 1e9]).repeat(16).view(1, 1, 1, 32)
    assert degraded(huge, 4).isfinite().all()
    assert degraded(flat[:, :, :0], 3).shape == (1, 1, 0, 32)


def test_tokens_are_sliced_and_gathered_as_they_are():
    x = states(48, tokens=9)
    packed = encode(x, 3)
    assert torch.equal(decode(packed.narrow(2, 4)), decode(packed)[:, :, 2:6])
    order = torch.tensor([8, 0, 3])
    chosen = packed.each(lambda part: part.index_select(2, order))
    assert torch.equal(decode(chosen), decode(packed)[:, :, order])
