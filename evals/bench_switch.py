"""What seven widths cost beside one load: ``python -m compress.evals.bench_switch [DIR]``.

One load and a switch to every width, a token after each, against one load alone; and against a load for every width, as
separate checkpoints would need. All in turn in every round; medians, with the quartiles. Without a folder a random Llama
of eight blocks is packed from 2 to 8 bits first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import compress
from compress.evals.bench_cpu import ratios, spread, take_turns
from compress.evals.bench_memory import random_model
from compress.inspect import inspect


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder
        if folder is None:
            random_model(Path(name) / "dense", hidden=512, blocks=8)
            passes = [{"kind": "any_precision", "objective": "weight", "sensitivity": "none", "seed_bits": 2}]
            folder = compress.run({"model": str(Path(name) / "dense"), "passes": passes}, Path(name) / "packed")
        measure(folder, arguments.rounds)


@torch.inference_mode()
def measure(folder: Path, rounds: int) -> None:
    """Print the table for one checkpoint."""
    widths = sorted(map(int, inspect(folder)["bytes_at_bits"]), reverse=True)
    token = torch.zeros(1, 1, dtype=torch.long)

    def one() -> None:
        compress.load(folder, dtype=torch.float32)(input_ids=token)

    def switched() -> None:
        model = compress.load(folder, dtype=torch.float32)
        for bits in widths:
            compress.set_bits(model, bits)
            model(input_ids=token)

    def separate() -> None:
        for bits in widths:
            compress.load(folder, bits=bits, dtype=torch.float32)(input_ids=token)

    times = take_turns({"one": one, "switched": switched, "separate": separate}, rounds)
    table = Table("what", "seconds", "loads")
    names = {"one": "one load, a token", "switched": f"one load, {len(widths)} widths", "separate": "a load per width"}
    for key, words in names.items():
        table.add_row(words, spread(times[key]), f"{1 / ratios(times, key, 'one'):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
