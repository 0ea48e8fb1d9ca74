"""How good the built-in model is: ``python -m compress.demo.baselines``.

Bits per byte of the held-out modules by the trained model, by the same network untrained, and by ``xz -9e`` on the
same files in one stream.
"""

from __future__ import annotations

import lzma

import torch
from rich.console import Console
from rich.table import Table

from compress.demo.train import builtin_model
from compress.evals.perplexity import prepare, score
from compress.loading import load, load_tokenizer
from compress.source import model_folder
from compress.texts import HELDOUT, read_modules


def main() -> None:
    """Measure all three and print them."""
    texts = list(read_modules(HELDOUT).values())
    data = "".join(texts).encode()
    folder = str(model_folder("builtin"))
    prepared = prepare(texts, load_tokenizer(folder), 512)
    torch.manual_seed(0)
    table = Table("what", "bits per byte of held-out modules")
    table.add_row("the built-in model", f"{score(load(folder, dtype=torch.float32), prepared).bits_per_byte:.4f}")
    table.add_row("xz -9e", f"{8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data):.4f}")
    untrained = builtin_model().train(False)
    table.add_row("the same network untrained", f"{score(untrained, prepared).bits_per_byte:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
