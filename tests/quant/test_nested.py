"""Nested codes for output errors, against plain computations that know nothing of trees, blocks or gradients."""

import functools
import itertools

import numpy as np
import pytest
import torch

from compress.quant import hessian
from compress.quant.format import Codes
from compress.quant.hessian import Hessian
from compress.quant.kmeans import nested_codebooks
from compress.quant.nested import Objective, Tree, _gathered, _split, nested_output_codebooks


def problem(rows=6, columns=24, seed=0, mixing=1.0):
    """Weights, and the metric of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(400, columns, generator=generator)
    mixed = inputs + mixing * inputs @ torch.randn(columns, columns, generator=generator)
    return weight, mixed.t() @ mixed / 400 + 0.01 * torch.eye(columns)


def started(weight, metric, seed, parent, zeros=None):
    sensitivity = metric.diagonal().expand_as(weight).contiguous().numpy()
    first = nested_codebooks(weight.numpy(), sensitivity, seed, parent, zeros is not None)
    return Tree(dict.fromkeys(first.codebooks, weight), Hessian(metric), first.codes, first.codebooks, zeros)


def nested(weight, metric, seed, parent, **options):
    targets = dict.fromkeys(range(seed, parent + 1), weight)
    found = nested_output_codebooks(targets, metric, **options)
    return Tree(targets, Hessian(metric), found.codes, found.codebooks)


def codes_at(tree, bits):
    return tree.codes >> (tree.parent - bits)


def dense(tree, bits):
    return Codes(tree.codes, tree.codebooks).dense(bits)


def error(tree, bits):
    """Sum over rows of ``(q - w) H (q - w)^T`` at a number of bits."""
    return plain_error(tree.targets[bits], tree.hessian.matrix, dense(tree, bits))


def plain_error(weight, metric, dense):
    error = (dense - weight).double()
    return sum(float(row @ metric.double() @ row) for row in error)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitted_table_is_the_least_squares_solution(bits):
    weight, metric = problem()
    tree = started(weight, metric, 2, 4)
    root = torch.linalg.cholesky(metric.double())
    tree.fit(bits, near=1e-4)
    for row in range(len(weight)):
        one_hot = torch.nn.functional.one_hot(codes_at(tree, bits)[row], 2**bits).double()
        best = torch.linalg.lstsq(root.t() @ one_hot, root.t() @ weight[row].double(), driver="gelsd").solution
        found = plain_error(weight[row : row + 1], metric, dense(tree, bits)[row : row + 1])
        assert found == pytest.approx(plain_error(weight[row : row + 1], metric, (one_hot @ best)[None]), rel=1e-3)


@pytest.mark.parametrize("known", [True, False], ids=["gradient", "approximate gradient"])
@pytest.mark.parametrize("rows", [1, 300])
def test_a_step_of_the_tables_lowers_the_error(rows, known):
    """Its length is found on a sample of rows; the sweep that follows tells the gradient of it."""
    weight, metric = problem(rows=rows)
    tree = started(weight, metric, 3, 4)
    if known:
        tree.gradient(4)
    before, tables = error(tree, 4), tree.codebooks[4]
    step = tree.step(4)
    assert torch.equal(tree.codebooks[4], tables + step)
    assert error(tree, 4) < before
    tree.descend([Objective({4: 1.0}, below=3)], {4: step})
    assert torch.allclose(tree.gradient(4), (dense(tree, 4) - weight) @ metric, rtol=1e-3, atol=1e-4)


def test_sums_by_entry_are_those_of_a_loop():
    weight, metric = problem(rows=3, columns=10)
    tree = started(weight, metric, 2, 3)
    found = tree._by_entry(4)
    spread = torch.cat([tree.hessian.leading, tree.hessian.diagonal[:, None]], dim=1)
    for row, entry in itertools.product(range(3), range(4)):
        assert torch.allclose(found[row, entry], spread[codes_at(tree, 2)[row] == entry].sum(0), atol=1e-5)
    assert torch.allclose(found, _gathered(tree.codes, spread, 8).view(3, 4, 2, -1).sum(2), atol=1e-5)


def test_fits_hold_with_massive_and_dead_inputs():
    """One input a thousand times the others, as language models have, and one that never occurs."""
    weight, metric = problem(columns=64)
    scale = torch.ones(64)
    scale[5], scale[7] = 1000.0, 0.0
    metric = metric * scale * scale[:, None]
    metric += 1e-3 * metric.diagonal().mean() * torch.eye(64) * (scale == 0)
    tree = nested(weight, metric, 3, 5)
    for bits in tree.codebooks:
        given = plain_error(weight, metric, dense(tree, bits))
        tree.fit(bits, near=1e-3)
        fitted = plain_error(weight, metric, dense(tree, bits))
        for _ in range(10):
            tree.fit(bits, near=0.0)
        best = plain_error(weight, metric, dense(tree, bits))
        assert fitted == pytest.approx(best, rel=0.01)
        assert given == pytest.approx(best, rel=0.06)


@pytest.mark.parametrize("passes", [1, 2])
def test_descent_changes_one_column_at_a_time_for_the_best(passes):
    """A sweep done by trying every path of every weight, and recomputing all errors each time."""
    weight, metric = problem(rows=2)
    tree = started(weight, metric, 2, 4)
    share = {2: 1.0, 3: 2.0, 4: 5.0}
    codes = tree.codes.clone()
    for _, row, column in itertools.product(range(passes), range(2), range(24)):
        errors = []
        for path in range(16):
            codes[row, column] = path
            dense = {bits: tree.codebooks[bits][row, codes[row] >> (4 - bits)] for bits in share}
            errors.append(sum(s * plain_error(weight[row, None], metric, dense[b][None]) for b, s in share.items()))
        codes[row, column] = int(np.argmin(errors))
    tree.descend([Objective(share)] * passes)
    assert torch.equal(tree.codes, codes)


def test_columns_beyond_the_first_block_see_what_it_did():
    weight, metric = problem(rows=3, columns=300)
    tree = started(weight, metric, 3, 3)
    before = error(tree, 3)
    tree.descend([Objective({3: 1.0})])
    assert error(tree, 3) == pytest.approx(plain_error(weight, metric, dense(tree, 3)), rel=1e-4)
    assert error(tree, 3) < 0.8 * before


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_gradients_are_kept_up_to_date(dtype, near, monkeypatch):
    monkeypatch.setattr(hessian, "product_dtype", lambda device, size: dtype)
    weight, metric = problem(rows=3, columns=300)
    tree = started(weight, metric, 3, 5)
    everything, narrower = Objective({3: 1.0, 4: 1.0, 5: 1.0}), Objective({4: 1.0, 5: 1.0}, 3)
    for passes in ([everything, everything], [everything], [narrower, Objective({5: 1.0}, 4)]):
        tree.descend(passes, {bits: tree.step(bits) for bits in passes[0].share})
        for bits in tree.codebooks:
            expected = (dense(tree, bits) - weight) @ metric
            assert torch.allclose(tree.gradient(bits), expected, atol=near * float(expected.abs().max()))


def test_descent_below_a_width_keeps_its_codes():
    weight, metric = problem()
    tree = started(weight, metric, 3, 4)
    kept, before = codes_at(tree, 3).clone(), error(tree, 4)
    tree.descend([Objective({4: 1.0}, below=3)])
    assert torch.equal(codes_at(tree, 3), kept)
    assert error(tree, 4) < before


@pytest.mark.slow
def test_two_bits_end_near_the_best_codes_there_are():
    """Exhaustive search over all codes of rows of eight weights: within 1 % in most cases, never above the start."""
    # Codes up to a renaming of the entries: the first is 0, each next at most one above the largest so far.
    every = [
        codes
        for codes in itertools.product(range(4), repeat=8)
        if all(code <= max(codes[:i], default=-1) + 1 for i, code in enumerate(codes))
    ]
    chosen, ratios = torch.nn.functional.one_hot(torch.tensor(every), 4).double(), []
    for seed in range(20):
        weight, metric = problem(rows=1, columns=8, seed=seed, mixing=0.1)
        root = torch.linalg.cholesky(metric.double())
        goal, design = root.t() @ weight[0].double(), root.t() @ chosen
        best = float((goal - (design @ (torch.linalg.pinv(design) @ goal)[..., None])[..., 0]).square().sum(-1).min())
        start = error(started(weight, metric, 2, 2), 2)
        found = error(nested(weight, metric, 2, 2), 2)
        assert found <= start * (1 + 1e-6)
        ratios.append(found / best)
    assert np.median(ratios) < 1.01, ratios


def test_widths_up_to_5_beat_their_start_and_the_tree_is_nested():
    weight, metric = problem(rows=8, columns=96)
    start, tree = started(weight, metric, 3, 8), nested(weight, metric, 3, 8)
    for bits in (3, 4, 5):  # 6 bits, with the smallest errors, give some to those below
        assert error(tree, bits) < error(start, bits), bits
    for bits in range(3, 9):
        assert error(tree, bits) == pytest.approx(plain_error(weight, metric, dense(tree, bits)), rel=1e-3, abs=1e-9)
        assert tree.codebooks[bits].shape == (8, 2**bits)
        assert int(codes_at(tree, bits).max()) < 2**bits


def test_focus_moves_error_from_one_width_to_another():
    weight, metric = problem(rows=8, columns=96)
    low, high = nested(weight, metric, 2, 4, focus={2: 100.0}), nested(weight, metric, 2, 4, focus={4: 100.0})
    assert error(low, 2) < error(high, 2)
    assert error(high, 4) < error(low, 4)


def test_pruned_weights_stay_zero_at_every_width():
    weight, metric = problem(rows=5, columns=64)
    weight[weight.abs() < 0.6] = 0
    weight[3] = 0
    weight[4] = weight[4].abs() + 1  # a row without zeros
    target = weight + 0.05
    zeros = weight == 0
    tree = nested(target, metric, 2, 8, zeros=zeros)
    for bits in range(2, 9):
        assert (dense(tree, bits)[zeros] == 0).all(), bits
    assert error(tree, 8) < error(tree, 2)


def test_every_width_aims_at_its_own_target():
    weight, metric = problem(rows=4, columns=40)
    other = 1.1 * weight + 0.2
    plain, shifted = (nested_output_codebooks({3: third, 4: weight}, metric) for third in (weight, other))
    assert plain_error(other, metric, shifted.dense(3)) < 0.2 * plain_error(other, metric, plain.dense(3))
    assert plain_error(weight, metric, shifted.dense(4)) < 2 * plain_error(weight, metric, plain.dense(4))


def test_a_split_is_two_means_of_every_cell():
    weight, metric = problem(rows=5, columns=150)
    weight[weight.abs() < 0.3] = 0
    tree = started(weight, metric, 3, 3, weight == 0)
    tree.targets[4] = weight
    given = tree.codes, weight, metric.diagonal(), tree.codebooks[3], weight == 0
    tree.split()
    for row, cell in itertools.product(range(5), range(8)):
        here = given[0][row] == cell
        upper, kept = here & (tree.codes[row] % 2 == 1), weight[row] == 0
        for half, code in ((here & ~upper, 2 * cell), (upper, 2 * cell + 1)):
            assert torch.equal(tree.codes[row, half], torch.full_like(tree.codes[row, half], code))
            if (half & kept).any():
                assert tree.codebooks[4][row, code] == 0
            elif half.any():
                mean = torch.sum(metric.diagonal()[half] * weight[row, half]) / metric.diagonal()[half].sum()
                assert tree.codebooks[4][row, code] == pytest.approx(float(mean), rel=1e-4)
    codes, table = _split(*given, 3)  # what is not compiled
    assert torch.equal(tree.codes, codes)
    assert torch.allclose(tree.codebooks[4], table)


def test_same_input_same_bytes():
    weight, metric = problem()
    first, second = nested(weight, metric, 3, 6), nested(weight, metric, 3, 6)
    assert torch.equal(first.codes, second.codes)
    assert all(torch.equal(first.codebooks[bits], second.codebooks[bits]) for bits in first.codebooks)


@pytest.mark.parametrize("below", [None, 3])
def test_the_compiled_loop_does_what_torch_does(below, monkeypatch):
    weight, metric = problem(rows=7, columns=150)
    weight[weight.abs() < 0.3] = 0
    compiled, plain = (started(weight, metric, 3, 5, weight == 0) for _ in range(2))
    monkeypatch.setattr(plain, "_choice", lambda one: functools.partial(plain._columns, one))
    share = {4: 1.0, 5: 4.0} if below else {3: 1.0, 4: 2.0, 5: 4.0}
    for tree in (compiled, plain):
        tree.descend([Objective(share, below), Objective(share, below)])
    assert float((compiled.codes != plain.codes).float().mean()) < 0.01  # near-ties may fall either way
    for bits in share:
        assert error(compiled, bits) == pytest.approx(error(plain, bits), rel=0.02)
