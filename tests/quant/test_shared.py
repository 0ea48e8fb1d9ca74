"""Shared codebooks: what they cost, that the search finds good ones, and what may not be done with them."""

import pytest
import torch

from compress.quant.nested import nested_output_codebooks
from compress.quant.records import SharedShape
from compress.quant.settings import AnyPrecisionConfig
from compress.quant.shared_fit import column_factors, fit_shared, from_coefficients
from compress.quant.shared_search import shared_output_codebooks


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
    """Above 4 bits what is beside the planes is less than 3 % of them at 576 columns; by rows it is more than the planes at 8."""
    for bits in (5, 6, 8):
        held = SharedShape(576, 576, 2, bits, rank=6).tensor_bytes()
        planes = sum(size for name, size in held.items() if name.startswith(("weight", "plane")))
        assert sum(held.values()) - planes < 0.035 * planes, bits


def test_errors_stay_near_those_of_free_codebooks_where_columns_differ():
    """At 2 and 3 bits they are smaller, as columns have factors; at every bit they fall."""
    weight, hessian = layer()
    targets = dict.fromkeys(range(2, 9), weight)
    [shared] = shared_output_codebooks(targets, hessian, 6)
    free, stored = nested_output_codebooks(targets, hessian), shared.as_stored()
    errors = [error(stored, weight, hessian, bits) for bits in targets]
    assert errors == sorted(errors, reverse=True)
    for bits in (2, 3):
        assert errors[bits - 2] < error(free, weight, hessian, bits)
    assert errors[6] < errors[2] / 8
    for bits in targets:
        assert error(shared, weight, hessian, bits) == pytest.approx(errors[bits - 2], rel=0.02)


def test_matrices_of_one_input_have_the_same_factors():
    weight, hessian = layer()
    one, other = shared_output_codebooks({3: weight, 4: weight}, hessian, 2, sizes=[64, 32])
    assert torch.equal(one.shared.columns, other.shared.columns)
    assert torch.equal(one.shared.columns, column_factors(weight, hessian.diagonal()))
    assert (len(one.codes), len(other.codes)) == (64, 32)


def test_codebooks_of_low_rank_are_found_again():
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(40, 2, generator=generator) + torch.tensor([1.0, -0.5])
    basis = {bits: torch.randn(2, 2**bits, generator=generator).sort(1).values for bits in (2, 3)}
    wanted = {bits: rows @ part for bits, part in basis.items()}
    masses = {bits: torch.rand(table.shape, generator=generator) + 0.1 for bits, table in wanted.items()}
    found = fit_shared(wanted, masses, torch.ones(16), 2)
    again = from_coefficients(torch.ones(16), rows, basis)
    for bits, table in wanted.items():
        size = table.abs().amax(1, keepdim=True)
        assert ((found.codebook(bits) - table) / size).abs().max() < 0.02
        assert ((again.codebook(bits) - table) / size).abs().max() < 0.02


def test_rows_have_their_own_codebooks_where_zeros_are_kept_or_weights_are_the_objective():
    assert AnyPrecisionConfig(codebooks="shared").rank(576) == 6
    assert AnyPrecisionConfig(codebooks="shared", keep_zeros=True).rank(576) is None
    assert AnyPrecisionConfig(codebooks="shared", objective="weight").rank(576) is None
    assert AnyPrecisionConfig(codebooks="row").rank(576) is None
