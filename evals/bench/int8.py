"""Measure what rounding to 8 bits costs in loss."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor, nn

import compress
from compress.evals.bench.common import JsonOption, show, write
from compress.evals.evaluate import Protocol, bits_to_measure, documents_of
from compress.evals.perplexity import context_length, prepare, score
from compress.hf import packed_modules
from compress.kernels.cpu import FUSED_ROWS, Prepared
from compress.kernels.layout import rounded
from compress.loading import load_tokenizer
from compress.quant.linear import BitPlaneLinear

MODES = {"exact": (False, Tensor.float), "int8": (True, Tensor.float), "entries": (False, rounded)}


def in_pieces(prepared: Prepared, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Compute a layer's output again, a few rows at a time (a forward hook)."""
    x = inputs[0].reshape(-1, prepared.columns)
    y = torch.cat([prepared(rows) for rows in torch.split(x, FUSED_ROWS)]).view_as(output)
    bias = getattr(module, "bias", None)
    return y if bias is None else y + bias


def main(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint.")],
    text: Annotated[str, typer.Option(help="Text file, or 'builtin'.")],
    separator: Annotated[Optional[str], typer.Option(help="Divides the text into documents.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Documents to score.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    json_file: JsonOption = None,
) -> None:
    """Measure what rounding to 8 bits costs in loss, in nats per predicted token, at every number of bits.

    Every packed layer is computed sixteen rows at a time, as in decoding: exactly; with the C library's int8 mode, which rounds
    activations and codebook entries; and with entries rounded as the GPU kernels can have them (they do at 4 bits alone).
    """
    model: Any = compress.load(folder, dtype=torch.float32)
    documents, _ = documents_of(text, Protocol(separator, limit, 100))
    scored = prepare(documents, load_tokenizer(folder), min(length, context_length(model)), truncate=True)
    layers = [layer for layer in packed_modules(model).values() if isinstance(layer, BitPlaneLinear)]
    losses: dict[str, dict[str, float]] = {}
    for bits in bits_to_measure(model, None):
        assert bits is not None
        compress.set_bits(model, int(bits))
        losses[str(bits)] = {}
        for mode, (int8, entries_of) in MODES.items():
            hooks = []
            for layer in layers:
                table, scales = entries_of(layer.codebook()), (None, layer.factors, layer.row_factors)
                prepared = Prepared(layer.planes(), table, layer.in_features, int8, *scales)
                hooks.append(layer.register_forward_hook(partial(in_pieces, prepared)))
            losses[str(bits)][mode] = score(model, scored).loss
            for hook in hooks:
                hook.remove()
    rows = []
    for label, found in losses.items():
        changes = [f"{found[mode]:.5f} ({found[mode] / found['exact'] - 1:+.3%})" for mode in ("int8", "entries")]
        rows.append((label, f"{found['exact']:.5f}", *changes))
    show("loss, nats per token", ["bits", "exact", "int8", "rounded entries"], rows)
    write(losses, json_file)
