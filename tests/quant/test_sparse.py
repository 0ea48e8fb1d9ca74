"""The sparse form of a packed matrix: nothing but pruned weights is left out, and every width is rebuilt exactly."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.kernels.bitplane import dense_weight
from compress.kernels.packing import unpack_planes
from compress.quant.format import Codes, expand, pack, pack_smaller
from compress.quant.kmeans import nested_codebooks
from compress.quant.records import PackedShape, SparseShape, shape_of


def pruned(rows, columns, sparsity, seed=0):
    """Gaussian weights, each zero with some probability."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < sparsity, 0.0)


def coded(weight, seed=3, parent=6):
    """The codes of any-precision with keep_zeros."""
    return nested_codebooks(weight.numpy(), None, seed, parent, keep_zeros=True)


def packed(weight, seed=3, parent=6):
    """Their dense form."""
    found = coded(weight, seed, parent)
    return pack(found.codes, found.codebooks)


def weight_at(shape, tensors, bits):
    """[N, K] float32, from the dense form."""
    planes = [*tensors["weight"], *(tensors[f"plane_{b}"] for b in range(shape.seed_bits + 1, bits + 1))]
    return dense_weight(planes, tensors[f"codebook_{bits}"], shape.in_features, torch.float32)


def always_zero(shape, tensors):
    """[N, K]: 0.0 at every width. That is every pruned weight, and survivors too small for the widest table."""
    return torch.stack([weight_at(shape, tensors, bits) == 0 for bits in shape.all_bits]).all(0)


def read_at(shape, tensors, bits):
    """What a reader of one width has: no tensor of a higher one."""
    narrow = replace(shape, parent_bits=bits)
    return narrow, {name: tensors[name] for name in narrow.specification()}


def assert_rebuilt(weight, seed=3, parent=6):
    """Every width of the sparse form is the dense form's, from that width's tensors alone; returns the sparse shape."""
    dense, tensors = packed(weight, seed, parent)
    shape, stored, note = pack_smaller(coded(weight, seed, parent))
    assert note["form"] == "sparse"
    zeros = always_zero(dense, tensors)
    assert zeros[weight == 0].all()
    assert note["zeros"] == zeros.sum() == weight.numel() - shape.survivors
    assert {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in stored.items()
    } == shape.specification()
    for bits in dense.all_bits:
        narrow, read = read_at(shape, stored, bits)
        rebuilt = expand("it", narrow, read)
        assert narrow.dense == replace(dense, parent_bits=bits)
        assert {
            name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in rebuilt.items()
        } == narrow.dense.specification()
        assert torch.equal(weight_at(narrow.dense, rebuilt, bits), weight_at(dense, tensors, bits))
    return shape


@pytest.mark.parametrize(("rows", "columns"), [(7, 45), (3, 31), (5, 64), (16, 33), (1, 500), (40, 7)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_every_width_is_rebuilt_exactly(rows, columns, sparsity):
    assert_rebuilt(pruned(rows, columns, sparsity))


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
def test_a_large_matrix_is_worked_on_in_parts(monkeypatch, sparsity):
    weight = pruned(12, 100, sparsity)
    whole = pack_smaller(coded(weight))[1]
    monkeypatch.setattr("compress.quant.format._AT_ONCE", 70)
    assert_rebuilt(weight)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in pack_smaller(coded(weight))[1].items())


@pytest.mark.parametrize(("seed", "parent"), [(2, 8), (4, 4), (1, 3)])
def test_any_seed_and_parent(seed, parent):
    assert_rebuilt(pruned(20, 100, 0.7), seed, parent)


def test_empty_rows_and_full_rows():
    weight = pruned(12, 70, 0.7)
    weight[[0, 5, 11]] = 0
    weight[[3, 4]] = torch.randn(2, 70)
    shape = assert_rebuilt(weight)
    assert 4 * 30 < shape.survivors <= (weight != 0).sum()


def test_a_matrix_of_zeros_has_no_planes_at_all():
    shape = assert_rebuilt(torch.zeros(9, 40))
    assert (shape.survivors, shape.mask_bits) == (0, 0)
    assert shape.specification()["weight"] == ((3, 1, 0), "int32")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12), columns=st.integers(1, 90), sparsity=st.floats(0, 1),
    seed=st.integers(1, 4), more=st.integers(0, 4), number=st.integers(0, 99),
)  # fmt: skip
def test_the_chosen_form_is_never_larger_and_never_another_matrix(rows, columns, sparsity, seed, more, number):
    weight = pruned(rows, columns, sparsity, number)
    dense, tensors = packed(weight, seed, seed + more)
    shape, stored, note = pack_smaller(coded(weight, seed, seed + more))
    sizes = [sum(t.nbytes for t in form.values()) for form in (stored, tensors)]
    assert (note is None) == (not (weight == 0).any())
    if isinstance(shape, SparseShape):
        assert sizes[0] < sizes[1]
        assert shape.sound
        stored = expand("it", shape, stored)
    else:
        assert shape == dense
    for bits in dense.all_bits:
        assert torch.equal(weight_at(dense, stored, bits), weight_at(dense, tensors, bits))


def test_planes_hold_the_survivors_alone_row_after_row():
    shape, stored, _ = pack_smaller(coded(pruned(20, 100, 0.7)))
    rebuilt = expand("it", shape, stored)
    codes = unpack_planes([*rebuilt["weight"], *(rebuilt[f"plane_{b}"] for b in (4, 5, 6))], 100)
    survivors = unpack_planes([*stored["weight"], *(stored[f"plane_{b}"] for b in (4, 5, 6))], shape.survivors)
    assert torch.equal(survivors[0], codes[codes != 0])
    assert stored["plane_4"].shape == (1, -(-shape.survivors // 32))


def test_code_0_is_zero_at_every_width_in_rows_with_pruned_weights():
    dense, tensors = packed(pruned(20, 100, 0.7))
    assert any(tensors[f"codebook_{bits}"][:, 0].any() for bits in dense.all_bits)  # not so before
    _, stored, _ = pack_smaller(coded(pruned(20, 100, 0.7)))
    for bits in dense.all_bits:
        table = stored[f"codebook_{bits}"]
        assert not table[:, 0].any()
        assert torch.equal(table.sort().values, tensors[f"codebook_{bits}"].sort().values)


def test_a_small_survivor_may_be_zero_at_a_low_width_only():
    """The zeros' cell of the seed takes small weights in; they are split off at a higher width, so they are kept."""
    weight = pruned(20, 100, 0.5)
    dense, tensors = packed(weight)
    low, high = weight_at(dense, tensors, 3), weight_at(dense, tensors, 6)
    assert ((low == 0) & (high != 0)).any()
    assert assert_rebuilt(weight).survivors >= (high != 0).sum()


def test_only_a_zero_at_every_width_is_left_out():
    codes = torch.zeros(4, 100, dtype=torch.uint8)
    tables = {2: torch.tensor([0.5, -1.0, 1.0, 2.0]).expand(4, -1), 3: torch.zeros(4, 8)}
    assert pack_smaller(Codes(codes, tables))[2] is None  # width 2 reads 0.5 there
    tables[2] = torch.tensor([0.0, -1.0, 1.0, 2.0]).expand(4, -1)
    assert pack_smaller(Codes(codes, tables))[2]["zeros"] == 400


def test_a_matrix_without_pruned_weights_is_left_alone():
    codes = coded(torch.randn(20, 100))
    shape, tensors = pack(codes.codes, codes.codebooks)
    found, stored, note = pack_smaller(codes)
    assert (found, note) == (shape, None)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("sparsity", "form"), [(0.05, "dense"), (0.1, "dense"), (0.25, "sparse"), (0.5, "sparse")])
def test_the_form_with_fewer_bytes_is_chosen_and_both_are_noted(sparsity, form):
    codes = coded(pruned(64, 512, sparsity), 3, 6)  # even at a saving of a sixth of the planes
    tensors = pack(codes.codes, codes.codebooks)[1]
    shape, stored, note = pack_smaller(codes)
    assert note["form"] == form == ("sparse" if isinstance(shape, SparseShape) else "dense")
    assert note["bytes"]["dense"] == sum(t.nbytes for t in tensors.values())
    assert note["bytes"][form] == sum(t.nbytes for t in stored.values()) == min(note["bytes"].values())


def test_what_the_sparse_form_would_take_is_known_without_building_it():
    codes = coded(pruned(64, 512, 0.05), 3, 6)
    shape, tensors = pack(codes.codes, codes.codebooks)
    survives = ~always_zero(shape, tensors).view(-1)
    survivors, last = int(survives.sum()), int(survives.nonzero()[-1])
    words = 6 * -(-survivors // 32) + -(-(last + 1) // 32)  # planes, and the mask: no low bits at 5 %
    codebooks = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("codebook"))
    assert pack_smaller(codes)[2]["bytes"]["sparse"] == 4 * words + codebooks


@pytest.mark.parametrize(("sparsity", "gap_bits"), [(0.5, 0), (0.7, 1), (0.8, 2), (0.9, 3), (0.99, 6)])
def test_the_mask_is_close_to_its_entropy(sparsity, gap_bits):
    shape, stored, _ = pack_smaller(coded(pruned(256, 512, sparsity)))
    bits = 8 * sum(tensor.nbytes for name, tensor in stored.items() if name.startswith("mask")) / (256 * 512)
    share = shape.survivors / (256 * 512)
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert shape.gap_bits == gap_bits
    assert entropy <= bits < 1.03 * entropy


def test_without_low_bits_the_mask_is_the_occupancy_plane():
    dense, tensors = packed(pruned(16, 50, 0.5))
    survives = ~always_zero(dense, tensors).view(-1)
    shape, stored, _ = pack_smaller(coded(pruned(16, 50, 0.5)))
    assert shape.gap_bits == 0
    assert "mask_low" not in stored
    plane = unpack_planes([stored["mask"][None]], shape.mask_bits)[0].bool()
    assert torch.equal(plane, survives[: shape.mask_bits])
    assert not survives[shape.mask_bits :].any()


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("word", [0, -1])
@pytest.mark.parametrize("at_once", [1 << 20, 32])
def test_a_damaged_mask_is_refused(monkeypatch, sparsity, word, at_once):
    """A word of zeros has fewer ones than there are survivors, minus one (all bits set) has more."""
    monkeypatch.setattr("compress.quant.format._AT_ONCE", at_once)
    shape, stored, _ = pack_smaller(coded(pruned(16, 50, sparsity)))
    mask = stored["mask"].clone()
    mask[0] = word
    with pytest.raises(CompressError, match=rf"layer\.0: its mask does not fit {shape.survivors} survivors of 16 x 50"):
        expand("layer.0", shape, stored | {"mask": mask})


def test_a_one_more_behind_the_last_survivor_is_refused(monkeypatch):
    shape, stored, _ = pack_smaller(coded(pruned(16, 50, 0.5)))
    longer = replace(shape, mask_bits=32 * stored["mask"].numel() + 1)
    mask = torch.cat([stored["mask"], torch.ones(1, dtype=torch.int32)])
    monkeypatch.setattr("compress.quant.format._AT_ONCE", 32)  # it is in a part of its own
    with pytest.raises(CompressError, match="does not fit"):
        expand("layer.0", longer, stored | {"mask": mask})


def test_a_mask_that_leads_out_of_the_matrix_is_refused():
    shape, stored, _ = pack_smaller(coded(pruned(16, 50, 0.8)))
    with pytest.raises(CompressError, match="does not fit"):
        expand("layer.0", shape, stored | {"mask_low": torch.full_like(stored["mask_low"], -1)})


def test_records_tell_the_forms_apart():
    sparse = pack_smaller(coded(pruned(16, 50, 0.7)))[0]
    assert shape_of(asdict(sparse)) == sparse
    assert type(shape_of(asdict(sparse.dense))) is PackedShape
    with pytest.raises(TypeError):
        shape_of({**asdict(sparse.dense), "survivors": 3})


@pytest.mark.parametrize(
    "change",
    [{"survivors": 801}, {"survivors": -1}, {"gap_bits": 9}, {"gap_bits": -1}, {"mask_bits": 0}, {"mask_bits": 10**6}],
)
def test_impossible_numbers_are_not_sound(change):
    shape = pack_smaller(coded(pruned(16, 50, 0.7)))[0]
    assert shape.sound
    assert not replace(shape, **change).sound
