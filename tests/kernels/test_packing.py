"""Bit planes: the layout of quant/FORMAT.md bit by bit, and reading back what was packed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.kernels.packing import pack_planes, unpack_planes, words


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


def stored_bit(planes, plane, row, column):
    """One bit, read as the format says."""
    word = int(planes[plane, row, column // 32]) & 0xFFFFFFFF
    return word >> (column % 32) & 1


@pytest.mark.parametrize(("columns", "expected"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_a_word_holds_thirty_two_columns(columns, expected):
    assert words(columns) == expected


def test_plane_0_is_the_most_significant_bit_and_column_0_the_least_significant():
    codes = torch.zeros(1, 34, dtype=torch.uint8)
    codes[0, 0] = 0b100
    codes[0, 5] = 0b011
    codes[0, 31] = 0b101
    codes[0, 33] = 0b110
    top = -(1 << 31)  # bit 31 of an int32
    assert pack_planes(codes, 3).tolist() == [
        [[top + (1 << 0), 1 << 1]],
        [[1 << 5, 1 << 1]],
        [[top + (1 << 5), 0]],
    ]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_stored_bit_is_where_the_format_says(bits):
    codes = random_codes(3, 45, bits)
    planes = pack_planes(codes, bits)
    assert planes.shape == (bits, 3, 2)
    assert planes.dtype == torch.int32
    for plane in range(bits):
        for row in range(3):
            for column in range(45):
                expected = int(codes[row, column]) >> (bits - 1 - plane) & 1
                assert stored_bit(planes, plane, row, column) == expected


@pytest.mark.parametrize("columns", [1, 7, 31, 33, 63])
def test_padding_bits_are_zero(columns):
    planes = pack_planes(torch.full((2, columns), 255, dtype=torch.uint8), 8)
    for plane in range(8):
        for row in range(2):
            assert all(stored_bit(planes, plane, row, column) == 0 for column in range(columns, planes.shape[2] * 32))


@given(bits=st.integers(1, 8), rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_code_survives_packing_at_every_width(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    assert torch.equal(unpack_planes(list(pack_planes(codes, bits)), columns), codes)


@given(parent=st.integers(2, 8), data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_first_planes_alone_hold_the_top_bits_of_every_code(parent, data):
    bits = data.draw(st.integers(1, parent))
    codes = random_codes(4, 50, parent)
    planes = pack_planes(codes, parent)
    assert torch.equal(unpack_planes(list(planes[:bits]), 50), codes >> (parent - bits))


@pytest.mark.parametrize("columns", [5, 32])
def test_strides_do_not_matter(columns):
    codes = random_codes(columns, 6, 4).t()  # [6, columns], column by column in memory
    planes = pack_planes(codes, 4)
    assert torch.equal(planes, pack_planes(codes.contiguous(), 4))
    spread = torch.stack([planes, planes], dim=-1)[..., 0]  # every other word in memory
    assert torch.equal(unpack_planes(list(spread), columns), codes)
