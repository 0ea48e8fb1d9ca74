"""The main job on the built-in model: compress, load in a fresh process, measure beside the controls."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.errors import CompressError
from compress.loading import load, load_tokenizer
from compress.manifest import verify
from compress.tokens import prompt_tokens, set_generation

OURS = "any-precision, seed 3"
CHECKPOINT = "any-precision-seed-3"
MARK = "made-by-compress-demo"
"""File that tells a folder that the next demo may delete."""
PROMPT = "def __init__(self"


def demonstrate(output: Path, controls: bool, progress: Callable[[str, int, int], None]) -> RenderableType:
    """Run the demo, with the controls if wanted, and return what to print; a folder of an earlier demo is replaced."""
    mark = output / MARK
    if output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not mark.exists()):
            raise CompressError(f"{output}: exists and was not made by an earlier demo; choose another with -o.")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    mark.touch()
    rows = measure_all(output, controls, progress)
    progress("loading in a fresh process", 0, 1)
    checkpoint = output / CHECKPOINT
    checks = verify(checkpoint)
    (output / "quality.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sample = continuation(checkpoint, PROMPT)
    lines = [*(f"ok {line}" for line in checks), f"at 4 bits, {PROMPT!r} goes on:", sample]
    next_step = f"try: compress generate {checkpoint} 'import os' --bits 3"
    return Group(table_of(rows), *(Text(line) for line in [*lines, next_step]))


def measure_all(output: Path, controls: bool, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Make every checkpoint and measure it; return ``method, bits, disk_bytes`` and the metrics of the text, line by line."""
    from compress.evals.measure import make, measure  # the core does without evals

    ours = {"kind": "any_precision", "seed_bits": 3}
    recipes: dict[tuple[str, str], list[dict[str, Any]]] = {("dense", ""): [], (OURS, CHECKPOINT): [ours]}
    if controls:
        recipes["weight objective, seed 3", "weight-objective-seed-3"] = [{**ours, "objective": "weight"}]
        recipes |= {(kind, f"{kind}-{b}"): [{"kind": kind, "bits": b}] for kind in ("kmeans", "rtn") for b in (3, 4)}
    rows = []
    for (method, folder), passes in recipes.items():
        recipe = {"model": "builtin", "calibration": {"builtin": "stdlib", "samples": 64}, "passes": passes}
        made = make(recipe, output / folder, output / "work", progress)
        for bits, metrics in measure(made, "builtin", progress=progress).items():
            rows.append({"method": method, "bits": bits, **metrics})
    return rows


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out bits per byte: methods across, numbers of bits down, the dense model in the title."""
    dense, *others = rows
    methods = [*dict.fromkeys(row["method"] for row in others)]
    table = Table(title=f"bits per byte; dense: {dense['bits_per_byte']:.4f} at {dense['disk_bytes'] / 1e6:.2f} MB")
    for column in ("bits", "MB", *methods):
        table.add_column(column, justify="right")
    for bits in dict.fromkeys(row["bits"] for row in others):
        cells = {row["method"]: row for row in others if row["bits"] == bits}
        figures = [f"{cells[method]['bits_per_byte']:.4f}" if method in cells else "" for method in methods]
        table.add_row(bits, f"{cells[OURS]['disk_bytes'] / 1e6:.2f}", *figures)
    return table


def continuation(checkpoint: Path, prompt: str) -> str:
    """Return what the checkpoint writes at 4 bits, greedily."""
    model: Any = load(checkpoint, bits=4, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    set_generation(model, tokenizer)
    given = torch.tensor([prompt_tokens(tokenizer, prompt)])
    made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=48, do_sample=False)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))
