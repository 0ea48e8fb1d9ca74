"""The layout for GPUs: exact both ways, any size, and nothing moves when the width changes."""

import pytest
import torch

from compress.kernels.bitplane import reference_weight
from compress.kernels.layout import Tiled, head_for, random_tiled, rounded
from compress.kernels.packing import pack_planes


def packed(rows, columns, seed, parent, table=torch.float16):
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 2**parent, (rows, columns), dtype=torch.uint8, generator=generator)
    books = {bits: torch.randn(rows, 2**bits, generator=generator).to(table) for bits in range(seed, parent + 1)}
    return pack_planes(codes, parent), books


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 31), (64, 256), (70, 100)])
@pytest.mark.parametrize(("seed", "parent"), [(1, 3), (2, 8), (3, 8), (4, 6), (5, 5)])
@pytest.mark.parametrize("table", [torch.float16, torch.float32])
def test_the_canonical_tensors_come_back_bit_for_bit(rows, columns, seed, parent, table):
    planes, books = packed(rows, columns, seed, parent, table)
    again, tables = Tiled.build(list(planes), books, columns).canonical()
    assert torch.equal(again, planes)
    assert all(torch.equal(tables[bits], book) and tables[bits].dtype == table for bits, book in books.items())


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_every_width_reads_the_weights_of_the_canonical_planes(seed):
    planes, books = packed(37, 70, seed, 6)
    tiled = Tiled.build(list(planes), books, 70)
    for bits, book in books.items():
        expected = reference_weight(list(planes[:bits]), book, 70, torch.float32)
        assert torch.equal(tiled.dense(bits, torch.float32), expected)


def test_large_matrices_are_made_in_parts(monkeypatch):
    from compress.kernels import layout

    planes, books = packed(200, 64, 3, 4)
    whole = Tiled.build(list(planes), books, 64)
    monkeypatch.setattr(layout, "_AT_ONCE", 3 * 32 * 64)  # three tiles
    parts = Tiled.build(list(planes), books, 64)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.canonical()[0], planes)


def test_a_width_reads_a_prefix_of_what_lies_in_memory():
    """Codes at 3 bits of 8 are the first three words, and the same storage."""
    planes, books = packed(64, 64, 3, 8)
    wide, narrow = Tiled.build(list(planes), books, 64), Tiled.build(list(planes[:3]), {3: books[3]}, 64)
    assert torch.equal(wide.codes[:3], narrow.codes)
    assert wide.codes[:3].data_ptr() == wide.codes.data_ptr()


def test_neighbouring_rows_lie_side_by_side_and_nibbles_are_ready_to_look_up():
    """The documented places, for one code in one word: row 33, column 9, code 0b1011 of a 4-bit seed."""
    codes = torch.zeros(64, 32, dtype=torch.uint8)
    codes[33, 9] = 0b1011
    tiled = Tiled.build(list(pack_planes(codes, 4)), {4: torch.zeros(64, 16).half()}, 32)
    assert tiled.codes.nonzero().tolist() == [[1, 1, 0, 1]]  # nibble word of columns 8 to 15, second tile, its row 1
    assert tiled.codes[1, 1, 0, 1] == 0b1101 << 4  # plane 0 is bit 0; second nibble


def test_tables_in_registers_are_the_bytes_of_the_entries():
    tiled = random_tiled(33, 32, 3)
    table = tiled.registers[3][0]
    assert table.shape == (4, 64)
    low, high = (table[part : part + 2, 5].contiguous().view(torch.uint8) for part in (0, 2))
    entries = torch.stack([low, high], 1).flatten().view(torch.float16)
    assert torch.equal(entries, tiled.codebook(3)[5, [0, 4, 2, 6, 1, 5, 3, 7]])  # codes with their bits reversed


def test_seeds_of_two_and_four_bits_are_packed_together():
    assert [head_for(seed) for seed in range(1, 9)] == [1, 2, 1, 4, 4, 4, 4, 4]


# Entries of 8 bits, at width 4


def test_entries_of_eight_bits_are_the_nearest_of_256_even_steps_and_zero_stays_zero():
    book = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).half()
    book[0], book[1], book[2, 3], book[3] = 0.0, book[1].abs() + 3, 0.0, book[3] * 2.0**-22
    step = (book.double().amax(1).clamp(min=0) - book.double().amin(1).clamp(max=0)) / 255
    error = (rounded(book).double() - book.double()).abs().amax(1)
    assert (error <= 0.51 * step + 2.0**-40).all()
    assert (rounded(book)[book == 0] == 0).all()


@pytest.mark.parametrize("table", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 33, 64])
def test_rounded_entries_change_width_four_alone_and_the_stored_tables_come_back(rows, table):
    planes, books = packed(rows, 40, 3, 6, table)
    exact, tiled = (Tiled.build(list(planes), books, 40, exact) for exact in (True, False))
    again, tables = tiled.canonical()
    assert torch.equal(again, planes)
    assert all(torch.equal(tables[bits], book) for bits, book in books.items())
    for bits, book in books.items():
        worth = rounded(book) if bits == 4 else book
        assert torch.equal(
            tiled.dense(bits, torch.float64), reference_weight(list(planes[:bits]), worth, 40, torch.float64)
        )
    back = tiled.with_entries(True)
    assert back.rounded is None
    assert back.registers.keys() == exact.registers.keys()
    assert all(torch.equal(back.registers[bits], words) for bits, words in exact.registers.items())
