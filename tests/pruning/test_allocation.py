"""Allocations: every one meets the target exactly in parameters, in its bounds, and orders the blocks as it should."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.pruning import allocation
from compress.pruning.allocation import Budget, exponent, whole_numbers

SIZES = [1000, 3000, 1000, 2500, 777]
VALUES = [0.03, 0.01, 0.02, 0.08, 0.01]


def every(budget):
    generator = torch.Generator().manual_seed(3)
    return {
        "uniform": allocation.uniform(budget),
        "random": allocation.random(budget, 0.1, generator),
        "atp": allocation.atp(budget, 0.2),
        "owl": allocation.owl(budget, VALUES, 0.08),
        "dlp": allocation.dlp(budget, VALUES, 0.15),
        "alpha": allocation.alpha(budget, VALUES, 0.3),
        "clusters": allocation.clusters(budget, VALUES, 0.075),
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95])
def test_all_meet_the_target_exactly(sparsity):
    budget = Budget(SIZES, sparsity, 0.0, 0.97)
    for name, found in every(budget).items():
        assert all(-1e-12 <= value <= 0.97 + 1e-12 for value in found), name
        counts = whole_numbers(budget, found)
        assert sum(counts) == round(sparsity * sum(SIZES)), name
        assert all(abs(c - s * n) <= 1.5 for c, s, n in zip(counts, found, SIZES, strict=True)), name


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1)), min_size=1, max_size=20), st.floats(0, 0.99))
def test_any_offsets_meet_any_target(units, sparsity):
    sizes, values = [size for size, _ in units], [value for _, value in units]
    found = allocation.owl(Budget(sizes, sparsity, 0.0, 0.995), values, 0.4)
    assert np.dot(found, sizes) == pytest.approx(sparsity * sum(sizes), abs=1e-6 * sum(sizes))
    counts = whole_numbers(Budget(sizes, sparsity), found)
    assert sum(counts) == round(sparsity * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_owl_is_its_formula():
    """Equal sizes: s = S - (r - mean r), r the outlier shares on 0 .. 2 lambda (third-party code's own steps)."""
    ratio = (np.array(VALUES) - min(VALUES)) / (max(VALUES) - min(VALUES)) * 2 * 0.08
    expected = 1 - (ratio - ratio.mean() + (1 - 0.6))
    assert allocation.owl(Budget([10] * 5, 0.6), VALUES, 0.08) == pytest.approx(expected.tolist())


def test_atp_is_its_formula():
    """s_i = S - beta (L - 1) / 2 + beta (i - 1), with beta (L - 1) = 2 spread."""
    beta = 2 * 0.15 / 4
    expected = [0.6 - beta * 4 / 2 + beta * i for i in range(5)]
    assert allocation.atp(Budget([10] * 5, 0.6), 0.15) == pytest.approx(expected)


def test_alpha_is_its_formula():
    factors = np.interp(VALUES, [min(VALUES), max(VALUES)], [0.7, 1.3])
    expected = 0.5 * factors * 50 / (10 * factors.sum())
    assert allocation.alpha(Budget([10] * 5, 0.5), VALUES, 0.3) == pytest.approx(expected.tolist())
    assert allocation.alpha(Budget([10] * 2, 0.5), [float("inf")] * 2, 0.3) == pytest.approx([0.5, 0.5])


def test_dlp_is_its_formula():
    importance = 1 - np.array(VALUES) / sum(VALUES)
    ratio = (importance - importance.min()) / (importance.max() - importance.min()) * 2 * 0.15
    expected = 1 - (ratio - ratio.mean() + (1 - 0.6))
    assert allocation.dlp(Budget([10] * 5, 0.6), VALUES, 0.15) == pytest.approx(expected.tolist())


def test_clusters_share_a_sparsity_and_a_larger_loss_keeps_more():
    losses = [1e-6, 1.1e-6, 1e-4, 1.2e-4, 1e-2, 0.0, 3.0]
    found = allocation.clusters(Budget([10] * 7, 0.7), losses, 0.09)
    assert found[0] == pytest.approx(found[1])
    assert found[2] == pytest.approx(found[3])
    assert found[5] >= found[0] > found[2] > found[6]
    assert max(found) - min(found) == pytest.approx(2 * 0.09)


def test_clusters_are_the_best_one_dimensional_ones():
    """Against every way to cut the sorted values."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=9)
    order = np.sort(values)

    def cost(cuts):
        parts = np.split(order, cuts)
        return sum(((part - part.mean()) ** 2).sum() for part in parts)

    best = min(itertools.combinations(range(1, 9), 3), key=cost)
    sparsities = np.array(allocation.clusters(Budget([10] * 9, 0.5), 10**values, 0.1))
    found = [len(list(members)) for _, members in itertools.groupby(np.sort(-sparsities).round(6))]
    assert found == [len(part) for part in np.split(order, best)]


def test_random_depends_on_its_generator_only():
    draws = [allocation.random(Budget(SIZES, 0.5), 0.1, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert max(draws[0]) - min(draws[0]) <= 0.2


def test_equal_statistics_mean_uniform():
    assert allocation.owl(Budget(SIZES, 0.4), [0.1] * 5, 0.2) == pytest.approx([0.4] * 5)


@pytest.mark.parametrize(("floor", "cap"), [(0.6, 0.9), (0.0, 0.4)])
def test_a_target_outside_the_bounds_is_refused(floor, cap):
    with pytest.raises(CompressError, match=r"sparsity 0\.5 is not between floor .* and cap"):
        Budget(SIZES, 0.5, floor, cap)


def test_exponents_tell_heavy_tails():
    """Eigenvalues of exact power laws are found again; a heavier tail has the smaller exponent."""
    for alpha in (2.0, 3.5):
        quantiles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
        eigenvalues = (1 - quantiles) ** (-1 / (alpha - 1))
        assert exponent(torch.diag(eigenvalues.sqrt())) == pytest.approx(alpha, rel=0.06)
    assert exponent(torch.eye(4)) == float("inf")
    assert exponent(torch.zeros(4, 4)) == float("inf")
