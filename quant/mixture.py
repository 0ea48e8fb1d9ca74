"""Codes for the experts of a mixture, each by the tokens that are routed to it.

An expert sees a share of the calibration text, some of them little. What its own tokens say of its inputs is therefore mixed with
what is known without them, counted as if it were as many tokens as the matrix has columns: for the first matrix the inputs of all
experts of the layer, which are of one kind, and for the second, whose inputs are the expert's own, that all are alike. Experts are
not corrected for the errors of the layers before: in another run other tokens come to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.experts import Experts
from compress.passes import Block
from compress.quant.format import Codes
from compress.quant.nested import nested_output_codebooks
from compress.quant.settings import AnyPrecisionConfig
from compress.quant.shared_search import shared_output_codebooks
from compress.ranks import Sums
from compress.statistics import check_inputs

_DAMPING = 1e-3  # share of the Hessian's mean diagonal that is added to it
_TOKENS = "tokens of "


@torch.no_grad()
def fit_experts(block: Block, names: Sequence[str], config: AnyPrecisionConfig) -> dict[str, Codes]:
    """Quantise the experts among the named linears of a block by the error of their outputs.

    Those that no token of the calibration text comes to have those of all; where there are none either, experts are left out.
    ``block.few_tokens`` tells which had fewer tokens than columns.
    """
    found: dict[str, Codes] = {}
    for path, module in block.module.named_modules(prefix=block.name):
        if isinstance(module, Experts):
            for matrix in module.matrices:
                members = [f"{path}.{place}.{matrix}" for place in range(module.counts[matrix])]
                found |= _fit(block, [name for name in members if name in names], matrix != module.matrices[-1], config)
    return found


def _fit(block: Block, members: Sequence[str], alike: bool, config: AnyPrecisionConfig) -> dict[str, Codes]:
    """Quantise one matrix of every expert; ``alike`` tells that their inputs are of one kind."""
    inputs = Sums(block.ranks)

    def visit(name: str, x: Tensor) -> None:
        x = x.float()
        if name not in inputs.lot:
            inputs.lot[name] = x.new_zeros(x.shape[1], x.shape[1])
        inputs.lot[name].addmm_(x.t(), x)
        inputs.add(f"{_TOKENS}{name}", torch.tensor(len(x)))

    modules = {name: block.linears[name].module for name in members}
    block.for_each_input(visit, modules, end_lot=inputs.end_lot)
    tokens = {name: int(inputs.total.pop(f"{_TOKENS}{name}", 0)) for name in members}
    sums = inputs.total
    if not sums:
        return {}
    total: Tensor = sum(sums.values()) / max(1, sum(tokens.values()))  # type: ignore[assignment]
    columns, found = len(total), {}
    for name in members:
        if tokens[name] < columns:
            block.few_tokens[name] = tokens[name]
        own = sums.pop(name, None)
        hessian = _known(total, own, tokens[name]) if not alike else total
        if own is not None:
            hessian = (own + columns * hessian) / (tokens[name] + columns)
        check_inputs(name, hessian)
        found[name] = _codes(block, name, hessian, config)
    return found


def _known(total: Tensor, own: Tensor | None, tokens: int) -> Tensor:
    """Return what is known of an expert's own kind of inputs without their products: that all are alike."""
    power = total.diagonal().mean() if own is None else own.diagonal().mean() / tokens
    return torch.eye(len(total), device=total.device) * power


def _codes(block: Block, name: str, hessian: Tensor, config: AnyPrecisionConfig) -> Codes:
    """Quantise one matrix by the products of its inputs, a mean over tokens."""
    damped, mean = hessian.clone(), hessian.diagonal().mean()
    damped.diagonal().add_(_DAMPING * torch.where(mean > 0, mean, 1.0))
    weight = block.linears[name].weight.float()
    targets = dict.fromkeys(range(config.seed_bits, config.parent_bits + 1), weight)
    if config.shares(len(hessian)):
        found = shared_output_codebooks(targets, damped, config.focus, ranks=block.ranks)[0].to("cpu")
        return replace(found, hessian=hessian.cpu())
    zeros = weight == 0 if config.keep_zeros else None
    codes = nested_output_codebooks(targets, damped, config.focus, zeros, block.ranks)
    codebooks = {bits: codebook.cpu() for bits, codebook in codes.codebooks.items()}
    return Codes(codes.codes.cpu(), codebooks, hessian.cpu())
