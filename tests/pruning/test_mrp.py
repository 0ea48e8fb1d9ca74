"""MRP: the ratio, its curve, and the greedy search against the loop of the paper."""

import pytest
import torch

from compress.pruning.allocation import Budget
from compress.pruning.mrp import curve, grid, non_outlier_ratio, outlier_share, search
from compress.pruning.scores import select

POINTS = [0.0, 0.1, 0.2, 0.3, 0.4]


def block(tail, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "a": draw(20, 64).abs() * (tail * draw(20, 64)).exp(),
        "b": draw(10, 256).abs() * (tail * draw(10, 256)).exp(),
    }


def test_the_dense_ratio_is_the_complement_of_owls():
    scores = block(1.0)
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert outlier_share(scores.values(), 3.0) == pytest.approx(float((flat > 3 * flat.mean()).float().mean()))
    assert non_outlier_ratio(scores, None, 3.0, "survivors") == 1 - outlier_share(scores.values(), 3.0)


def ratio_by_hand(scores, masks, outlier, ratio):
    dense = torch.cat([score.flatten() for score in scores.values()])
    sparse = torch.cat([score.masked_fill(masks[name], 0).flatten() for name, score in scores.items()])
    if ratio == "all":
        return 1 - float((sparse > outlier * sparse.mean()).double().mean())
    left = torch.cat([score[~masks[name]] for name, score in scores.items()])
    return 1 - float((left > outlier * dense.mean()).double().mean())


@pytest.mark.parametrize("ratio", ["survivors", "all"])
@pytest.mark.parametrize("group", ["row", "matrix", "columns"])
def test_the_curve_is_the_ratio_of_the_pruned_block(group, ratio):
    scores = block(0.8)
    points = [0.0, 0.25, 0.5, 0.75]
    found = curve(scores, dict.fromkeys(scores, group), points, 4.0, ratio)
    for point, value in zip(points, found, strict=True):
        masks = {name: select(score, int(point * score.numel()), group) for name, score in scores.items()}
        assert value == pytest.approx(ratio_by_hand(scores, masks, 4.0, ratio), abs=1e-6)
        assert value == pytest.approx(non_outlier_ratio(scores, masks, 4.0, ratio), abs=1e-6)


def greedy_by_hand(blocks, sizes, target, low, high, step, outlier):
    """The loop of the paper, pruning and measuring the block anew after every step."""

    def nor(unit, sparsity):
        masks = {n: select(s, round(sparsity * s.numel()), "matrix") for n, s in blocks[unit].items()}
        return ratio_by_hand(blocks[unit], masks, outlier, "survivors")

    now = [low] * len(blocks)
    while sum(n * s for n, s in zip(sizes, now, strict=True)) < target * sum(sizes) - 1e-6:
        able = [unit for unit in range(len(blocks)) if now[unit] + step <= high + 1e-9]
        unit = max(able, key=lambda unit: nor(unit, now[unit]))
        missing = target * sum(sizes) - sum(n * s for n, s in zip(sizes, now, strict=True))
        now[unit] += min(step, missing / sizes[unit])
    return now


def test_the_search_is_the_papers_loop():
    blocks = [block(0.3, 1), block(1.0, 2), block(0.6, 3), block(0.9, 4)]
    sizes = [sum(score.numel() for score in scores.values()) for scores in blocks]
    budget = Budget(sizes, 0.53, 0.35, 0.75)
    points = grid(0.35, 0.75, 0.05)
    curves = [curve(scores, dict.fromkeys(scores, "matrix"), points, 3.0, "survivors") for scores in blocks]
    found = search(budget, points, [curves], 0.05)
    assert found.sparsities == pytest.approx(greedy_by_hand(blocks, sizes, 0.53, 0.35, 0.75, 0.05, 3.0))
    assert found.finished
    before = [c[0] for c in curves]
    after = [
        curves[step.unit][points.index(min(points, key=lambda p, s=step: abs(p - s.after)))] for step in found.steps
    ]
    assert max(after[-4:]) - min(after[-4:]) < max(before) - min(before)


def test_every_iteration_is_logged():
    curves = [[[0.9, 0.8, 0.7], [0.95, 0.7, 0.6]]]
    found = search(Budget([10, 10], 0.2, 0.1, 0.3), [0.1, 0.2, 0.3], curves, 0.1)
    assert [(s.iteration, s.unit, s.nor) for s in found.steps] == [(0, 1, 0.95), (1, 0, 0.9)]
    assert found.sparsities == pytest.approx([0.2, 0.2])


def test_ties_go_to_the_first_block_and_the_last_step_is_shortened():
    flat = [[0.5] * 5] * 3
    found = search(Budget([100] * 3, 0.15, 0.0, 0.4), POINTS, [flat], 0.1)
    assert found.sparsities == pytest.approx([0.4, 0.05, 0.0])
    assert sum(found.sparsities) * 100 == pytest.approx(45)


def test_the_cap_holds():
    runaway = [[0.99, 0.99, 0.99, 0.99], [0.1, 0.1, 0.1, 0.1]]
    found = search(Budget([10, 10], 0.5, 0.35, 0.6), [0, 0.3, 0.6, 0.9], [runaway], 0.1)
    assert found.sparsities == pytest.approx([0.6, 0.4])


def test_the_search_waits_for_a_fresh_round():
    """Two iterations a round: after the first round the other block is the more redundant."""
    first, second = [[0.9] * 5, [0.5] * 5], [[0.5] * 5, [0.9] * 5]
    budget = Budget([10, 10], 0.2, 0.0, 0.4)
    waiting = search(budget, POINTS, [first], 0.1, refresh=2)
    assert (waiting.sparsities, waiting.finished) == (pytest.approx([0.2, 0.0]), False)
    done = search(budget, POINTS, [first, second], 0.1, refresh=2)
    assert (done.sparsities, done.finished) == (pytest.approx([0.2, 0.2]), True)


def test_grids_end_at_the_cap():
    assert grid(0.35, 0.65, 0.1) == pytest.approx([0.35, 0.45, 0.55, 0.65])
    assert grid(0.0, 0.25, 0.1) == pytest.approx([0, 0.1, 0.2, 0.25])
