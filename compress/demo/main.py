"""The main job on the built-in model: compress, load in a fresh process, measure beside the controls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from compress.errors import CompressError
from compress.evals.quality import as_table, compare
from compress.manifest import verify

CHECKPOINT = "any-precision-seed-3"


def demonstrate(output: Path, controls: bool, report: Callable[[str, int, int], None]) -> RenderableType:
    """Run the demo.

    Args:
        output: folder for checkpoints and ``quality.json``; one made by an earlier demo is replaced.
        controls: whether k-means and round-to-nearest are measured too, at 3 and 4 bits.
        report: called with (what, done, total).

    Returns:
        What to print.
    """
    if output.exists():
        if any(output.iterdir()) and not (output / "quality.json").exists() and not (output / "work").exists():
            raise CompressError(f"{output}: exists and was not made by an earlier demo; choose another with -o.")
        shutil.rmtree(output)
    calibration = {"builtin": "stdlib", "samples": 64}
    widths = (3, 4) if controls else ()
    rows = compare("builtin", calibration, "builtin", output, control_widths=widths, report=report)
    report("loading in a fresh process", 0, 1)
    checks = verify(output / CHECKPOINT)
    (output / "quality.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    checkpoint = output / CHECKPOINT
    next_step = f"try: compress generate {checkpoint} 'def main():' --bits 4"
    return Group(as_table(rows, "bits_per_byte"), *(Text(f"ok {line}") for line in checks), Text(next_step))
