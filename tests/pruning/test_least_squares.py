"""Removal and refitting, against plain least squares on the inputs themselves."""

import pytest
import torch

from compress.pruning.structured.scores import DAMPING, OutputMoments, compensated, output_error, removal_order


def inputs(tokens=300, columns=12, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing + mean


def moments_of(x, centred=False):
    found = OutputMoments(x.shape[1], centred, x.device)
    for part in x.split(100):
        found.add(part)
    return found.finish()


def damping_of(x):
    return DAMPING * float((x.double().square().mean(0)).mean())


def least_error(x, weight, gone):
    """Mean square error, damping included, when some columns go and the rest is refitted: rows for the data, and for the pull
    towards the columns as they were."""
    x, weight = x.double(), weight.double()
    kept = [k for k in range(x.shape[1]) if k not in gone]
    pull = damping_of(x) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    rows = torch.cat([x / len(x) ** 0.5, pull])
    solution = torch.linalg.lstsq(rows[:, kept], rows @ weight.t()).solution
    return float((rows @ weight.t() - rows[:, kept] @ solution).square().sum())


@pytest.mark.parametrize("size", [1, 3])
def test_groups_go_in_the_order_of_their_least_squares_cost(size):
    x, weight = inputs(), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    columns = torch.arange(12).view(-1, size)
    classes = torch.zeros(len(columns), dtype=torch.long)
    order, errors = removal_order(weight, moments_of(x), columns, classes, len(columns) - 1)
    gone, before = [], []
    for group, error in zip(order, errors, strict=True):
        costs = {
            u: least_error(x, weight, [*before, *columns[u].tolist()]) for u in range(len(columns)) if u not in gone
        }
        assert min(costs, key=costs.get) == group
        assert error == pytest.approx(costs[group], rel=1e-3)
        gone.append(group)
        before += columns[group].tolist()


def test_every_class_loses_as_many():
    x, weight = inputs(), torch.randn(5, 12)
    classes = torch.arange(6) // 2
    order, _ = removal_order(weight, moments_of(x), torch.arange(12).view(6, 2), classes, 3)
    assert sorted(classes[order].tolist()) == [0, 1, 2]


def test_what_stays_is_the_least_squares_fit():
    x, weight = inputs(), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([0, 1, 4, 5, 6, 9, 11])
    found, _ = compensated(weight, None, moments_of(x), kept)
    pull = damping_of(x) ** 0.5 * torch.eye(len(kept))
    rows = torch.cat([x[:, kept] / len(x) ** 0.5, pull])
    wanted = torch.cat([x @ weight.t() / len(x) ** 0.5, pull @ weight[:, kept].t()])
    assert torch.allclose(found.t(), torch.linalg.lstsq(rows, wanted).solution, atol=1e-3)
    moments = moments_of(x)
    assert output_error(weight, found, moments, kept) < output_error(weight, weight[:, kept], moments, kept)


def test_a_bias_takes_up_the_means():
    x, weight = inputs(mean=3.0), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    bias, kept = torch.randn(5), torch.arange(8)
    found, shifted = compensated(weight, bias, moments_of(x, centred=True), kept)
    apart = (x[:, kept] @ found.t() + shifted) - (x @ weight.t() + bias)
    assert apart.mean(0).abs().max() < 1e-3
    ones = torch.ones(len(x), 1)
    best = (
        torch.cat([x[:, kept], ones], dim=1)
        @ torch.linalg.lstsq(torch.cat([x[:, kept], ones], dim=1), x @ weight.t() + bias).solution
    )
    floor = (best - (x @ weight.t() + bias)).square().mean()
    assert floor <= apart.square().mean() < 1.1 * floor + 1e-6


def test_many_groups_go_several_at_a_time():
    x = inputs(columns=600, tokens=900)
    weight = torch.randn(4, 600)
    order, errors = removal_order(
        weight, moments_of(x), torch.arange(600)[:, None], torch.zeros(600, dtype=torch.long), 590
    )
    assert len(set(order)) == 590
    assert errors == sorted(errors)


def test_inputs_that_are_always_zero_go_first():
    x = inputs()
    x[:, [3, 7]] = 0.0
    classes = torch.zeros(12, dtype=torch.long)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    order, _ = removal_order(weight, moments_of(x), torch.arange(12)[:, None], classes, 3)
    assert set(order[:2]) == {3, 7}


def test_zeros_stay_and_the_rest_is_refitted_around_them():
    """Row by row, against least squares over the columns that are not zero."""
    x = inputs(seed=3)
    moments, generator = moments_of(x), torch.Generator().manual_seed(5)
    weight = torch.randn(6, x.shape[1], generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    kept = torch.arange(2, x.shape[1])
    found, _ = compensated(weight, None, moments, kept)
    assert torch.equal(found == 0, weight[:, kept] == 0)
    matrix, whole = moments.damped(), weight.double()
    wanted = whole @ moments.hessian + whole * (matrix - moments.hessian).diagonal()
    for row, right, own in zip(found.double(), wanted, whole, strict=True):
        there = kept[own[kept] != 0]
        expected = torch.linalg.solve(matrix[there[:, None], there], right[there])
        torch.testing.assert_close(row[own[kept] != 0], expected, atol=1e-3, rtol=1e-3)
