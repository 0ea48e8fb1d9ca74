"""Measure a mixture of experts at every number of bits beside controls, and what bits of their own are worth to its experts.

    python -m compress.evals.experiments.train_builtin moe --shape mixture
    python -m compress.evals.bench mixture moe ours          # ours: any_precision of it, seed 2, parent 8

Controls are made here, of the dense model: rounding to nearest, and GPTQ's sweep (Frantar et al. 2023, arXiv 2210.17323) with
every expert's own tokens, each per row and in groups of columns whose scale and offset take four bytes. Bits of their own are
compared at equal bytes with bits by the same errors that all experts of a layer share, and with the same bits dealt to other
experts of their layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, Optional

import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedModel

import compress
from compress.budget import choose_bits
from compress.calibration import draw_samples
from compress.config import read_settings
from compress.errors import CompressError
from compress.evals.bench.common import JsonOption, show, write
from compress.evals.bench.peers import rounded
from compress.evals.evaluate import BUILTIN, Protocol, documents_of
from compress.evals.perplexity import score
from compress.experts import split as split_module
from compress.inspect import inspect
from compress.loading import load_tokenizer
from compress.manifest import noted, read_manifest
from compress.quant.records import PackedShape, packed_bytes, unstacked
from compress.settings import Calibration
from compress.structure import inspected, linears_of

_DAMPING = 0.01  # share of the Hessian's mean diagonal that is added to it, as in GPTQ
_SCALE = 4  # bytes of a group's scale and offset, float16 each


class Row(NamedTuple):
    """Hold what was measured of one candidate; ``bytes`` are those of all tensors at its bits."""

    name: str
    bits: float
    bytes: int
    bits_per_byte: float


def split(model: PreTrainedModel) -> PreTrainedModel:
    """Put linears, with their weights, where a dense model has stacks of experts."""
    for path, module in list(model.named_modules()):
        stacks = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        if experts := split_module(module):
            for place in range(experts.num_experts):
                for name in experts.matrices:
                    weight = stacks[name][place].t() if experts.transposed else stacks[name][place]
                    values = {"weight": weight, **({"bias": stacks[f"{name}_bias"][place]} if experts.biased else {})}
                    experts.expert(place).get_submodule(name).load_state_dict(values, assign=True)
            model.set_submodule(path, experts)
    return model


def hessians(model: PreTrainedModel, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sum the products of every linear's inputs over the tokens that come to it: name -> float32 [K, K]."""
    structure, found = inspected(model), dict[str, Tensor]()

    def take(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        found[name] = found.get(name, 0) + x.t() @ x

    linears = linears_of(model.get_submodule(structure.blocks), structure.blocks)
    handles = [one.module.register_forward_pre_hook(partial(take, name)) for name, one in linears.items()]
    for tokens in samples:
        model(tokens[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def gptq(
    measured: Mapping[str, Tensor], name: str, weight: Tensor, bits: int, group: int | None
) -> tuple[Tensor, float]:
    """Round a weight [N, K] column by column, the later ones making up for the errors; return it and its bytes.

    An expert that no token came to is rounded to nearest. The grid of a group lies between the smallest and the largest weight of its columns as they are when their turn comes.
    """
    found, size = weight.float().clone(), group or weight.shape[1]
    hessian = measured.get(name, torch.eye(weight.shape[1]))
    damped = hessian + _DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    top, count = 2**bits - 1, math.ceil(weight.shape[1] / size)
    for column in range(weight.shape[1]):
        if column % size == 0:
            part = found[:, column : column + size]
            low, high = part.amin(1), part.amax(1)
            step = ((high - low) / top).half().float().clamp_min(1e-7)
            low = low.half().float()
        now = found[:, column]
        value = ((now - low) / step).round().clamp(0, top) * step + low
        error = (now - value) / factor[column, column]
        found[:, column] = value
        found[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return found, weight.numel() * bits / 8 + len(weight) * count * _SCALE


def with_rounded(
    dense: PreTrainedModel, quantise: Callable[[str, Tensor], tuple[Tensor, float]]
) -> tuple[PreTrainedModel, int]:
    """Return a copy whose linears inside the blocks, experts among them, are rounded, and its bytes, the rest in 16 bits."""
    model, structure = deepcopy(dense), inspected(dense)
    size = 2.0 * sum(parameter.numel() for parameter in model.parameters())
    for name, linear in linears_of(model.get_submodule(structure.blocks), structure.blocks).items():
        found, own = quantise(name, linear.weight)
        linear.weight.copy_(found)
        size += own - 2 * found.numel()
    return model, math.ceil(size)


def layer_of(name: str) -> str:
    """Return what all experts of a layer have in common: an expert's name without its number."""
    path, _, matrix = name.rpartition(".")
    return f"{path.rpartition('.')[0]}.*.{matrix}" if path.rpartition(".")[2].isdigit() else name


def shared_bits(folder: Path, shapes: Mapping[str, PackedShape], mean: float) -> dict[str, int]:
    """Choose bits as ``compress.load`` does for a mean, but the same for all experts of a layer."""
    errors = dict(noted(read_manifest(folder) or {}, "errors"))
    together: dict[str, list[str]] = {}
    for name in shapes:
        together.setdefault(layer_of(name), []).append(name)

    def option(names: list[str], bits: int) -> tuple[int, float]:
        weighted = sum(errors[name][str(bits)]["weighted"] for name in names)
        return sum(packed_bytes(shapes[name], bits) for name in names), weighted

    options = [{bits: option(names, bits) for bits in shapes[names[0]].all_bits} for names in together.values()]
    below, above = (sum(one[f(mean)][0] for one in options) for f in (math.floor, math.ceil))
    budget = round(below + (mean - math.floor(mean)) * (above - below))
    picks = zip(together.values(), choose_bits(options, budget), strict=True)
    return {name: bits for names, bits in picks for name in names}


def dealt(bits: Mapping[str, int], seed: int) -> dict[str, int]:
    """Deal the bits of every layer's experts to the same experts in a random order."""
    together: dict[str, list[str]] = {}
    for name in bits:
        together.setdefault(layer_of(name), []).append(name)
    draw, found = random.Random(seed), dict[str, int]()
    for names in together.values():
        values = [bits[name] for name in names]
        draw.shuffle(values)
        found |= zip(names, values, strict=True)
    return found


def own_bits(folder: Path, means: Sequence[float]) -> Iterator[tuple[str, float, PreTrainedModel, int]]:
    """Load a checkpoint at every mean: bits by expert, by layer, and by expert at random."""
    settings = read_settings(folder)
    if settings is None:
        raise CompressError(f"{folder}: is no compressed checkpoint; give one that any_precision has made.")
    shapes = unstacked(settings.shapes())
    others = inspect(folder)["bytes_at_bits"]
    lowest = min(map(int, others))
    dense = others[str(lowest)] - sum(packed_bytes(shape, lowest) for shape in shapes.values())
    for mean in means:
        chosen = compress.load(folder, bits=str(mean), dtype=torch.float32)
        bits = compress.get_bits(chosen)
        by_expert = dict.fromkeys(shapes, bits) if isinstance(bits, int) else bits
        ways = {"bits by expert": by_expert, "bits by layer": shared_bits(folder, shapes, mean)}
        ways |= {f"bits by expert, dealt at random ({seed})": dealt(by_expert, seed) for seed in range(3)}
        for name, picked in ways.items():
            size = dense + sum(packed_bytes(shapes[one], picked[one]) for one in shapes)
            yield name, mean, compress.load(folder, bits=picked, dtype=torch.float32), size


@torch.no_grad()
def main(
    model: Annotated[str, typer.Argument(help="The dense mixture of experts.")],
    ours: Annotated[Path, typer.Argument(help="A checkpoint that any_precision made of it.")],
    text: Annotated[str, typer.Option(help="Text file to measure on, or 'builtin'.")] = BUILTIN,
    calibration: Annotated[Optional[str], typer.Option(help="Text file for GPTQ; the library's own if absent.")] = None,
    samples: Annotated[int, typer.Option(help="Of calibration.")] = 100,
    length: Annotated[int, typer.Option(help="Tokens of a sample, and of a window of the text.")] = 512,
    bits: Annotated[str, typer.Option(help="Whole numbers of bits.")] = "8,7,6,5,4,3,2",
    means: Annotated[str, typer.Option(help="Means at which experts have bits of their own.")] = "4.5,3.5,2.5",
    groups: Annotated[str, typer.Option(help="Columns that share a scale in the controls; 0: a row.")] = "0,64",
    target: JsonOption = None,
) -> None:
    """Measure all candidates by one instrument."""
    tokenizer = load_tokenizer(model)
    cut = Protocol(length=length, disjoint=True).cut(documents_of(text, Protocol())[0], tokenizer)
    source = {"text": calibration} if calibration else {"builtin": "stdlib"}
    wanted = Calibration.model_validate({**source, "samples": samples, "length": length})
    dense = split(compress.load(model, dtype=torch.float32))
    measured = hessians(dense, draw_samples(wanted, tokenizer, None).tokens)
    rows: list[Row] = []

    def measure(name: str, width: float, network: PreTrainedModel, size: int) -> None:
        rows.append(Row(name, width, size, score(network, cut).bits_per_byte))
        print(f"{name}, {width:g} bits: {size / 1e6:.3f} MB, {rows[-1].bits_per_byte:.4f}", flush=True)

    measure("dense", 16, *with_rounded(dense, lambda _, weight: (weight, 2.0 * weight.numel())))
    for width in map(int, bits.split(",")):
        size = inspect(ours)["bytes_at_bits"][str(width)]
        measure("any-precision", width, compress.load(ours, bits=width, dtype=torch.float32), size)
        for group in map(int, groups.split(",")):
            what = f"in groups of {group}" if group else "per row"
            nearest = partial(rounded, bits=width, group=group or None)
            measure(f"round to nearest {what}", width, *with_rounded(dense, lambda _, w, how=nearest: how(w)))  # type: ignore[misc]
            swept = partial(gptq, measured, bits=width, group=group or None)
            measure(f"GPTQ {what}", width, *with_rounded(dense, swept))
    for found in own_bits(ours, [float(mean) for mean in means.split(",")]):
        measure(*found)
    shown = [[row.name, f"{row.bits:g}", f"{row.bytes / 1e6:.3f}", f"{row.bits_per_byte:.4f}"] for row in rows]
    show("a mixture of experts", ["", "bits", "MB", "bits per byte"], shown)
    write({"model": model, "windows": len(cut.windows), "rows": [row._asdict() for row in rows]}, target)
