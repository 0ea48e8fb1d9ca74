"""What rounding to 8 bits costs in loss: ``python -m compress.evals.bench_int8 DIR --text FILE``.

Every packed layer is computed sixteen rows at a time, as in decoding: exactly; with the C library's int8 mode, which rounds
activations and table entries; and with entries rounded as the GPU kernels can have them (they do at width 4 alone). The
text is scored at every width. Losses are in nats per predicted token.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import compress
from compress.evals.evaluate import Protocol, documents_of, widths_to_measure
from compress.evals.perplexity import context_length, prepare, score
from compress.hf import packed_modules
from compress.kernels.cpu import FUSED_ROWS, Prepared
from compress.kernels.layout import rounded
from compress.loading import load_tokenizer
from compress.quant.linear import BitPlaneLinear


def in_pieces(prepared: Prepared, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook: the layer's output again, a few rows at a time."""
    x = inputs[0].reshape(-1, prepared.columns)
    y = torch.cat([prepared(rows) for rows in torch.split(x, FUSED_ROWS)]).view_as(output)
    bias = getattr(module, "bias", None)
    return y if bias is None else y + bias


def main() -> None:
    """Score in both modes at every width and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--text", required=True, help="text file, or 'builtin'")
    parser.add_argument("--separator")
    parser.add_argument("--limit", type=int, help="documents to score")
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    model: Any = compress.load(arguments.folder, dtype=torch.float32)
    tokenizer = load_tokenizer(arguments.folder)
    documents, _ = documents_of(arguments.text, Protocol(arguments.separator, arguments.limit, 100))
    text = prepare(documents, tokenizer, min(arguments.length, context_length(model)), truncate=True)
    table = Table("bits", "loss, exact", "loss, int8", "of the loss", "loss, entries", "of the loss")
    layers = {name: layer for name, layer in packed_modules(model).items() if isinstance(layer, BitPlaneLinear)}
    for bits in widths_to_measure(model, None):
        assert bits is not None
        compress.set_bits(model, int(bits))
        losses = []
        for int8, table_of in ((False, Tensor.float), (True, Tensor.float), (False, rounded)):
            hooks = [
                layer.register_forward_hook(
                    partial(in_pieces, Prepared(layer.planes(), table_of(layer.codebook()), layer.in_features, int8))
                )
                for layer in layers.values()
            ]
            losses.append(score(model, text).loss)
            for hook in hooks:
                hook.remove()
        exact, *others = losses
        cells = [cell for loss in others for cell in (f"{loss:.5f}", f"{loss / exact - 1:+.3%}")]
        table.add_row(str(bits), f"{exact:.5f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
