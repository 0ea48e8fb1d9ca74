"""Peak memory of a run against the size of the model: ``python -m compress.evals.bench_memory`` (Linux).

A random Llama of 24 blocks is written to a temporary folder and compressed by a process of its own; the peak of
its resident memory (VmHWM) is read from the operating system and set beside the dense weights and the plan. That process
hands every freed tensor back at once, so that the peak is what was in use; left to itself, the C library keeps freed
tensors below 32 MB, and the peak of a small model's run is up to twice this and another one each time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from compress.cli.common import write_json
from compress.plan import plan
from compress.source import model_folder

_RESIDENT = r"""
import json, re, sys, time

def resident(key):
    return 1024 * int(re.search(key + r":\s+(\d+)", open("/proc/self/status").read())[1])
"""
_CHILD = r"""
import compress, compress.pipeline, compress.quant.any_precision

start, begun = resident("VmRSS"), time.perf_counter()
compress.run(json.loads(sys.argv[1]), sys.argv[2])
print(json.dumps({"start": start, "peak": resident("VmHWM"), "seconds": time.perf_counter() - begun}))
"""


CALIBRATION: dict[str, Any] = {"builtin": "stdlib", "samples": 8, "length": 256}


def random_model(folder: Path, hidden: int, blocks: int) -> None:
    """Write a random bfloat16 Llama with the built-in model's tokenizer."""
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
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for path in model_folder("builtin").glob("tokenizer*"):
        shutil.copy(path, folder / path.name)


def in_fresh_process(code: str, *arguments: str) -> dict[str, float]:
    """What a script prints as JSON; ``resident("VmRSS")`` and ``resident("VmHWM")`` are there for it, in bytes."""
    command = [sys.executable, "-c", _RESIDENT + code, *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # glibc's first value, which setting it fixes
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(process.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def beside_plan(recipe: dict[str, Any], output: Path) -> dict[str, float]:
    """Run a recipe of one pass in a fresh process.

    Returns:
        Bytes: ``float32``, of the dense weights; ``planned``; ``start``, resident after the imports; ``peak``, above that.
        And ``seconds``.
    """
    foreseen = plan(recipe)
    found = in_fresh_process(_CHILD, json.dumps(recipe), str(output))
    return {
        "float32": 4.0 * foreseen["parameters"], "planned": foreseen["passes"][0]["memory_bytes"], "start": found["start"],
        "peak": found["peak"] - found["start"], "seconds": found["seconds"],
    }  # fmt: skip


def memory_table(rows: Sequence[Mapping[str, Any]], *names: str) -> Table:
    """Rows of :func:`beside_plan` behind what they are called by."""
    table = Table(*names, "as float32 MB", "peak above start MB", "planned MB", "start MB", "s")
    for row in rows:
        sizes = (f"{row[key] / 1e6:.0f}" for key in ("float32", "peak", "planned", "start"))
        table.add_row(*(str(row[name]) for name in names), *sizes, f"{row['seconds']:.0f}")
    return table


def main() -> None:
    """Measure both objectives and all sensitivities, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    cases = ("weight", "none"), ("weight", "activation"), ("weight", "fisher"), ("output", "fisher")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder / "dense", arguments.hidden, arguments.blocks)
        for objective, sensitivity in cases:
            step = {"kind": "any_precision", "objective": objective, "sensitivity": sensitivity}
            recipe = {"model": str(folder / "dense"), "calibration": CALIBRATION, "passes": [step]}
            found = beside_plan(recipe, folder / objective / sensitivity)
            rows.append({"objective": objective, "sensitivity": sensitivity, **found})
    Console().print(memory_table(rows, "objective", "sensitivity"))
    write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
