"""The sweep over one block for codes that minimise the error of each layer's output.

Linears are done in the order in which the block calls them. At every number of bits up to 5, each sees its inputs in two runs: as
the original model makes them (``x``) and as the model does whose earlier matrices have that number of bits already (``x'``). What
the quantised rows should do to ``x'`` is what the dense ones did to ``x``: that is ``W`` plus the least-squares correction
``W E[(x - x') x'^T] E[x' x'^T]^-1`` (GPTAQ's asymmetric target, arXiv 2504.02692). A share of it is aimed at.
Above 5 bits the two runs are taken for the same: measured, the correction's own error is larger there than what it corrects.
All numbers of bits share one Hessian, the mean of ``x x^T``: measured, one of ``x'`` for each is not better.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from compress.passes import Block, Run
from compress.quant.format import Codes
from compress.quant.mixture import fit_experts
from compress.quant.nested import nested_output_codebooks
from compress.quant.settings import AnyPrecisionConfig
from compress.statistics import SharedInputs, check_inputs, watch

_DAMPING = 1e-3  # share of the Hessian's mean diagonal that is added to it
_CORRECTION_DAMPING = 1e-2


class _Enough(Exception):
    """Raised once the inputs asked for are there: the rest of the block need not run."""


def groups(block: Block) -> list[list[str]]:
    """Group the linears that are called with the same tensor, in the order of their calls."""
    shared, found = SharedInputs(), dict[str, list[str]]()

    def visit(name: str, x: Tensor) -> None:
        group = found.setdefault(shared.owner(name, x), [])
        if name not in group:
            group.append(name)

    with torch.no_grad(), watch({name: linear.module for name, linear in block.linears.items()}, visit):
        block.samples[0](block.module)
    return list(found.values())


def _input(run: Run, module: nn.Module, linear: nn.Module) -> Tensor:
    """Return what one linear of a block is given on one sample, float32 [T, K]."""
    seen: list[Tensor] = []

    def visit(_name: str, x: Tensor) -> None:
        seen.append(x.flatten(0, -2).float())
        raise _Enough

    with watch({"": linear}, visit):
        try:
            run(module)
        except _Enough:
            pass
    return seen[0]


def _damp(hessian: Tensor, share: float) -> None:
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(share * torch.where(mean > 0, mean, 1.0))


Calls = tuple[Sequence[Run], nn.Module, nn.Module]  # the samples of a block, the block, the linear in it to look at


@torch.no_grad()
def _hessian(calls: Calls, weight: Tensor) -> Tensor:
    """Return the mean of ``x x^T`` over a linear's inputs, float32 [K, K], K as of ``weight`` [N, K]."""
    runs, block, linear = calls
    tokens, hessian = 0, weight.new_zeros(weight.shape[1], weight.shape[1])
    for run in runs:
        x = _input(run, block, linear)
        hessian.addmm_(x.t(), x)
        tokens += len(x)
    return hessian.div_(tokens)


@torch.no_grad()
def _correction(original: Calls, changed: Calls, weight: Tensor) -> Tensor:
    """Return the change [N, K] of rows that lets them do to ``x'`` what they do to ``x``, nearest by least squares."""
    hessian, drift = (weight.new_zeros(weight.shape[1], weight.shape[1]) for _ in range(2))
    for run, other in zip(original[0], changed[0], strict=True):
        x, shown = _input(run, *original[1:]), _input(other, *changed[1:])
        hessian.addmm_(shown.t(), shown)
        drift.addmm_(shown.t(), x - shown)
    right = drift @ weight.t()
    del drift  # as large as the Hessian
    _damp(hessian, _CORRECTION_DAMPING)
    shift: Tensor = torch.linalg.solve(hessian, right)
    return shift.t()


def fitting_bytes(shapes: Collection[tuple[int, int]], variants: int, length: int) -> int:
    """Estimate the bytes that fitting a linear (N, K) takes, the one with most inputs, at ``length`` tokens a sample."""
    inputs = max(columns for _, columns in shapes)
    matrices = 3 * inputs * inputs  # the Hessian, and two more for the correction, or its split
    targets = (variants + 2) * max(rows * columns for rows, columns in shapes)
    return 4 * (matrices + targets + 4 * length * inputs) + 1024 * 90 * inputs  # a sample, and rows, at a time


@torch.no_grad()
def fit_block(block: Block, names: Sequence[str], config: AnyPrecisionConfig) -> dict[str, Codes]:
    """Quantise the named linears of a block; ``block.show`` then loads their weights at a variant's number of bits.

    The block has original inputs, and those of a variant for every number of bits up to :data:`CARRIED`.

    Raises:
        CompressError: inputs that are not finite.
    """
    original = copy.deepcopy(block.module)
    fitted = fit_experts(block, names, config)
    linears = block.linears  # not the block, which would then be kept by what it keeps

    def show(variant: str) -> None:
        for name, found in fitted.items():
            linears[name].weight.copy_(found.dense(int(variant)))

    block.show = show
    for group in groups(block):
        chosen = [name for name in group if name in names and name not in fitted]
        if not chosen:
            continue
        module = block.linears[chosen[0]].module
        twin = original.get_submodule(chosen[0].removeprefix(block.name + "."))
        weight = torch.cat([block.linears[name].weight.float() for name in chosen])
        dense = (block.samples, original, twin)
        hessian = _hessian(dense, weight)
        check_inputs(chosen[0], hessian)
        targets = dict.fromkeys(range(config.seed_bits, config.parent_bits + 1), weight)
        for variant, calls in block.variants.items():
            show(variant)
            shift = _correction(dense, (calls, block.module, module), weight)
            targets[int(variant)] = (weight + config.correction * shift).contiguous()
        measured = hessian.diagonal().clone()
        _damp(hessian, _DAMPING)
        zeros = weight == 0 if config.keep_zeros else None
        codes = nested_output_codebooks(targets, hessian, config.focus, zeros)
        hessian.diagonal().copy_(measured)
        hessian, start = hessian.cpu(), 0
        for name in chosen:
            rows = slice(start, start + block.linears[name].shape[0])
            codebooks = {bits: codebook[rows].cpu() for bits, codebook in codes.codebooks.items()}
            fitted[name], start = Codes(codes.codes[rows].cpu(), codebooks, hessian), rows.stop
    return fitted
