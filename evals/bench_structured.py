"""Peak memory of scoring, and speed and size of what is left: ``python -m compress.evals.bench_structured`` (Linux).

A random Llama is pruned by every score in a process of its own (half precision on disk, computed in float32); the peak of its resident
memory (VmHWM) above the imports stands beside the plan and that of one forward pass. Then one model is pruned to several sizes, and all generate in turn.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import compress
from compress.cli.common import write_json
from compress.evals.bench_memory import CALIBRATION, beside_plan, in_fresh_process, memory_table, random_model
from compress.source import model_folder
from compress.weights import Checkpoint

SCORES: dict[str, dict[str, Any]] = {
    "output error (default)": {"score": "output"},
    "|W| |X|, no gradient": {"score": "no_gradient"},
    "|W| |X| |noise|": {"score": "noise"},
    "magnitude (L2)": {"score": "magnitude"},
    "random": {"score": "random"},
    "gates, residual gradient": {"score": "gates"},
    "FMS, one SPSA draw (paper)": {"score": "fms"},
    "gates, backprop (Fisher)": {"score": "gates", "estimator": "backprop"},
    "Taylor, backprop": {"score": "taylor"},
}

_FORWARD = r"""
import compress, compress.pipeline, compress.quant.any_precision, torch

start = resident("VmRSS")
model = compress.load(sys.argv[1], dtype=torch.float32)
tokens = torch.arange(int(sys.argv[2])).view(-1, int(sys.argv[3])) % 2048
with torch.no_grad():
    model(tokens, labels=tokens, use_cache=False)
print(json.dumps({"peak": resident("VmHWM") - start}))
"""


@torch.no_grad()
def bench_speed(folders: Mapping[str, Path], tokens: int = 64, rounds: int = 5) -> dict[str, float]:
    """Tokens per second of models generating one sequence, taken in turn; the best of all rounds."""
    models: dict[str, Any] = {label: compress.load(path, dtype=torch.float32) for label, path in folders.items()}
    best = dict.fromkeys(models, 0.0)
    prompt = torch.ones(1, 4, dtype=torch.long)
    for _ in range(rounds):
        for label, model in models.items():
            started = time.perf_counter()
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
            best[label] = max(best[label], tokens / (time.perf_counter() - started))
    return best


def prune_to(dense: str, ratios: list[float], folder: Path) -> dict[str, Path]:
    """The dense model, and others with a share of the parameters removed."""
    found = {"dense": model_folder(dense)}
    for ratio in ratios:
        recipe = {
            "model": dense,
            "calibration": {"builtin": "stdlib", "samples": 16, "length": 128},
            "passes": [{"kind": "mini_llm", "ratio": ratio, "score": "magnitude", "compensate": False}],
        }
        found[f"{ratio:.0%}"] = compress.run(recipe, folder / f"{ratio}")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m compress.evals.bench_structured", description=__doc__)
    parser.add_argument("--hidden", type=int, default=384, help="of the random model")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--model", default="builtin", help="whose speed is measured; 'random' for the random one")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.5")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    console, found = Console(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not given.no_memory or given.model == "random":
            random_model(folder / "dense", given.hidden, given.blocks)
        if not given.no_memory:
            found["memory"] = []
            for label, settings in SCORES.items():
                step = {"kind": "mini_llm", "ratio": 0.2, "compensate": False, **settings}
                recipe = {"model": str(folder / "dense"), "calibration": CALIBRATION, "passes": [step]}
                found["memory"].append({"score": label, **beside_plan(recipe, folder / "pruned")})
                shutil.rmtree(folder / "pruned")
            console.print(memory_table(found["memory"], "score"))
            length = CALIBRATION["length"]
            sizes = str(CALIBRATION["samples"] * length), str(length)
            found["forward"] = in_fresh_process(_FORWARD, str(folder / "dense"), *sizes)["peak"]
            console.print(
                f"A forward pass of as much text and its loss, nothing else: {found['forward'] / 1e6:.0f} MB."
            )
        dense = str(folder / "dense") if given.model == "random" else given.model
        models = prune_to(dense, [float(part) for part in given.ratios.split(",")], folder)
        found["bytes"] = {
            label: sum(item.nbytes for item in Checkpoint(path).info().values()) for label, path in models.items()
        }
        found["speed"] = bench_speed(models)
        table = Table("removed", "MB", "tokens/s", "of dense")
        for label, speed in found["speed"].items():
            table.add_row(
                label, f"{found['bytes'][label] / 1e6:.2f}", f"{speed:.0f}", f"{speed / found['speed']['dense']:.2f}"
            )
        console.print(table)
    write_json(found, given.json)


if __name__ == "__main__":
    main()
