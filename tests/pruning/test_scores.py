"""Which weights go: every score and comparison group against loops written from the formulas."""

import pytest
import torch

from compress.pruning.scores import (
    levels,
    magnitude,
    pattern_zeros,
    removal,
    select,
    select_pattern,
    shares,
    wanda,
)


def test_the_three_scores():
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert magnitude(weight).tolist() == [[1, 2], [0, 3]]
    assert wanda(weight, torch.tensor([9.0, 0.0])).tolist() == [[3, 0], [0, 0]]
    assert removal(weight, torch.tensor([0.5, torch.inf])).tolist() == [[2, 0], [0, 0]]


@pytest.mark.parametrize("zeros", [0, 1, 17, 30, 60])
def test_by_matrix_the_smallest_of_all_go(zeros):
    scores = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    cells = sorted((scores[i, j].item(), i, j) for i in range(6) for j in range(10))
    expected = {(i, j) for _, i, j in cells[:zeros]}
    assert {tuple(place) for place in select(scores, zeros, "matrix").nonzero().tolist()} == expected


@pytest.mark.parametrize("zeros", [0, 5, 17, 60])
def test_by_row_every_row_loses_as_many_to_within_one(zeros):
    scores = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    mask = select(scores, zeros, "row")
    counts = mask.sum(1).tolist()
    assert sum(counts) == zeros
    assert max(counts) - min(counts) <= 1
    for i in range(6):
        expected = sorted(range(10), key=lambda j, i=i: scores[i, j].item())[: counts[i]]
        assert mask[i].nonzero().flatten().tolist() == sorted(expected)


def test_by_blocks_of_columns_each_block_loses_its_share():
    scores = torch.rand(4, 300, generator=torch.Generator().manual_seed(0))
    mask = select(scores, 601, "columns")
    counts = [int(mask[:, a:b].sum()) for a, b in ((0, 128), (128, 256), (256, 300))]
    assert sum(counts) == 601
    assert counts == [256, 256, 89]
    assert torch.equal(mask[:, :128], select(scores[:, :128], 256, "matrix"))


def test_equal_scores_go_by_position():
    assert select(torch.ones(2, 4), 3, "matrix").tolist() == [[True, True, True, False], [False] * 4]
    assert select(torch.ones(2, 4), 3, "row").tolist() == [[True] + [False] * 3, [True, True, False, False]]


@pytest.mark.parametrize("group", ["row", "matrix", "columns"])
def test_all_go_where_more_are_asked_for(group):
    """As by a plan, which tries a pass on some rows of a matrix."""
    assert select(torch.rand(2, 200), 900, group).all()


@pytest.mark.parametrize("zeros", [0, 1, 300, 777, 1200])
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_of_few_values_those_go_that_a_stable_sort_puts_first(group, zeros):
    scores = torch.randint(0, 4, (30, 40), generator=torch.Generator().manual_seed(0)).float()
    mask = select(scores, zeros, group)
    rows = [(scores.flatten(), mask.flatten())] if group == "matrix" else list(zip(scores, mask, strict=True))
    for values, gone in rows:
        first = values.argsort(stable=True)[: int(gone.sum())]
        assert gone.nonzero().flatten().tolist() == sorted(first.tolist())
    assert int(mask.sum()) == zeros


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 3)])
def test_patterns_keep_n_of_every_m(kept, of):
    """11 columns: the last group is shorter, and fits the pattern once padded with zeros."""
    scores = torch.rand(5, 11, generator=torch.Generator().manual_seed(0))
    mask = select_pattern(scores, kept, of)
    for row in range(5):
        for start in range(0, 11, of):
            group = scores[row, start : start + of].tolist()
            left = -(-len(group) * kept // of)
            expected = sorted(range(len(group)), key=group.__getitem__)[: len(group) - left]
            assert mask[row, start : start + of].nonzero().flatten().tolist() == sorted(expected)
    assert int(mask.sum()) == pattern_zeros(5, 11, kept, of)


@pytest.mark.parametrize("group", ["row", "matrix", "columns"])
def test_a_level_is_the_sparsity_at_which_a_weight_goes(group):
    scores = torch.rand(8, 256, generator=torch.Generator().manual_seed(1))
    found = levels(scores, group)
    for zeros in (8, 256, 1024, 1536):  # whole numbers in every group
        assert torch.equal(found <= zeros / scores.numel() + 1e-6, select(scores, zeros, group))


def test_shares_are_even():
    assert shares(7, 3) == [2, 2, 3]
    assert shares(0, 2) == [0, 0]
