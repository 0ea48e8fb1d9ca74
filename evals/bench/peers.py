"""Measure perplexity against bytes of everything: our checkpoints beside llama.cpp's files, hqq and round to nearest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple, Optional

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress.config import read_settings
from compress.errors import CompressError
from compress.evals.agreement import Comparison, predictions
from compress.evals.bench.common import JsonOption, show, write
from compress.evals.evaluate import Protocol, documents_of
from compress.evals.perplexity import Window
from compress.hf import packed_modules
from compress.inspect import inspect
from compress.loading import load_tokenizer
from compress.logits import Predictions
from compress.quant.records import model_bytes, packed_bytes
from compress.structure import inspected, linears_of

_SCALE = 4  # bytes of a group's scale and offset, float16 each


class Row(NamedTuple):
    """Hold what was measured of one candidate; ``bytes`` are those of all tensors, or of the file, ``kl`` is in nats per token."""

    name: str
    bytes: int
    perplexity: float
    kl: float


def rounded(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, float]:
    """Round a weight [N, K] to an even grid per row or per group of columns; return it and its bytes."""
    size = group or weight.shape[1]
    parts = nn.functional.pad(weight.float(), (0, -weight.shape[1] % size)).view(len(weight), -1, size)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    found = ((parts - low) / step).round().clamp(0, 2**bits - 1) * step + low.half().float()
    return found.flatten(1)[:, : weight.shape[1]], weight.numel() * bits / 8 + low.numel() * _SCALE


def hqq_rounded(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Round a weight by hqq's own quantiser, with scales and offsets in float16; return it and its bytes."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(weight.float(), nbits=bits, group_size=group, axis=1, device="cpu")
    scales = meta["scale"].numel() + meta["zero"].numel()
    found: Tensor = Quantizer.dequantize(codes, meta)
    return found.view(weight.shape), weight.numel() * bits / 8 + 2 * scales


def in_blocks(
    dense: PreTrainedModel, quantise: Callable[[Tensor], tuple[Tensor, float]]
) -> tuple[PreTrainedModel, int]:
    """Return a copy whose linears inside the blocks are quantised, and its bytes, everything else in 16 bits."""
    model, structure = deepcopy(dense), inspected(dense)
    size = 2.0 * sum(parameter.numel() for parameter in model.parameters())
    for linear in linears_of(model.get_submodule(structure.blocks), structure.blocks).values():
        found, own = quantise(linear.weight)
        linear.weight.copy_(found)
        size += own - 2 * found.numel()
    return model, math.ceil(size)


def bytes_read(folder: Path, model: PreTrainedModel) -> int:
    """Return the bytes of all tensors that a checkpoint has for a model that was read of it, each matrix at its own bits."""
    shapes, at_bits = read_settings(folder).shapes(), inspect(folder)["bytes_at_bits"]  # type: ignore[union-attr]
    least = min(map(int, at_bits))
    others = at_bits[str(least)] - model_bytes(shapes.values(), least)
    return int(others + sum(packed_bytes(shapes[name], part.bits) for name, part in packed_modules(model).items()))


def candidates(
    model: str,
    ours: list[Path],
    bits: list[int],
    gguf: list[Path],
    groups: list[int],
    dtype: torch.dtype,
    sizes: Sequence[float] = (),
) -> Iterator[tuple[str, Callable[[], tuple[PreTrainedModel, int]]]]:
    """Name what is measured, and how it is made: the model and its bytes."""

    def load() -> PreTrainedModel:
        return compress.load(model, dtype=dtype)

    def own(folder: Path, width: int) -> tuple[PreTrainedModel, int]:
        return compress.load(folder, bits=width, dtype=dtype), inspect(folder)["bytes_at_bits"][str(width)]

    def mixed(folder: Path, size: float) -> tuple[PreTrainedModel, int]:
        found = compress.load(folder, memory=round(size * 1e6), dtype=dtype)
        return found, bytes_read(folder, found)

    def file(path: Path) -> tuple[PreTrainedModel, int]:
        found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        return found, path.stat().st_size

    yield "dense", lambda: in_blocks(load(), lambda weight: (weight, 2.0 * weight.numel()))
    for folder in ours:
        for width in [width for width in bits if str(width) in inspect(folder)["bytes_at_bits"]]:
            yield f"{folder.name}, {width} bits", lambda folder=folder, width=width: own(folder, width)  # type: ignore[misc]
        for size in sizes:
            yield f"{folder.name}, at most {size:g} MB", lambda folder=folder, size=size: mixed(folder, size)  # type: ignore[misc]
    for path in gguf:
        yield f"llama.cpp {path.stem}", lambda path=path: file(path)  # type: ignore[misc]
    for width in bits:
        for group in groups:
            what = f"in groups of {group}" if group else "per row"
            yield (
                f"round to nearest {what}, {width} bits",
                lambda width=width, group=group: in_blocks(load(), lambda w: rounded(w, width, group or None)),  # type: ignore[misc]
            )
        if find_spec("hqq") and width in (2, 3, 4, 8):
            yield (
                f"hqq in groups of 64, {width} bits",
                lambda width=width: in_blocks(load(), lambda w: hqq_rounded(w, width, 64)),  # type: ignore[misc]
            )


@torch.no_grad()
def measured(
    made: Iterator[tuple[str, Callable[[], tuple[PreTrainedModel, int]]]], windows: Sequence[Window]
) -> Iterator[Row]:
    """Measure candidates on some windows, perplexity and divergence from the first of them, which is the dense model."""
    truths: list[Predictions] = []
    for name, make in made:
        network, size = make()
        found = Comparison()
        truths = truths or [predictions(network, window) for window in windows]
        for window, truth in zip(windows, truths, strict=True):
            found.add_window(truth, predictions(network, window), window)
        tokens = sum(window.scored for window in windows)
        loss = found.loss / tokens
        yield Row(name, size, math.exp(loss) if loss < 700 else math.inf, found.kl / tokens)


def main(
    model: Annotated[str, typer.Argument(help="The dense model.")],
    text: Annotated[str, typer.Argument(help="Text file, or JSON lines of documents.")],
    ours: Annotated[Optional[list[Path]], typer.Option(help="A checkpoint made of it; may be repeated.")] = None,
    gguf: Annotated[Optional[list[Path]], typer.Option(help="A llama.cpp file of it; may be repeated.")] = None,
    bits: Annotated[str, typer.Option(help="Of ours, and of what is rounded here.")] = "2,3,4,5,6,8",
    memory: Annotated[
        str, typer.Option(help="Megabytes for which ours are read too, each matrix at bits chosen for it.")
    ] = "",
    groups: Annotated[
        str, typer.Option(help="Columns that share a scale in round to nearest; 0: a row; empty: leave it out.")
    ] = "0,32",
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    disjoint: Annotated[
        bool, typer.Option("--disjoint/--overlap", help="Windows side by side, or overlapping by half and behind BOS.")
    ] = True,
    windows: Annotated[int, typer.Option(help="How many, spread evenly over the text; 0 for all.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    target: JsonOption = None,
) -> None:
    """Measure all candidates by one instrument, smallest first."""
    if gguf and find_spec("gguf") is None:
        raise CompressError("--gguf: reading GGUF files needs gguf: pip install 'compress-llm[gguf]'.")
    documents, _ = documents_of(text, Protocol(join="\n\n"))
    cut = Protocol(length=length, disjoint=disjoint).cut(documents, load_tokenizer(model))
    every = max(1, len(cut.windows) // windows) if windows else 1
    chosen, rows = cut.windows[::every][: windows or None], list[Row]()
    given, sizes = [int(one) for one in groups.split(",") if one], [float(one) for one in memory.split(",") if one]
    widths, kind = [int(one) for one in bits.split(",") if one], getattr(torch, dtype)
    for row in measured(candidates(model, ours or [], widths, gguf or [], given, kind, sizes), chosen):
        rows.append(row)
        print(f"{row.name}: {row.bytes / 1e6:.1f} MB, {row.perplexity:.4f}, divergence {row.kl:.5f}", flush=True)
    dense = rows[0].perplexity
    rows.sort(key=lambda row: row.bytes)
    shown = [
        [r.name, f"{r.bytes / 1e6:.1f}", f"{r.perplexity:.3f}", f"{r.perplexity / dense - 1:+.2%}", f"{r.kl:.4f}"]
        for r in rows
    ]
    titles = ["", "MB", "perplexity", "above dense", "divergence, nats"]
    show("bytes of everything, perplexity, and divergence from the dense model", titles, shown)
    write({"model": model, "text": text, "windows": len(chosen), "rows": [row._asdict() for row in rows]}, target)
