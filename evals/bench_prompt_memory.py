"""Resident memory while a soft prompt is trained: ``python -m compress.evals.bench_prompt_memory`` (Linux).

A random Llama is rounded to 4 bits, and a fresh process takes two training steps on it: packed as it is, with the looked-up weights
kept, and dense in float32. The operating system's own account is read after the imports, after loading, and at the peak.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import compress
from compress.cli.common import write_json
from compress.evals.bench_memory import in_fresh_process, random_model

_CHILD = r"""
import torch, compress
from compress.prompts.stored import new_prompt
from compress.prompts.soft_prompt import SoftPromptConfig
from compress.training import train

found = {"imports": resident("VmRSS")}
model = compress.load(sys.argv[1], dtype=torch.float32, keep_dense=json.loads(sys.argv[2]))
tensors = [*model.parameters(), *model.buffers()]
found["tensors"] = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
found["loaded"] = resident("VmRSS")
samples = [torch.arange(128) * step % 2048 for step in (1, 3, 5)]
prompted = new_prompt(model, "prompt", model.get_input_embeddings()(torch.arange(16)).detach())
config = SoftPromptConfig(steps=2, batch=1, micro_batch=1, validate_every=2, warmup=0)
result = train(prompted, samples, config, 0)
assert result.history[-1]["step"] == 2
print(json.dumps(found | {"peak": resident("VmHWM")}))
"""


def main() -> None:
    """Measure the three and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder / "dense", given.hidden, given.blocks)
        compress.run({"model": str(folder / "dense"), "passes": [{"kind": "rtn", "bits": 4}]}, folder / "packed")
        cases = {
            "4 bits, packed": ("packed", False),
            "4 bits, weights kept": ("packed", True),
            "dense": ("dense", None),
        }
        for label, (place, keep) in cases.items():
            rows.append({"model": label, **in_fresh_process(_CHILD, str(folder / place), json.dumps(keep))})
    table = Table("model", "tensors MB", "imports MB", "loaded MB", "peak above the imports MB")
    for row in rows:
        figures = (row["tensors"], row["imports"], row["loaded"], row["peak"] - row["imports"])
        table.add_row(row["model"], *(f"{figure / 1e6:.0f}" for figure in figures))
    Console().print(table)
    write_json(rows, given.json)


if __name__ == "__main__":
    main()
