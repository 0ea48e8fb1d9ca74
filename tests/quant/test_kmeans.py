"""Row codebooks against slow references written from the definitions."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.quant import kmeans
from compress.quant.format import Codes

Array = NDArray[Any]
SEED, PARENT = 3, 8


def in_numpy(function: Callable[..., Codes]) -> Callable[..., SimpleNamespace]:
    def run(*given: Any, **options: Any) -> SimpleNamespace:
        found = function(*given, **options)
        return SimpleNamespace(codes=found.codes.numpy(), codebooks={b: t.numpy() for b, t in found.codebooks.items()})

    return run


nested_codebooks = in_numpy(kmeans.nested_codebooks)


def weighted_error(weight: Array, sensitivity: Array | None, codes: Array, codebook: Array) -> Array:
    """Per row, sum_j F_j (w_j - c_q(j))^2 (arXiv 2306.07629, equation 4), F = 1 for None."""
    error = weight.astype(np.float64) - np.take_along_axis(codebook, codes.astype(np.int64), 1)
    return (error**2 * (1 if sensitivity is None else sensitivity)).sum(1)


def rows(kind: str, shape: tuple[int, int], seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(3, shape) if kind == "student" else rng.standard_normal(shape)
    sensitivity = rng.lognormal(0, 2, shape) if kind == "lognormal" else np.ones(shape)
    return weight.astype(np.float32), sensitivity.astype(np.float32)


def cell_error(x: Array, w: Array, centroid: float | None = None) -> float:
    """Weighted squared error of one cell around its mean (or a given centroid), by definition."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    if x.size == 0 or w.sum() == 0:
        return 0.0
    return float((w * (x - (np.average(x, weights=w) if centroid is None else centroid)) ** 2).sum())


def optimum(x: Array, w: Array, cells: int) -> float:
    """Least weighted squared error of at most `cells` cells: the O(k n^2) dynamic programme over all positions."""
    order = np.argsort(x)
    x, w = x[order].astype(np.float64), w[order].astype(np.float64)
    d = x - np.average(x, weights=w)
    s = np.concatenate([np.zeros((3, 1)), np.cumsum([w, w * d, w * d * d], axis=1)], axis=1)
    best = np.full((cells, x.size + 1), np.inf)
    for i in range(1, x.size + 1):
        s0, s1, s2 = s[:, i, None] - s[:, :i]
        cost = s2 - s1**2 / s0
        best[0, i] = cost[0]
        best[1:, i] = (best[:-1, :i] + cost).min(axis=1)
    return float(best[:, -1].min())


def best_two_parts(x: Array, w: Array) -> float:
    """Error of the best split of a cell into two intervals, every border tried."""
    borders = np.unique(x)[1:]
    return min((cell_error(x[x < v], w[x < v]) + cell_error(x[x >= v], w[x >= v]) for v in borders), default=0.0)


def any_precision(x: Array, w: Array, seed_bits: int, parent_bits: int, rng: np.random.Generator) -> dict[int, float]:
    """Errors per width of Any-Precision's own procedure: greedy k-means++, Lloyd (at most 50), then 2-means splits."""
    x, w = x.astype(np.float64), w.astype(np.float64)

    def lloyd(x: Array, w: Array, centres: Array, steps: int = 50) -> Array:
        for _ in range(steps):
            label = np.abs(x[:, None] - centres).argmin(1)
            cells = [label == c for c in range(len(centres))]
            new = np.array(
                [np.average(x[m], weights=w[m]) if m.any() else old for m, old in zip(cells, centres, strict=True)]
            )
            if np.array_equal(new, centres):
                break
            centres = new
        return np.abs(x[:, None] - centres).argmin(1)

    centres = rng.choice(x, 1, p=w / w.sum())
    while len(centres) < 2**seed_bits:
        d = w * ((x[:, None] - centres) ** 2).min(1)
        tried = [np.append(centres, c) for c in rng.choice(x, 2 + int(np.log(2**seed_bits)), p=d / d.sum())]
        centres = min(tried, key=lambda c: float((w * ((x[:, None] - c) ** 2).min(1)).sum()))
    label = lloyd(x, w, np.sort(centres))
    errors = {}
    for bits in range(seed_bits, parent_bits + 1):
        cells = [label == c for c in range(2**bits)]
        errors[bits] = sum(cell_error(x[m], w[m]) for m in cells)
        for c, m in enumerate(cells):
            ends = np.unique(x[m])[[0, -1]] if m.any() else np.empty(0)
            label[m] = 2 * c + (lloyd(x[m], w[m], ends) if len(np.unique(ends)) == 2 else 0)
    return errors


def check_tree(weight: Array, sensitivity: Array | None, nested: Any, seed: int, parent: int) -> None:
    """What must hold for every input: shapes, ascending rows, shared codes, order, means and falling error."""
    f = np.ones_like(weight) if sensitivity is None else sensitivity
    assert nested.codes.shape == weight.shape and nested.codes.dtype == np.uint8
    assert list(nested.codebooks) == list(range(seed, parent + 1))
    errors = []
    for bits, book in nested.codebooks.items():
        codes = nested.codes >> (parent - bits)
        assert book.shape == (len(weight), 2**bits) and book.dtype == np.float32
        assert np.isfinite(book).all() and (np.diff(book, axis=1) >= 0).all()
        errors.append(weighted_error(weight, sensitivity, codes, book))
        for x, q in zip(weight, codes, strict=True):
            order = np.argsort(x, kind="stable")
            assert (np.diff(q[order].astype(int)) >= 0).all()
            same = np.diff(x[order]) == 0
            assert (q[order][1:][same] == q[order][:-1][same]).all()
    scale = (f.astype(np.float64) * weight.astype(np.float64) ** 2).sum(1)
    for coarse, fine in itertools.pairwise(errors):
        # Centroids are rounded to float32 and the sensitivity floor is 1e-6 of the mean.
        assert (fine <= coarse + 1e-5 * scale).all()


@pytest.mark.parametrize("kind", ["gauss", "student", "lognormal"])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_seed_is_the_exact_optimum_of_short_rows(kind: str, bits: int) -> None:
    weight, f = rows(kind, (4, 300))
    q = nested_codebooks(weight, f, bits, bits)
    expected = [optimum(x, w, 2**bits) for x, w in zip(weight, f, strict=True)]
    np.testing.assert_allclose(weighted_error(weight, f, q.codes, q.codebooks[bits]), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gauss", "student", "lognormal"])
def test_seed_is_within_two_thousandths_of_the_optimum_of_long_rows(kind: str) -> None:
    weight, f = rows(kind, (1, 4096), seed=1)
    q = nested_codebooks(weight, f, 3, 3)
    error = weighted_error(weight, f, q.codes, q.codebooks[3])[0]
    exact = optimum(weight[0], f[0], 8)
    assert exact * (1 - 1e-6) <= error <= exact * 1.002


def test_few_distinct_values_are_exact_however_long_the_row() -> None:
    rng = np.random.default_rng(2)
    values, weight = np.unique(rng.standard_normal(40).astype(np.float32)), np.empty((1, 5000), np.float32)
    weight[0] = rng.choice(values, 5000)
    q = nested_codebooks(weight, None, 3, 3)
    _, counts = np.unique(weight, return_counts=True)
    error = weighted_error(weight, None, q.codes, q.codebooks[3])[0]
    assert error == pytest.approx(optimum(values, counts, 8), rel=1e-5)


@pytest.mark.parametrize("kind", ["gauss", "student", "lognormal"])
def test_every_split_is_the_best_one_and_every_centroid_its_cells_mean(kind: str) -> None:
    weight, f = rows(kind, (2, 700), seed=3)
    nested = nested_codebooks(weight, f, 2, 6)
    check_tree(weight, f, nested, 2, 6)
    for r, (x, w) in enumerate(zip(weight, f, strict=True)):
        for bits in range(2, 7):
            q = nested.codes[r] >> (6 - bits)
            for c in range(2**bits):
                member, child = q == c, nested.codes[r] >> max(5 - bits, 0)
                if member.any():
                    mean = np.average(x[member].astype(np.float64), weights=w[member])
                    # abs: the sensitivity floor, 1e-6 of the mean, shifts means of insensitive cells
                    assert nested.codebooks[bits][r, c] == pytest.approx(mean, rel=1e-5, abs=1e-3)
                if bits < 6:
                    got = sum(cell_error(x[child == k], w[child == k]) for k in (2 * c, 2 * c + 1))
                    assert got <= best_two_parts(x[member], w[member]) * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("kind", ["gauss", "student", "lognormal"])
def test_no_worse_than_any_precisions_procedure(kind: str) -> None:
    """On every row at the seed; beyond it on average, as a worse seed can by chance have the better children."""
    weight, f = rows(kind, (8, 500), seed=4)
    nested = nested_codebooks(weight, f, SEED, 6)
    rng = np.random.default_rng(5)
    theirs = [any_precision(x, w, SEED, 6, rng) for x, w in zip(weight, f, strict=True)]
    for bits in range(SEED, 7):
        ours = weighted_error(weight, f, nested.codes >> (6 - bits), nested.codebooks[bits])
        ratio = ours / np.array([errors[bits] for errors in theirs])
        assert np.exp(np.log(ratio).mean()) < 1, bits
        if bits == SEED:
            assert (ratio <= 1 + 1e-6).all()


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    weight, f = rows("lognormal", (5, 900))
    one, many = nested_codebooks(weight, f, 3, 8), nested_codebooks(weight, f, 3, 8, threads=threads)
    assert (one.codes == many.codes).all()
    assert all((one.codebooks[b] == many.codebooks[b]).all() for b in one.codebooks)


@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, -1e-45, 3e38])
@pytest.mark.parametrize("keep_zeros", [False, True])
def test_constant_rows_are_exact(value: float, keep_zeros: bool) -> None:
    weight = np.full((2, 600), value, np.float32)
    nested = nested_codebooks(weight, None, 3, 8, keep_zeros)
    check_tree(weight, None, nested, 3, 8)
    assert all((book == np.float32(value)).all() for book in nested.codebooks.values())


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_rows_shorter_than_the_codebook_are_exact(keep_zeros: bool) -> None:
    weight = np.array([[0.5, -2.0, 0.0, 7.0, 0.5]], np.float32)
    nested = nested_codebooks(weight, None, 3, 8, keep_zeros)
    check_tree(weight, None, nested, 3, 8)
    for bits, book in nested.codebooks.items():
        assert (book[0, nested.codes[0] >> (8 - bits)] == weight[0]).all()
    assert (nested_codebooks(weight[:, :1], None, 8, 8).codebooks[8] == 0.5).all()


@pytest.mark.parametrize("outliers", [[1e30], [-1e30], [-1e30, 1e20, 1e30]])
def test_huge_outliers_leave_the_other_weights_their_accuracy(outliers: list[float]) -> None:
    weight, f = rows("gauss", (1, 2000))
    weight *= 1e-3
    bulk = weight.copy()
    weight[0, : len(outliers)] = outliers
    nested = nested_codebooks(weight, f, 3, 8)
    check_tree(weight, f, nested, 3, 8)
    for bits in (3, 8):
        codes = nested.codes >> (8 - bits)
        error = weighted_error(weight, f, codes, nested.codebooks[bits])[0]
        assert (nested.codebooks[bits][0, codes[0, : len(outliers)]] == np.float32(outliers)).all()
        if bits == 3:
            assert error <= 1.002 * optimum(bulk[0, len(outliers) :], f[0], 8 - len(outliers))


def test_denormals_and_many_duplicates() -> None:
    rng = np.random.default_rng(6)
    weight = (rng.integers(-2000, 2000, (1, 3000)) * 1e-45).astype(np.float32)
    check_tree(weight, None, nested_codebooks(weight, None, 3, 8), 3, 8)
    coarse = np.round(rng.standard_normal((2, 3000)) * 8).astype(np.float32) / 8
    nested = nested_codebooks(coarse, None, 3, 8)
    check_tree(coarse, None, nested, 3, 8)
    assert (weighted_error(coarse, None, nested.codes, nested.codebooks[8]) == 0).all()


def test_rows_and_cells_without_sensitivity_are_still_clustered() -> None:
    weight, f = rows("gauss", (2, 800))
    f[0] = 0
    f[1, :400] = 0
    nested = nested_codebooks(weight, f, 3, 8)
    check_tree(weight, f, nested, 3, 8)
    plain = nested_codebooks(weight[:1], None, 3, 8)
    assert (plain.codes[0] == nested.codes[0]).all()


def test_zeros_stay_zero_at_every_width_and_their_sensitivity_is_ignored() -> None:
    weight, f = rows("student", (3, 1500), seed=7)
    weight[:2, ::2] = 0.0
    weight[0, ::4] = -0.0
    f[:2, ::2] = 1e20
    nested = nested_codebooks(weight, f, 3, 8, keep_zeros=True)
    check_tree(weight, None, nested, 3, 8)
    ones = nested_codebooks(weight, None, 3, 8, keep_zeros=True)
    assert (nested.codes == ones.codes).all()
    for bits, book in nested.codebooks.items():
        back = np.take_along_axis(book, (nested.codes >> (8 - bits)).astype(np.int64), axis=1)
        assert (back[weight == 0] == 0).all()
    plain = nested_codebooks(weight[2:], f[2:], 3, 8)
    assert (plain.codes == nested.codes[2:]).all()


def best_around_zero(x: Array, cells: int, reserve: bool) -> float:
    """Least error with one cell centred on 0 that holds a run of values around it (`reserve`: only the zeros)."""
    x = np.sort(x)
    first, last = np.searchsorted(x, 0.0), np.searchsorted(x, 0.0, side="right")
    best = np.inf
    for a in [first] if reserve else range(first + 1):
        for b in [last] if reserve else range(last, x.size + 1):
            for left in range(cells):
                if (left == 0 and a > 0) or (left == cells - 1 and b < x.size):
                    continue
                sides = [(x[:a], left), (x[b:], cells - 1 - left)]
                error = sum(optimum(s, np.ones(s.size), k) for s, k in sides if s.size)
                best = min(best, error + cell_error(x[a:b], np.ones(b - a), 0.0))
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_seed_with_zeros_is_the_brute_force_optimum(seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(14).astype(np.float32) + np.float32(0.5 * seed)
    x[:3] = 0.0
    q = nested_codebooks(x[None], None, 2, 2, keep_zeros=True)
    error = weighted_error(x[None], None, q.codes, q.codebooks[2])[0]
    assert error == pytest.approx(best_around_zero(x, 4, reserve=False), rel=1e-5)
    assert error <= best_around_zero(x, 4, reserve=True) * (1 + 1e-5)


def test_named_errors() -> None:
    weight, f = rows("gauss", (3, 16))
    for bad in (np.nan, np.inf, -np.inf):
        broken = weight.copy()
        broken[1, 5] = bad
        with pytest.raises(ValueError, match="weight row 1"):
            nested_codebooks(broken, f, 3, 8)
    for bad in (np.nan, np.inf, -1.0):
        broken = f.copy()
        broken[2, 5] = bad
        with pytest.raises(ValueError, match="sensitivity row 2"):
            nested_codebooks(weight, broken, 3, 8)
    for seed, parent in ((0, 8), (4, 3), (3, 9)):
        with pytest.raises(ValueError, match="seed_bits"):
            nested_codebooks(weight, f, seed, parent)
    with pytest.raises(ValueError, match="shape"):
        nested_codebooks(weight[0], None, 3, 8)
    with pytest.raises(ValueError, match="shape"):
        nested_codebooks(weight, f[:, :8], 3, 8)
    with pytest.raises(TypeError, match="float64"):
        nested_codebooks(weight.astype(np.float64), None, 3, 8)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_row_gives_a_valid_tree(data: st.DataObject) -> None:
    seed = data.draw(st.integers(1, 4))
    parent = data.draw(st.integers(seed, 8))
    keep_zeros = data.draw(st.booleans())
    values = st.one_of(st.floats(-(2.0**100), 2.0**100, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.5]))
    row = data.draw(st.lists(values, min_size=1, max_size=80))
    weight = np.tile(np.array([row], np.float32), (1, data.draw(st.sampled_from([1, 9]))))
    f = data.draw(st.sampled_from([None, np.linspace(0, 1, weight.size, dtype=np.float32)[None]]))
    nested = nested_codebooks(weight, f, seed, parent, keep_zeros)
    check_tree(weight, f, nested, seed, parent)
    if keep_zeros:
        back = nested.codebooks[parent][0, nested.codes[0]]
        assert (back[weight[0] == 0] == 0).all()
