"""The blocked sweep against optimal brain surgery with an explicit inverse at every column."""

import pytest
import torch

from compress.errors import CompressError
from compress.pruning.scores import factorise, select, select_pattern
from compress.pruning.sparsegpt import Rule, sweep


def problem(rows=6, columns=20, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return weight, 2 / tokens * x.t() @ x


def surgery(weight, hessian, choose, damping=0.01, round_to=None):
    """One column after the other; what is left is inverted anew each time, in float64.

    choose(j, scores so far) is asked at each column for the mask of the columns it decides, [(column, bool [N])].
    """
    w, h = weight.double().clone(), hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h))
    pruned, loss = torch.zeros_like(weight, dtype=torch.bool), 0.0
    for j in range(w.shape[1]):
        scores = torch.stack([w[:, k].square() / torch.linalg.inv(h[k:, k:])[0, 0] for k in range(w.shape[1])], dim=1)
        for column, mask in choose(j, scores):
            pruned[:, column] = mask
        inverse = torch.linalg.inv(h[j:, j:])
        kept = w[:, j] if round_to is None else round_to(w[:, j].float()).double()
        error = w[:, j] - torch.where(pruned[:, j], 0.0, kept)
        loss += 0.5 * float((error.square() / inverse[0, 0]).sum())
        w[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
        w[:, j] += w[:, j].new_tensor(0.0)
    return w.float(), pruned, loss


def assert_agree(swept, expected):
    weight, pruned, loss = expected
    assert torch.equal(swept.pruned, pruned)
    assert (swept.weight[pruned] == 0).all()
    assert torch.allclose(swept.weight, weight, atol=2e-4)
    assert swept.loss == pytest.approx(loss, rel=1e-3)


def test_masks_by_blocks_of_columns_are_chosen_on_updated_weights():
    weight, hessian = problem()
    counts = {0: 24, 8: 24, 16: 12}  # half of each block of 8, 8 and 4 columns and 6 rows

    def choose(j, scores):
        if j not in counts:
            return []
        mask = select(scores[:, j : j + 8], counts[j], "matrix")
        return [(j + k, mask[:, k]) for k in range(mask.shape[1])]

    swept = sweep(weight, factorise(hessian.clone(), 0.01, "w"), Rule(60, "columns"), size=8)
    assert_agree(swept, surgery(weight, hessian, choose))


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_masks_by_row_and_matrix_are_chosen_beforehand(group):
    weight, hessian = problem(seed=1)

    def choose(j, scores):
        mask = select(scores, 70, group)
        return [(k, mask[:, k]) for k in range(20)] if j == 0 else []

    for size in (1, 7, 128):
        swept = sweep(weight, factorise(hessian.clone(), 0.01, "w"), Rule(70, group), size=size)
        assert_agree(swept, surgery(weight, hessian, choose))


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8)])
def test_patterns_are_chosen_as_the_sweep_arrives(kept, of):
    weight, hessian = problem(seed=2)

    def choose(j, scores):
        if j % of:
            return []
        mask = select_pattern(scores[:, j : j + of], kept, of)
        return [(j + k, mask[:, k]) for k in range(mask.shape[1])]

    swept = sweep(weight, factorise(hessian.clone(), 0.01, "w"), Rule(0, pattern=(kept, of)), size=8)
    assert_agree(swept, surgery(weight, hessian, choose))


def test_rounding_is_part_of_the_error():
    weight, hessian = problem(seed=3)
    coarse = lambda column: (column * 2).round() / 2  # noqa: E731

    def choose(j, scores):
        mask = select(scores, 40, "matrix")
        return [(k, mask[:, k]) for k in range(20)] if j == 0 else []

    swept = sweep(weight, factorise(hessian.clone(), 0.01, "w"), Rule(40, "matrix"), coarse)
    assert_agree(swept, surgery(weight, hessian, choose, round_to=coarse))
    assert torch.equal(swept.weight, coarse(swept.weight))


def test_the_update_pays():
    """The outputs of the updated weights are nearer to the dense ones than those of the mask alone."""
    weight, hessian = problem(rows=30, columns=40)
    swept = sweep(weight, factorise(hessian.clone(), 0.01, "w"), Rule(600))

    def error(other):
        return float(torch.einsum("nj,jk,nk->", weight - other, hessian, weight - other))

    assert error(swept.weight) < 0.7 * error(weight.masked_fill(swept.pruned, 0.0))


def test_dead_inputs_go_first_and_cost_nothing():
    weight, hessian = problem()
    hessian[3], hessian[:, 3] = 0, 0
    factor = factorise(hessian.clone(), 0.01, "w")
    assert factor.dead.nonzero().flatten().tolist() == [3]
    swept = sweep(weight, factor, Rule(12, "matrix"))
    assert swept.pruned[:, 3].all()
    only = sweep(weight, factor, Rule(6, "matrix"))
    assert only.loss == 0
    live = [k for k in range(20) if k != 3]
    assert torch.equal(only.weight[:, live], weight[:, live])


def test_all_inputs_dead():
    weight, _ = problem()
    swept = sweep(weight, factorise(torch.zeros(20, 20), 0.01, "w"), Rule(60))
    assert int(swept.pruned.sum()) == 60
    assert torch.isfinite(swept.weight).all()


def test_damping_grows_until_the_hessian_factorises():
    """One direction only, and a little less than nothing in all others: the damping asked for is not enough."""
    x = torch.ones(1, 40)
    hessian = x.t() @ x - 0.05 * torch.eye(40)
    assert factorise(hessian.clone(), 1e-3, "w").damping == pytest.approx(0.1)
    assert factorise(x.t() @ x, 0.01, "w").damping == 0.01


def test_inputs_that_are_not_finite_are_named():
    hessian = torch.eye(3)
    hessian[1, 1] = torch.nan
    with pytest.raises(CompressError, match=r"block\.w: its inputs on the calibration text are not finite"):
        factorise(hessian.clone(), 0.01, "block.w")


@pytest.mark.parametrize("rule", [Rule(60), Rule(60, "row"), Rule(60, "matrix"), Rule(0, pattern=(2, 4))], ids=str)
def test_zeros_go_first_and_stay(rule):
    weight, hessian = problem(seed=4)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.2] = 0
    swept = sweep(weight, factorise(hessian.clone(), 0.01, "w"), rule, size=8)
    assert not swept.weight[weight == 0].any()
    assert swept.pruned[weight == 0].all()
    assert torch.equal(swept.weight == 0, swept.pruned)
