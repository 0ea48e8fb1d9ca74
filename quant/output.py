"""The sweep over one block for codes that minimise the error of each layer's output.

Linears are done in the order in which the block calls them. Each sees its inputs in two runs: as the original model makes
them (``x``) and as the model does whose earlier matrices are quantised already (``x'``). The metric is the mean of
``x' x'^T``, and what the quantised rows should do to ``x'`` is what the dense ones did to ``x``: their target is ``W``
plus a share of the least-squares correction ``W E[(x - x') x'^T] E[x' x'^T]^-1`` (GPTAQ's asymmetric target, arXiv
2504.02692).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.passes import Block
from compress.quant.tree import Tree, nested_output_codebooks

_DAMPING = 1e-3  # share of the metric's mean diagonal that is added to it
_CORRECTION_DAMPING = 1e-2


@dataclass(frozen=True)
class Fitted:
    """One matrix after the sweep.

    Attributes:
        codes: uint8 [N, K], parent codes.
        tables: width -> float32 [N, 2**width].
        metric: float32 [K, K], mean of ``x' x'^T``.
    """

    codes: Tensor
    tables: dict[int, Tensor]
    metric: Tensor


class _Enough(Exception):
    """Raised once the inputs asked for are there: the rest of the block need not run."""


@contextmanager
def _watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: see(name, inputs[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def groups(block: Block) -> list[list[str]]:
    """Linears that are called with the same tensor, in the order of their calls."""
    found: list[tuple[Tensor, list[str]]] = []

    def see(name: str, x: Tensor) -> None:
        if found and found[-1][0].data_ptr() == x.data_ptr() and found[-1][0].shape == x.shape:
            found[-1][1].append(name)
        else:
            found.append((x, [name]))  # holding the tensor keeps its memory from being used again

    with torch.no_grad(), _watching({name: linear.module for name, linear in block.linears.items()}, see):
        block.samples[0](block.module)
    return [names for _, names in found]


def _input(run: Callable[[nn.Module], Tensor], module: nn.Module, linear: nn.Module) -> Tensor:
    """float32 [T, K], what one linear of a block is given on one sample."""
    seen: list[Tensor] = []

    def see(_name: str, x: Tensor) -> None:
        seen.append(x.flatten(0, -2).float())
        raise _Enough

    with _watching({"": linear}, see):
        try:
            run(module)
        except _Enough:
            pass
    return seen[0]


def _damped(metric: Tensor, share: float) -> Tensor:
    mean = metric.diagonal().mean()
    return metric + share * torch.where(mean > 0, mean, 1.0) * torch.eye(len(metric), device=metric.device)


@torch.no_grad()
def _moments(block: Block, original: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """float32 [K, K] each: the means of ``x' x'^T`` and of ``x' (x - x')^T`` at a linear's input."""
    linear = block.linears[name].module
    twin = original.get_submodule(name.removeprefix(block.name + "."))
    metric = drift = torch.zeros(())
    tokens = 0
    for run, run_original in zip(block.samples, block.original, strict=True):
        x = _input(run, block.module, linear)
        metric = metric.to(x.device) + x.t() @ x
        drift = drift.to(x.device) + x.t() @ (_input(run_original, original, twin) - x)
        tokens += len(x)
    if not torch.isfinite(metric).all():
        raise CompressError(f"{name}: its inputs on the calibration text are not finite; check the model's weights.")
    return metric / tokens, drift / tokens


@torch.no_grad()
def sweep(
    block: Block, names: Sequence[str], widths: tuple[int, int], carry: int,
    correction: float, focus: Mapping[int, float], keep_zeros: bool,
) -> dict[str, Fitted]:  # fmt: skip
    """Quantise linears of a block, and leave in the block their weights at the width ``carry``.

    Args:
        block: with inputs of both kinds.
        names: the linears to quantise; the others stay as they are.
        widths: seed and parent width.
        carry: width at which later linears and blocks see the ones before.
        correction: share of the least-squares correction of the target, from 0 (aim at ``W``) to 1.
        focus: width -> how much its error counts (:func:`nested_output_codebooks`).
        keep_zeros: weights that are 0 stay 0 at every width.

    Raises:
        CompressError: inputs that are not finite.
    """
    original = copy.deepcopy(block.module)
    fitted: dict[str, Fitted] = {}
    for group in groups(block):
        chosen = [name for name in group if name in names]
        if not chosen:
            continue
        metric, drift = _moments(block, original, chosen[0])
        weights = [block.linears[name].weight.float() for name in chosen]
        weight = torch.cat(weights)
        shift = torch.linalg.solve(_damped(metric, _CORRECTION_DAMPING), drift @ weight.t()).t()
        zeros = weight == 0 if keep_zeros else None
        tree = nested_output_codebooks(
            (weight + correction * shift).contiguous(), _damped(metric, _DAMPING), *widths, focus, zeros
        )
        rows = 0
        for name, part in zip(chosen, weights, strict=True):
            fitted[name] = _part(tree, slice(rows, rows + len(part)), metric)
            block.linears[name].weight.copy_(tree.dense(carry)[rows : rows + len(part)])
            rows += len(part)
    return fitted


def _part(tree: Tree, rows: slice, metric: Tensor) -> Fitted:
    tables = {bits: table[rows].cpu() for bits, table in tree.tables.items()}
    return Fitted(tree.codes[rows].to("cpu", torch.uint8), tables, metric.cpu())
