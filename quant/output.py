"""The sweep over one block for codes that minimise the error of each layer's output.

Linears are done in the order in which the block calls them. For every width up to 5, each sees its inputs in two runs: as
the original model makes them (``x``) and as the model does whose earlier matrices are at that width already (``x'``). The
metric is the mean of ``x' x'^T``. What the quantised rows should do to ``x'`` is what the dense ones did to ``x``: that is
``W`` plus the least-squares correction ``W E[(x - x') x'^T] E[x' x'^T]^-1`` (GPTAQ's asymmetric target, arXiv
2504.02692). A share of it is what each width aims at. Above 5 bits the two runs are taken for the same: measured, the correction's own
error is larger there than what it corrects.
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

Run = Callable[[nn.Module], Tensor]

_DAMPING = 1e-3  # share of the metric's mean diagonal that is added to it
_CORRECTION_DAMPING = 1e-2
_SAMPLES = 8  # whose inputs are in memory at once


@dataclass(frozen=True)
class Fitted:
    """One matrix after the sweep.

    Attributes:
        codes: uint8 [N, K], parent codes.
        tables: width -> float32 [N, 2**width].
        metric: float32 [K, K], mean of ``x x^T``.
    """

    codes: Tensor
    tables: dict[int, Tensor]
    metric: Tensor

    def dense(self, bits: int) -> Tensor:
        """float32 [N, K], the weights at a width."""
        return self.tables[bits].gather(1, (self.codes >> (max(self.tables) - bits)).long())


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


def _input(run: Run, module: nn.Module, linear: nn.Module) -> Tensor:
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
def _moments(
    block: Block,
    original: tuple[nn.Module, nn.Module],
    changed: tuple[nn.Module, nn.Module],
    show: Callable[[str], None],
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Second moments of a linear's inputs: ``x`` as the original block makes them, ``x'`` as a variant of it does.

    Args:
        block: with samples and their variants.
        original: the block as it was, and the linear in it.
        changed: the block, and the linear in it.
        show: puts a variant's weights into it.

    Returns:
        float32 [K, K], the mean of ``x x^T``; and for every variant the means of ``x' x'^T`` and of ``x' (x - x')^T``.
    """
    metric, tokens = torch.zeros(()), 0
    found = dict.fromkeys(block.variants, (metric, metric))
    for start in range(0, len(block.samples), _SAMPLES):
        part = slice(start, start + _SAMPLES)
        inputs = [_input(run, *original) for run in block.samples[part]]
        for x in inputs:
            metric, tokens = x.t() @ x + metric, tokens + len(x)
        for variant, calls in block.variants.items():
            show(variant)
            for x, run in zip(inputs, calls[part], strict=True):
                shown, (moment, drift) = _input(run, *changed), found[variant]
                found[variant] = shown.t() @ shown + moment, shown.t() @ (x - shown) + drift
    return metric / tokens, {name: (moment / tokens, drift / tokens) for name, (moment, drift) in found.items()}


@torch.no_grad()
def sweep(
    block: Block, names: Sequence[str], widths: Sequence[int], correction: float, focus: Mapping[int, float],
    keep_zeros: bool,
) -> dict[str, Fitted]:  # fmt: skip
    """Quantise linears of a block; ``block.show`` then puts their weights at a variant's width into it.

    Args:
        block: with original inputs, and those of a variant for every width up to :data:`CARRIED`.
        names: the linears to quantise; the others stay as they are.
        widths: from seed to parent.
        correction: share of the least-squares correction that is aimed at, from 0 (``W``) to 1.
        focus: width -> how much its error counts (:func:`nested_output_codebooks`).
        keep_zeros: weights that are 0 stay 0 at every width.

    Raises:
        CompressError: inputs that are not finite.
    """
    original = copy.deepcopy(block.module)
    fitted: dict[str, Fitted] = {}

    linears = block.linears  # not the block, which would then be kept by what it keeps

    def show(variant: str) -> None:
        for name, found in fitted.items():
            linears[name].weight.copy_(found.dense(int(variant)))

    block.show = show
    for group in groups(block):
        chosen = [name for name in group if name in names]
        if not chosen:
            continue
        twin = original.get_submodule(chosen[0].removeprefix(block.name + "."))
        place = (block.module, block.linears[chosen[0]].module)
        metric, moments = _moments(block, (original, twin), place, show)
        if not torch.isfinite(metric).all():
            raise CompressError(
                f"{chosen[0]}: its inputs on the calibration text are not finite; check the model's weights."
            )
        weight = torch.cat([block.linears[name].weight.float() for name in chosen])
        targets, metrics = dict.fromkeys(widths, weight), dict.fromkeys(widths, _damped(metric, _DAMPING))
        for variant, (moment, drift) in moments.items():
            shift = torch.linalg.solve(_damped(moment, _CORRECTION_DAMPING), drift @ weight.t()).t()
            targets[int(variant)] = (weight + correction * shift).contiguous()
            metrics[int(variant)] = _damped(moment, _DAMPING)
        del moments  # two [K, K] for every variant
        tree = nested_output_codebooks(targets, metrics, focus, weight == 0 if keep_zeros else None)
        rows = 0
        for name in chosen:
            count = block.linears[name].shape[0]
            fitted[name] = _part(tree, slice(rows, rows + count), metric)
            rows += count
    return fitted


def _part(tree: Tree, rows: slice, metric: Tensor) -> Fitted:
    tables = {bits: table[rows].cpu() for bits, table in tree.tables.items()}
    return Fitted(tree.codes[rows].to("cpu", torch.uint8), tables, metric.cpu())
