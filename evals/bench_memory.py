"""Peak memory of a run against the size of the model: ``python -m compress.evals.bench_memory`` (Linux).

A random Llama of 24 blocks is written to a temporary folder and compressed by a process of its own; the peak of
its resident memory (VmHWM) is read from the operating system and set beside the dense weights and the plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from compress.pipeline import model_folder
from compress.plan import plan

_CHILD = r"""
import json, re, sys, time
import compress, compress.pipeline, compress.quant.any_precision

def resident(key):
    return 1024 * int(re.search(key + r":\s+(\d+)", open("/proc/self/status").read())[1])

start, begun = resident("VmRSS"), time.perf_counter()
compress.run(json.loads(sys.argv[1]), sys.argv[2])
print(json.dumps({"start": start, "peak": resident("VmHWM"), "seconds": time.perf_counter() - begun}))
"""


def random_model(folder: Path, hidden: int, blocks: int) -> None:
    """Write a random bfloat16 Llama with the built-in model's tokenizer."""
    import shutil

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    for path in model_folder("builtin").glob("tokenizer*"):
        shutil.copy(path, folder / path.name)


def measure(recipe: dict[str, Any], output: Path) -> dict[str, float]:
    """Run a recipe in a fresh process; bytes resident after the imports and at the peak, and seconds."""
    process = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(recipe), str(output)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(process.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Measure the three sensitivities and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder / "dense", arguments.hidden, arguments.blocks)
        for sensitivity in ("none", "activation", "fisher"):
            recipe: dict[str, Any] = {
                "model": str(folder / "dense"),
                "calibration": {"builtin": "stdlib", "samples": 8, "length": 256},
                "passes": [{"kind": "any_precision", "objective": "weight", "sensitivity": sensitivity}],
            }
            foreseen = plan(recipe)
            found = measure(recipe, folder / sensitivity)
            rows.append(
                {
                    "sensitivity": sensitivity,
                    "dense_bytes": foreseen["dense_bytes"],
                    "float32_bytes": foreseen["dense_bytes"] * 2,
                    "peak_above_start_bytes": found["peak"] - found["start"],
                    "planned_bytes": foreseen["passes"][0]["memory_bytes"],
                    "start_bytes": found["start"],
                    "seconds": found["seconds"],
                }
            )
    table = Table("sensitivity", "dense bf16 MB", "as float32 MB", "peak above start MB", "planned MB", "start MB", "s")
    for row in rows:
        keys = ("dense_bytes", "float32_bytes", "peak_above_start_bytes", "planned_bytes", "start_bytes")
        table.add_row(row["sensitivity"], *(f"{row[key] / 1e6:.0f}" for key in keys), f"{row['seconds']:.0f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
