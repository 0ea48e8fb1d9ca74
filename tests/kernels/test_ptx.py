"""The generated assembly, run in the emulator, against looking every code up."""

import numpy as np
import pytest
import torch
from emulator import Machine, as_float, bfloat16, pair, prmt

from compress.kernels import ptx
from compress.kernels.layout import Tiled, random_tiled

# (width, seed width): all widths with planes alone, crumbs first, nibbles first
CASES = [(bits, seed) for bits in range(2, 9) for seed in (2, 3, 4) if seed <= bits] + [(2, 2)]
LANES = 64  # rows: two tiles


def layer(bits, seed):
    """A random matrix of 64 rows and 32 columns: its layout, the words of its codes, and its float64 weights."""
    tiled = random_tiled(LANES, 32, bits, seed)
    codes = [tiled.codes[plane, :, 0].flatten().numpy().view(np.uint32) for plane in range(bits)]
    return tiled, codes, tiled.dense(bits, torch.float64).numpy()


def tables(tiled, bits, kind="fp16"):
    """The inputs after the codes, and the shared memory they point into."""
    if bits <= ptx.REGISTER_BITS:
        return list(tiled.registers[bits][int(kind == "bf16")].numpy().view(np.uint32)), None
    shared = np.zeros(2 * 2**bits * ptx.SHARED_STRIDE, np.uint8)
    entries = tiled.tables[bits].float().numpy().reshape(-1)  # tile by tile, as the kernel writes them
    machine, places = Machine(shared), np.arange(len(entries), dtype=np.uint32) * 4
    machine.run(ptx.put(), [places, entries.view(np.uint32)])
    rows = np.arange(LANES, dtype=np.uint32)
    return [rows // 32 * (2**bits * ptx.SHARED_STRIDE) + rows % 32 * 4], shared


def words_of(x, kind):
    """Activations [32] as 16 words of two, the same for all lanes; and what they are worth."""
    if kind == "bf16":
        values = bfloat16(x)
        worth = as_float(values << np.uint32(16)).astype(np.float64)
        words = values[::2] | values[1::2] << np.uint32(16)
    else:
        worth = x.astype(np.float16).astype(np.float64)
        words = np.ascontiguousarray(x.astype(np.float16)).view(np.uint32)
    return [np.full(LANES, word, np.uint32) for word in words], worth


@pytest.mark.parametrize(("bits", "seed"), CASES)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_weights_come_out_in_the_order_of_the_columns(bits, seed, kind):
    tiled, codes, dense = layer(bits, seed)
    given, shared = tables(tiled, bits, kind)
    found = Machine(shared).run(ptx.weights(bits, tiled.head, kind), [*codes, *given])
    if kind == "fp16":
        assert np.array_equal(np.concatenate([pair(word) for word in found], 1), dense)
    else:
        halves = np.stack([half for word in found for half in (word & 0xFFFF, word >> 16)], 1)
        assert np.array_equal(halves, bfloat16(dense.astype(np.float32).reshape(-1)).reshape(dense.shape))


@pytest.mark.parametrize(("bits", "seed"), CASES)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_several_rows(bits, seed, kind, rows):
    tiled, codes, dense = layer(bits, seed)
    given, shared = tables(tiled, bits)
    form = "bfloat16" if kind == "bf16" else "half" if bits <= ptx.REGISTER_BITS else "single"
    x = np.random.default_rng(0).standard_normal((rows, 32)).astype(np.float32)
    made = [words_of(row, kind) for row in x]
    inputs = [*codes, *given, *(word for words, _ in made for word in words)]
    sums = Machine(shared).run(ptx.product(bits, tiled.head, rows, form), inputs)
    for total, (_, worth) in zip(sums, made, strict=True):
        error = np.abs(as_float(total) - dense @ worth) / (np.abs(dense) @ np.abs(worth))
        assert error.max() < (1e-3 if form == "half" else 3e-7)


@pytest.mark.slow
def test_float16_chains_keep_a_long_product_within_a_thousandth():
    """4096 columns in chains of eight: the error of a whole output, against the norm of all of them."""
    generator = np.random.default_rng(0)
    totals, exact = 0.0, 0.0
    for _ in range(128):
        tiled, codes, dense = layer(3, 3)
        mixed = generator.permutation(LANES)  # other rows every time
        words, worth = words_of(generator.standard_normal(32).astype(np.float32), "fp16")
        given, _ = tables(tiled, 3)
        (total,) = Machine().run(
            ptx.product(3, 1, 1, "half"), [*[c[mixed] for c in codes], *[t[mixed] for t in given], *words]
        )
        totals, exact = totals + as_float(total).astype(np.float64), exact + dense[mixed] @ worth
    assert np.linalg.norm(totals - exact) < 5e-4 * np.linalg.norm(exact)


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("form", ["half", "bfloat16"])
def test_two_weights_at_once_from_a_table_of_pairs(seed, form):
    """Entry 16 b + a of a row is the weights of the codes a and b, the first in the low half, as the kernel puts them."""
    tiled, codes, dense = layer(4, seed)
    entries = tiled.tables[4].numpy().view(np.uint16).astype(np.uint32)  # [tiles, 16, 32]
    pairs = (entries[:, :, None] << np.uint32(16) | entries[:, None]).reshape(2, 256, 32)
    rows = np.arange(LANES, dtype=np.uint32)
    shared = np.ascontiguousarray(pairs).view(np.uint8).reshape(-1)
    row, worth = words_of(np.random.default_rng(0).standard_normal(32), "fp16" if form == "half" else "bf16")
    place = rows // 32 * (256 * ptx.SHARED_STRIDE) + rows % 32 * 4
    (total,) = Machine(shared).run(ptx.product(4, tiled.head, 1, form, 32), [*codes, place, *row])
    error = np.abs(as_float(total) - dense @ worth) / (np.abs(dense) @ np.abs(worth))
    assert error.max() < (1e-3 if form == "half" else 3e-7)
    (same,) = Machine().run(ptx.product(4, tiled.head, 1, form), [*codes, *tables(tiled, 4)[0], *row])
    assert np.array_equal(total, same)


@pytest.mark.parametrize(("bits", "seed"), CASES)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_weights_times_the_sizes_of_their_groups(bits, seed, kind):
    tiled, codes, dense = layer(bits, seed)
    given, shared = tables(tiled, bits, kind)
    sizes = np.random.default_rng(0).integers(1, 256, LANES)
    if kind == "fp16":
        half = (sizes / 256).astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        half = bfloat16((sizes / 256).astype(np.float32))
    found = Machine(shared).run(ptx.weights(bits, tiled.head, kind, final=True), [*codes, *given, half << 16 | half])
    if kind == "fp16":
        exact = (dense * sizes[:, None] / 256).astype(np.float16)
        assert np.array_equal(np.concatenate([pair(word) for word in found], 1), exact)
    else:
        halves = np.stack([part for word in found for part in (word & 0xFFFF, word >> 16)], 1)
        held = as_float(bfloat16(dense.astype(np.float32).reshape(-1)) << np.uint32(16)).reshape(dense.shape)
        assert np.array_equal(halves, bfloat16((held * sizes[:, None] / 256).reshape(-1)).reshape(dense.shape))


def rounded_layer(seed, scale):
    """As :func:`layer`, at 4 bits with entries of 8; and all the words the kernels have of them."""
    tiled = random_tiled(LANES, 32, 4, seed)
    tiled = Tiled.around(
        tiled.codes,
        {4: scale * tiled.codebook(4).float()} | dict.fromkeys(range(seed, 4), tiled.codebook(4)),
        32,
        False,
    )
    codes = [tiled.codes[plane, :, 0].flatten().numpy().view(np.uint32) for plane in range(4)]
    return tiled, codes, list(tiled.registers[4].numpy().view(np.uint32)), tiled.dense(4, torch.float64).numpy()


SCALES = [1.0, 2.0**-20, 3e3]  # of tables around 0.02: small ones, and some that float16 does not hold


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("scale", SCALES)
def test_entries_of_eight_bits_times_the_rows_factor_are_exact(seed, scale):
    tiled, codes, words, dense = rounded_layer(seed, scale)
    found = Machine().run(ptx.weights(4, tiled.head, "fp16", 8), [*codes, *words[:6]])
    factor = pair(words[6])[:, :1]
    assert np.array_equal(np.concatenate([pair(word) for word in found], 1) * factor, dense)


@pytest.mark.parametrize("seed", [2, 4])
@pytest.mark.parametrize("form", ["half", "bfloat16"])
def test_products_with_entries_of_eight_bits(seed, form):
    tiled, codes, words, dense = rounded_layer(seed, 1.0)
    row, worth = words_of(
        np.random.default_rng(0).standard_normal(32).astype(np.float32), {"half": "fp16"}.get(form, "bf16")
    )
    (total,) = Machine().run(ptx.product(4, tiled.head, 1, form, 8), [*codes, *words[:6], *row])
    error = np.abs(as_float(total) * pair(words[6])[:, 0] - dense @ worth) / (np.abs(dense) @ np.abs(worth))
    assert error.max() < (1e-3 if form == "half" else 3e-7)


def test_large_activations_do_not_overflow_with_entries_of_eight_bits():
    """Entries are counted in units of about a weight's size, not in whole numbers to 255: 255 x 1000 is no float16."""
    tiled, codes, words, dense = rounded_layer(3, 1.0)
    row, worth = words_of(np.full(32, 1000.0, np.float32), "fp16")
    (total,) = Machine().run(ptx.product(4, tiled.head, 1, "half", 8), [*codes, *words[:6], *row])
    assert (
        np.abs(as_float(total) * pair(words[6])[:, 0] - dense @ worth).max()
        < 1e-3 * (np.abs(dense) @ np.abs(worth)).max()
    )


def test_matrix_instructions_in_bfloat16_have_the_rounded_entries_too():
    _, codes, words, dense = rounded_layer(4, 1.0)
    found = Machine().run(ptx.weights(4, 4, "bf16"), [*codes, *words[7:]])
    halves = np.stack([half for word in found for half in (word & 0xFFFF, word >> 16)], 1)
    assert np.array_equal(halves, bfloat16(dense.astype(np.float32).reshape(-1)).reshape(dense.shape))


def test_looked_up_weights_of_eight_bits_are_written_as_float16():
    _, codes, words, dense = rounded_layer(4, 1.0)
    memory = np.zeros(LANES * 64, np.uint8)
    places = np.arange(LANES, dtype=np.uint32) * 64
    Machine(None, memory).run(ptx.stored(4, 4, "fp16", 8), [*codes, *words[:7], places])
    assert np.array_equal(memory.view(np.float16).reshape(LANES, 32), dense.astype(np.float16))


@pytest.mark.parametrize(("bits", "seed"), [(3, 3), (4, 4), (7, 2)])
def test_looked_up_weights_are_written_where_they_belong(bits, seed):
    tiled, codes, dense = layer(bits, seed)
    given, shared = tables(tiled, bits)
    memory = np.full(LANES * 64 + 64, 0xEE, np.uint8)
    places = np.arange(LANES, dtype=np.uint32) * 64
    Machine(shared, memory).run(ptx.stored(bits, tiled.head, "fp16"), [*codes, *given, places])
    assert np.array_equal(memory[: LANES * 64].view(np.float16).reshape(LANES, 32).astype(np.float64), dense)
    assert (memory[LANES * 64 :] == 0xEE).all()


def test_activations_are_read_sixteen_bytes_at_a_time():
    memory = np.arange(256, dtype=np.uint8)
    found = Machine(None, memory).run(ptx.activations(), [np.array([0, 64, 128], np.uint32)])
    assert np.array_equal(np.stack(found, 1), np.ascontiguousarray(memory[:192]).view(np.uint32).reshape(3, 16))


def test_the_emulators_byte_permutation_is_the_manuals():
    """The example values of the PTX manual's description: selection and replication of the sign."""
    a, b = np.array([0x33221180], np.uint32), np.array([0x776655F4], np.uint32)
    assert prmt(a, b, np.array([0x5140], np.uint32))[0] == 0x5511F480
    assert prmt(a, b, np.array([0xC810], np.uint32))[0] == 0xFFFF1180
