"""The sweep over one block for codes that minimise the error of each layer's output.

Linears are done in the order in which the block calls them. At every number of bits up to 5, each sees its inputs in two runs: as
the original model makes them (``x``) and as the model does whose earlier matrices have that number of bits already (``x'``). What
the quantised rows should do to ``x'`` is what the dense ones did to ``x``: that is ``W`` plus the least-squares correction
``W E[(x - x') x'^T] E[x' x'^T]^-1`` (GPTAQ's asymmetric target, arXiv 2504.02692). A share of it is aimed at.
Above 5 bits the two runs are taken for the same: measured, the correction's own error is larger there than what it corrects.
All numbers of bits share one Hessian, the mean of ``x x^T`` of inputs that are evened (:func:`compress.statistics.evened`): measured,
one of ``x'`` for each is not better.

All samples go through the original block once, which gives all its Hessians; only the first :data:`CORRECTING` tokens of each
go through the changed ones, since a correction needs fewer tokens than a Hessian, and different texts more than long ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from compress.passes import Block
from compress.precision import multiplies_bfloat16
from compress.quant.feedback import LARGE
from compress.quant.format import Codes
from compress.quant.mixture import fit_experts
from compress.quant.nested import nested_output_codebooks, row_parts
from compress.quant.replay import Replay
from compress.quant.settings import AnyPrecisionConfig
from compress.quant.shared_search import shared_output_codebooks
from compress.ranks import ALONE, Ranks, Sums, even_parts
from compress.statistics import Moments, add_products, evened, no_products, unfolded

CORRECTING = 256  # tokens of every sample that corrections are measured on
_DAMPING = 2e-2  # share of the Hessian's mean diagonal that is added to it
_CORRECTION_DAMPING = 1e-2
_SEARCH = 90  # bytes per weight of the rows that are searched at a time
_FAST_FROM = 512  # columns: below, products in bfloat16 gain nothing


class Originals:
    """Hold what one pass of all samples through the original block shows of some of its linears, by full name.

    Attributes:
        moments: the Hessian of every distinct input.
        groups: linears that are called with the same tensor, in the order of their calls.
    """

    def __init__(self, block: Block, modules: Mapping[str, nn.Module]) -> None:
        correcting = CORRECTING if block.variants else 0
        self.moments, self.groups = Moments(full=True, ranks=block.ranks, even=True), dict[str, list[str]]()
        self._inputs: dict[str, dict[int, Tensor]] = {}
        self._count = len(block.samples)

        def visit(name: str, x: Tensor) -> None:
            owner = self.moments.add(name, x)
            kept, sample = self._inputs.setdefault(name, {}), len(block.outputs[""])
            if owner == name and correcting and sample not in kept:
                kept[sample] = x[:correcting].to(_product_dtype(x), copy=True)

        block.for_each_input(visit, modules, keep_outputs=True, end_lot=self.moments.end_lot)
        for name, owner in self.moments.owner.items():
            self.groups.setdefault(owner, []).append(name)

    def take_inputs(self, owner: str) -> list[Tensor | None]:
        """Return what a group is given first in every sample, [T, K] of its first tokens, and let it go; None where it is not called."""
        found = self._inputs.pop(owner, {})
        return [found.get(sample) for sample in range(self._count)]


def _product_dtype(x: Tensor) -> torch.dtype:
    fast = x.shape[-1] >= _FAST_FROM and multiplies_bfloat16(x.device)
    return torch.bfloat16 if fast else torch.float32


def _damp(hessian: Tensor, share: float) -> None:
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(share * torch.where(mean > 0, mean, 1.0))


@torch.no_grad()
def correction(
    pairs: Iterable[tuple[Tensor | None, Tensor | None]], weight: Tensor, lots: Sequence[int] = (), ranks: Ranks = ALONE
) -> Tensor:
    """Return the change [N, K] of rows that lets them do to ``x'`` what they do to ``x``, nearest by least squares.

    ``pairs`` are ``x`` and ``x'`` of every sample, [T, K], in ``lots`` of so many; one that another number of tokens came to
    tells nothing.
    """
    sums, left = Sums(ranks), iter(pairs)
    for count in lots or (None,):
        hessian, drift = no_products(weight), weight.new_zeros(weight.shape[1], weight.shape[1])
        for x, shown in islice(left, count):
            if x is None or shown is None or shown.shape != x.shape:
                continue
            x, shown = (evened(inputs.float(), like=x.float()) for inputs in (x, shown))
            add_products(hessian, shown)
            dtype = _product_dtype(x)
            drift += shown.to(dtype).t() @ (x - shown).to(dtype)
        sums.add("hessian", hessian)
        sums.add("drift", drift)
        sums.end_lot()
    hessian = unfolded(sums.total.pop("hessian"))
    drift = sums.total.pop("drift")
    _damp(hessian, _CORRECTION_DAMPING)
    factor = torch.linalg.cholesky(hessian)

    def solved(rows: slice) -> dict[str, Tensor]:
        return {"change": torch.cholesky_solve(drift @ weight[rows].t(), factor).t()}

    return torch.cat([part["change"] for part in ranks.over(even_parts(len(weight), len(weight)), solved)])


def fitting_bytes(shapes: Collection[tuple[int, int]], variants: int, tokens: int, length: int) -> int:
    """Estimate the bytes that fitting takes, but for the Hessians of the block, where those linears (N, K) are fitted that take most.

    ``shapes`` are those of one block's linears; ``tokens`` go through the variants, of samples of ``length`` tokens.
    """

    def fitted(columns: int) -> int:
        """Count what linears of so many columns take; they may share an input."""
        rows = [rows for rows, other in shapes if other == columns]
        matrices = (3 if columns > LARGE else 4) * columns  # for the correction, or factors of the Hessian
        targets = (variants + 1) * (sum(rows) + max(rows))  # of one matrix also divided by the columns' factors
        parts = row_parts(sum(rows), torch.device("cpu"))
        searched: int = min(len(parts), torch.get_num_threads()) * max(part.stop - part.start for part in parts)
        return (4 * (matrices + targets + 4 * length) + _SEARCH * searched) * columns

    # What the linears are given on those tokens, and make of them in every variant, in two bytes.
    widths = {columns for _, columns in shapes}
    kept = tokens * (sum(widths) + variants * sum(rows for rows, _ in shapes))
    return 2 * kept + max(map(fitted, widths))


@torch.no_grad()
def fit_block(block: Block, names: Sequence[str], config: AnyPrecisionConfig) -> dict[str, Codes]:
    """Quantise the named linears of a block; ``block.show`` then loads their weights at a variant's number of bits.

    The block has original inputs, and those of a variant for every number of bits up to :data:`CARRIED`.

    Raises:
        CompressError: inputs that are not finite.
    """
    fitted = fit_experts(block, names, config)
    linears = block.linears  # not the block, which would then be kept by what it keeps

    def show(variant: str) -> None:
        for name, found in fitted.items():
            linears[name].weight.copy_(found.dense(int(variant)))

    block.show = show
    inner = {name: name.removeprefix(f"{block.name}.") for name in linears if name not in fitted}
    originals = Originals(block, {name: linears[name].module for name in inner})
    replays = {variant: Replay(block.module, runs, inner.values()) for variant, runs in block.variants.items()}
    for owner, group in originals.groups.items():
        inputs, chosen = originals.take_inputs(owner), [name for name in group if name in names]
        if chosen:
            weight = torch.cat([linears[name].weight.float() for name in chosen])
            targets = dict.fromkeys(range(config.seed_bits, config.parent_bits + 1), weight)
            for variant, replay in replays.items():
                show(variant)
                pairs = zip(inputs, replay.inputs(inner[chosen[0]]), strict=True)
                shift = correction(pairs, weight, block.lots, block.ranks)
                targets[int(variant)] = (weight + config.correction * shift).contiguous()
            fitted |= _fit_group(block, chosen, targets, originals.moments.take(owner), config)
        for replay in replays.values():
            replay.finish([inner[name] for name in group])
    for variant, replay in replays.items():
        show(variant)
        block.outputs[variant] = list(replay.outputs())
    return fitted


def _fit_group(
    block: Block, names: Sequence[str], targets: dict[int, Tensor], hessian: Tensor, config: AnyPrecisionConfig
) -> dict[str, Codes]:
    """Quantise linears that share their input; ``targets`` are theirs, one below the other."""
    measured = hessian.diagonal().clone()
    _damp(hessian, _DAMPING)
    dense = torch.cat([block.linears[name].weight for name in names]) if config.keep_zeros else None
    sizes = [block.linears[name].shape[0] for name in names]
    found = _codes(targets, hessian, config, None if dense is None else dense == 0, sizes, block.ranks)
    hessian.diagonal().copy_(measured)
    hessian = hessian.cpu()
    return {name: replace(codes, hessian=hessian) for name, codes in zip(names, found, strict=True)}


def _codes(
    targets: Mapping[int, Tensor],
    hessian: Tensor,
    config: AnyPrecisionConfig,
    zeros: Tensor | None,
    sizes: Sequence[int],
    ranks: Ranks,
) -> list[Codes]:
    """Quantise matrices of one input, so many rows of the targets each; return what was found, on the CPU."""
    if config.shares(len(hessian)):
        every = shared_output_codebooks(targets, hessian, config.focus, sizes, ranks)
        return [found.to("cpu") for found in every]
    codes = nested_output_codebooks(targets, hessian, config.focus, zeros, ranks)
    codebooks = [torch.split(codebook.cpu(), list(sizes)) for codebook in codes.codebooks.values()]
    of_each = zip(torch.split(codes.codes.cpu(), list(sizes)), *codebooks, strict=True)
    return [Codes(rows, dict(zip(codes.codebooks, of_rows, strict=True))) for rows, *of_rows in of_each]
