"""The main job on the built-in model: compress, load in a fresh process, measure beside the controls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from compress.errors import CompressError
from compress.evals.quality import as_table, compare
from compress.loading import load, load_tokenizer
from compress.manifest import verify

CHECKPOINT = "any-precision-seed-3"
MARK = "made-by-compress-demo"
"""File that tells a folder that the next demo may delete."""
PROMPT = "def __init__(self"


def demonstrate(output: Path, controls: bool, report: Callable[[str, int, int], None]) -> RenderableType:
    """Run the demo.

    Args:
        output: folder for checkpoints and ``quality.json``; one made by an earlier demo is replaced.
        controls: whether k-means and round-to-nearest are measured too, at 3 and 4 bits.
        report: called with (what, done, total).

    Returns:
        What to print.
    """
    mark = output / MARK
    if output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not mark.exists()):
            raise CompressError(f"{output}: exists and was not made by an earlier demo; choose another with -o.")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    mark.touch()
    calibration = {"builtin": "stdlib", "samples": 64}
    widths = (3, 4) if controls else ()
    rows = compare("builtin", calibration, "builtin", output, control_widths=widths, report=report)
    report("loading in a fresh process", 0, 1)
    checks = verify(output / CHECKPOINT)
    (output / "quality.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    checkpoint = output / CHECKPOINT
    sample = continuation(checkpoint, PROMPT)
    lines = [*(f"ok {line}" for line in checks), f"at 4 bits, {PROMPT!r} goes on:", sample]
    next_step = f"try: compress generate {checkpoint} 'import os' --bits 3"
    return Group(as_table(rows, "bits_per_byte"), *(Text(line) for line in [*lines, next_step]))


def continuation(checkpoint: Path, prompt: str) -> str:
    """What the checkpoint writes at 4 bits, greedily."""
    model: Any = load(checkpoint, bits=4, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
