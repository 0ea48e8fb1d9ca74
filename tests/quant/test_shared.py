"""Shared codebooks: what they cost, that the search finds good ones, and what may not be done with them."""

from functools import partial

import pytest
import torch

from compress.quant import shared_fit
from compress.quant.feedback import _compiled, _in_torch, codes_by_feedback, inverse_factor
from compress.quant.format import Codes
from compress.quant.hessian import Hessian
from compress.quant.nested import nested_output_codebooks
from compress.quant.records import GroupedShape
from compress.quant.settings import AnyPrecisionConfig
from compress.quant.shared import Tables, spread
from compress.quant.shared_fit import _sums_in_torch, column_factors, fit_shared, group_sizes, sums_by_codes
from compress.quant.shared_search import _Search, shared_output_codebooks
from compress.ranks import ALONE


def layer(rows=96, columns=192, seed=0):
    """A weight [N, K] whose columns differ in size, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(0.5 * torch.randn(columns, generator=generator))
    weight = torch.randn(rows, columns, generator=generator) * size * torch.rand(rows, 1, generator=generator)
    x = torch.randn(512, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = x.t() @ x / 512
    return weight, hessian + 1e-2 * hessian.diagonal().mean() * torch.eye(columns)


def error(found, weight, hessian, bits):
    off = found.dense(bits) - weight
    return float(((off @ hessian) * off).sum() / ((weight @ hessian) * weight).sum())


def test_planes_are_nearly_all_there_is():
    """What is beside the planes, a byte for 64 weights and one codebook for all rows, is 0.21 bits a weight at 576 columns."""
    for bits in (2, 4, 8):
        held = GroupedShape(576, 576, 2, bits, rank=1, group=64).tensor_bytes()
        assert sum(held.values()) * 8 < (bits + 0.21) * 576 * 576, bits


def test_errors_are_smaller_than_those_of_codebooks_by_row_at_four_and_five_bits():
    weight, hessian = layer()
    targets = dict.fromkeys(range(3, 7), weight)
    [shared] = shared_output_codebooks(targets, hessian)
    free, stored = nested_output_codebooks(targets, hessian), shared.as_stored()
    errors = {bits: error(stored, weight, hessian, bits) for bits in targets}
    for bits in (4, 5):
        assert errors[bits] < 0.9 * error(free, weight, hessian, bits), bits
    assert errors[3] > errors[4] > errors[5] > errors[6]
    for bits in targets:
        assert error(shared, weight, hessian, bits) == pytest.approx(errors[bits], rel=0.02)


def test_bits_above_those_that_are_chosen_together_lower_the_error():
    weight, hessian = layer()
    [shared] = shared_output_codebooks(dict.fromkeys(range(6, 9), weight), hessian)
    errors = [error(shared.as_stored(), weight, hessian, bits) for bits in (6, 7, 8)]
    assert errors[0] > 3 * errors[1]
    assert errors[0] > 3 * errors[2]


def test_entries_above_are_fitted_to_the_codes_that_are_chosen_for_them():
    weight, hessian = layer()
    targets, columns = dict.fromkeys(range(3, 9), weight), torch.ones(192)
    search = _Search(targets, Hessian(hessian), inverse_factor(hessian), {}, ALONE)
    codes, shared = search.found(columns)
    split = search._split(shared)  # what it begins with: cells halved around their means
    begun = Codes(search._over(partial(search._above, split))["codes"], Tables(split, range(3, 9)), shared=split)
    found = Codes(codes, Tables(shared, range(3, 9)), shared=shared)
    assert torch.equal(codes >> 1, search.codes)
    assert error(found, weight, hessian, 8) < 0.9 * error(begun, weight, hessian, 8)


def plain_gptq(targets, tables, sizes, hessian, share):
    """Error feedback written from the papers, one weight after the other, in float64, with sizes given: codes [N, K]."""
    inverse = torch.linalg.inv(hessian.double())
    left = {bits: target.double().clone() for bits, target in targets.items()}
    codes, most = torch.zeros(sizes.shape, dtype=torch.long), max(tables)
    for k in range(sizes.shape[1]):
        for n in range(len(sizes)):
            costs = []
            for code in range(2**most):
                off = {b: tables[b][code >> (most - b)].double() * sizes[n, k] - left[b][n, k] for b in tables}
                costs.append(sum(share[b] * off[b] ** 2 for b in tables))
            codes[n, k] = min(range(2**most), key=lambda code: float(costs[code]))
            for b in tables:
                error = left[b][n, k] - tables[b][codes[n, k] >> (most - b)].double() * sizes[n, k]
                left[b][n, k + 1 :] -= error * inverse[k, k + 1 :] / inverse[k, k]
        rest = inverse[k + 1 :, k + 1 :]  # what is left when column k is done with
        inverse[k + 1 :, k + 1 :] = rest - torch.outer(inverse[k + 1 :, k], inverse[k, k + 1 :]) / inverse[k, k]
    return codes


def test_error_feedback_is_that_of_the_papers_at_several_numbers_of_bits_at_once():
    weight, hessian = layer(rows=6, columns=70)
    targets = {2: weight, 3: weight + 0.01}
    tables = {bits: torch.linspace(-1, 1, 2**bits) for bits in targets}
    share = {2: 1.0, 3: 2.0}
    codes, sizes = codes_by_feedback(targets, tables, inverse_factor(hessian), share)
    wanted = plain_gptq(targets, tables, spread(sizes, 70), hessian, share)
    assert (codes == wanted).float().mean() > 0.99  # a tie in float32 may fall the other way
    assert torch.equal(codes[:, :20], wanted[:, :20])


def test_the_loop_in_torch_chooses_what_the_compiled_one_does():
    weight, hessian = layer(rows=70, columns=64)
    given = torch.stack([weight, weight + 0.01]), [torch.linspace(-1, 1, 2**bits) for bits in (2, 3)]
    rest = weight.abs().amax(1), inverse_factor(hessian), torch.tensor([1.0, 2.0])
    errors = given[0].clone(), given[0].clone()
    one, other = (loop(left, given[1], *rest) for loop, left in zip((_in_torch, _compiled), errors, strict=True))
    assert (one != other).any(
        1
    ).float().mean() < 0.05  # a tie may fall the other way, and changes what follows in its row
    same = (one == other).all(1)
    torch.testing.assert_close(errors[0][:, same], errors[1][:, same], rtol=1e-3, atol=1e-3)


def test_sizes_of_groups_are_the_best_of_those_tried_and_the_same_in_torch():
    weight, entries = torch.randn(70, 130, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 16)
    cost = torch.linspace(0.5, 2, 130)
    sizes = group_sizes(weight, cost, entries)
    groups, costs = shared_fit.by_group(weight), shared_fit.by_group(cost[None])
    torch.testing.assert_close(sizes, shared_fit._in_torch(groups, costs, entries, groups.abs().amax(2)))
    for group in range(3):  # the third has two columns
        part = slice(64 * group, 64 * group + 64)
        tried = weight[3, part].abs().amax() * torch.arange(8, 23) / 20
        nearest = (weight[3, part, None, None] / tried[:, None] - entries).abs().amin(2) * tried
        assert sizes[3, group] == pytest.approx(float(tried[(cost[part, None] * nearest**2).sum(0).argmin()]))


def test_sums_by_codes_are_those_of_every_pair_of_columns():
    _, hessian = layer(columns=40)
    codes = torch.randint(0, 8, (3, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) + 0.5
    wanted = torch.zeros(8, 8, dtype=torch.float64)
    for n in range(3):
        for j in range(40):
            for k in range(40):
                wanted[int(codes[n, j]), int(codes[n, k])] += sizes[n, j].double() * hessian[j, k] * sizes[n, k]
    found = sums_by_codes(codes, sizes, Hessian(hessian), 8)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_sums_in_torch(codes, sizes, Hessian(hessian), 8), found, rtol=1e-4, atol=1e-4)


def test_entries_and_sizes_solve_their_least_squares_problems():
    """Gradients of the squared errors vanish: by entries those of all rows, by sizes those of every row at all bits."""
    weight, hessian = layer(rows=8, columns=128)
    targets = dict.fromkeys((3, 4), weight)
    search = _Search(targets, Hessian(hessian), inverse_factor(hessian), {}, ALONE)
    shared = fit_shared(weight, search.factor.diagonal() ** -2, torch.ones(128), 3, 4, search._over)
    search.codes = search._over(partial(search._fed, shared))["codes"]
    based = search._based(shared, search.codes, range(3, 5))
    sizes = search._sizes(search._tree(slice(0, 8), based), based).double().requires_grad_()
    basis = {bits: entries[0].double().requires_grad_() for bits, entries in based.basis.items()}

    def lost(bits, by):
        value = basis[bits][(search.codes >> (4 - bits)).long()] * by.repeat_interleave(64, 1)
        return ((value - weight) @ hessian.double() * (value - weight)).sum()

    for bits in (3, 4):
        [by_entry] = torch.autograd.grad(lost(bits, based.by_group().double()), basis[bits])
        assert by_entry.abs().max() < 1e-3 * lost(bits, based.by_group().double())
    [by_size] = torch.autograd.grad(sum(search._counts(bits) * lost(bits, sizes) for bits in (3, 4)), sizes)
    moved = (sizes / based.by_group() - 1).abs() < 0.99
    assert moved.all()
    assert (by_size * sizes).abs().max() < 1e-3 * sum(search._counts(bits) * lost(bits, sizes) for bits in (3, 4))


def test_matrices_of_one_input_have_the_same_factors():
    weight, hessian = layer()
    one, other = shared_output_codebooks({3: weight, 4: weight}, hessian, sizes=[64, 32])
    assert torch.equal(one.shared.columns, other.shared.columns)
    assert torch.equal(one.shared.columns, column_factors(weight, hessian.diagonal()))
    assert (len(one.codes), len(other.codes)) == (64, 32)


def test_rows_have_their_own_codebooks_where_zeros_are_kept_or_weights_are_the_objective():
    assert AnyPrecisionConfig(codebooks="shared").shares(576)
    assert not AnyPrecisionConfig(codebooks="shared", keep_zeros=True).shares(576)
    assert not AnyPrecisionConfig(codebooks="shared", objective="weight").shares(576)
    assert not AnyPrecisionConfig(codebooks="row").shares(576)
