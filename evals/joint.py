"""Does pruning pay before quantising? ``python -m compress.evals.joint OUT --help``.

Half and 70 % of the weights pruned and 4 bits for the rest, in one sweep and one after the other, beside any-precision of
the dense model at 2, 3 and 4 bits. Recipes are run, checkpoints written, loaded and measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.evals import experiments, tables
from compress.evals.evaluate import Protocol
from compress.evals.quality import measured
from compress.inspect import sparsity
from compress.workspace import write_atomic

SPARSITIES = (0.5, 0.7)


def recipes() -> dict[str, list[dict[str, Any]]]:
    """Label -> passes."""
    nested = {"kind": "any_precision", "parent_bits": 4}
    found: dict[str, list[dict[str, Any]]] = {
        "any-precision, seed 2": [nested | {"seed_bits": 2}],
        "any-precision, seed 3": [nested | {"seed_bits": 3}],
    }
    for share in SPARSITIES:
        for allocation in ("uniform", "hessian", "mrp"):
            joint = {"kind": "joint", "bits": 4, "sparsity": share, "allocation": allocation}
            found[f"joint, {allocation}, {share:.0%}"] = [joint]
        for score in ("wanda", "sparsegpt"):
            for allocation in ("uniform", "owl", "mrp"):
                prune = {"kind": "prune", "score": score, "sparsity": share, "allocation": allocation}
                kept = nested | {"seed_bits": 3, "keep_zeros": True}
                found[f"{score}, {allocation}, {share:.0%}, then any-precision"] = [prune, kept]
    return found


def compare(
    model: str, calibration: Mapping[str, Any], text: str, folder: Path, protocol: Protocol
) -> list[dict[str, Any]]:
    """Run and measure every recipe at every width.

    Args:
        model: dense model.
        calibration: the recipe's ``calibration``.
        text: what to measure on.
        folder: checkpoints and ``joint.json`` are written under it; checkpoints already there are measured again, not
            made again.
        protocol: how the text is cut.

    Returns:
        Rows of ``label, bits, sparsity, model_bytes, loss, perplexity, bits_per_byte, tokens, bytes``; ``model_bytes`` are
        those of the tensors that loading at the width reads.
    """
    rows: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for label, target, found in measured(recipes(), model, calibration, text, folder, protocol):
        zeros = {} if label == "dense" else {"sparsity": sparsity(target)["sparsity"]}
        rows += [{"label": label, **zeros, **row} for row in found]
        write_atomic(folder / "joint.json", json.dumps(rows, indent=1) + "\n")
    return rows


def main() -> None:
    """Measure and print a table."""
    given = experiments.arguments_of("joint", __doc__, 100, 512).parse_args()
    calibration, value = experiments.calibration_of(given), experiments.value_of(given)
    rows = compare(given.model, calibration, given.text, given.out, experiments.protocol_of(given))
    table = tables.Table(["", "bits", "zeros", "MB", value.replace("_", " ")])
    for row in rows:
        zeros, size = (f"{row['sparsity']:.1%}", f"{row['model_bytes'] / 1e6:.3f}") if "sparsity" in row else ("", "")
        table.add("", row["label"], row["bits"], zeros, size, f"{row[value]:.4f}")
    print(tables.markdown(table))


if __name__ == "__main__":
    experiments.run(main)
