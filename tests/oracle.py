"""Digests of everything that recipes write, to show that a change of the code changes no byte.

``python tests/oracle.py FOLDER`` runs a recipe for every method on tiny random models and prints one line per file: its SHA-256
and its path. Run it before and after a change, on one machine, and compare:

    python tests/oracle.py /tmp/a >before; git switch change; python tests/oracle.py /tmp/b >after; diff before after

What ``plan``, ``inspect`` and ``eval`` say of each checkpoint counts as files too. ``--only NAME`` runs the recipes of that name.
"""

import argparse
import hashlib
import json
import os
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # the checkout this file is in comes first
from conftest import TEXT, save_model  # noqa: E402

NESTED = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 6}
TUNE = {"kind": "tune_tables", "steps": 4, "batch": 2}
PROMPT = {"kind": "soft_prompt", "tokens": 5, "steps": 4, "batch": 2, "validate_every": 2}
LORA = {"kind": "lora_recovery", "steps": 4, "batch": 2, "validate_every": 2}
PRUNE = {"kind": "prune", "score": "wanda", "allocation": "mrp", "sparsity": 0.5}
CUT = {"kind": "mini_llm", "ratio": 0.2}
RECIPES = {
    "any-precision": ("llama", [NESTED]),
    "any-precision-seed-2": ("opt", [{**NESTED, "seed_bits": 2, "parent_bits": 8, "include": ["lm_head"]}]),
    "weight-objective": ("gpt2", [{**NESTED, "objective": "weight"}]),
    "activation": ("gemma3_text", [{**NESTED, "sensitivity": "activation", "correction": 0}]),
    "tuned": ("llama", [NESTED, TUNE]),
    "kmeans": ("qwen3", [{"kind": "kmeans", "bits": 4, "include": ["model.embed_tokens"]}]),
    "rtn": ("bloom", [{"kind": "rtn", "bits": 3}]),
    "mrp": ("llama", [PRUNE]),
    "mrp-refreshed": ("llama", [{**PRUNE, "refresh": 20}]),
    "sparsegpt-owl": ("opt", [{**PRUNE, "score": "sparsegpt", "allocation": "owl"}]),
    "magnitude-2-4": ("gpt_neox", [{"kind": "prune", "score": "magnitude", "pattern": "2:4"}]),
    "alpha": ("llama", [{**PRUNE, "allocation": "alpha"}]),
    "dlp": ("llama", [{**PRUNE, "allocation": "dlp"}]),
    "atp": ("llama", [{**PRUNE, "allocation": "atp"}]),
    "pruned-and-packed": ("llama", [{**PRUNE, "sparsity": 0.8}, {**NESTED, "keep_zeros": True}]),
    "joint": ("llama", [{"kind": "joint", "bits": 4, "sparsity": 0.5, "allocation": "hessian"}]),
    "mini-llm": ("llama", [CUT]),
    "mini-llm-global": ("llama", [{**CUT, "mode": "global", "score": "fms", "draws": 2}]),
    "mini-llm-gates": ("gemma2", [{**CUT, "score": "gates"}]),
    "mini-llm-taylor": ("opt", [{**CUT, "score": "taylor", "compensate": False}]),
    "recovered": ("llama", [CUT, LORA, NESTED]),
    "adapter": ("llama", [CUT, {**LORA, "merge": False}]),
    "prompt": ("llama", [NESTED, PROMPT]),
    "prompt-per-width": ("llama", [{**NESTED, "parent_bits": 4}, {**PROMPT, "per_width": True, "distill": 2}]),
}  # fmt: skip


def said(*arguments: str) -> bytes:
    """What a command prints."""
    from compress.cli import main

    sys.argv = ["compress", *arguments]
    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        main()
    return printed.getvalue().encode()


def written(name: str, passes: list[dict], model: Path) -> dict[str, bytes]:
    """Run one recipe; file name -> content, with what the commands say of the result."""
    import compress

    calibration = {"text": "train.txt", "samples": 6, "length": 32}
    recipe = {"model": str(model), "calibration": calibration, "passes": passes}
    Path(f"{name}.yaml").write_text(json.dumps(recipe))
    target = compress.run(recipe, Path(name))
    found = {f"{name}/{path.relative_to(target)}": path.read_bytes() for path in target.rglob("*") if path.is_file()}
    found[f"{name}.plan"] = said("plan", f"{name}.yaml", "--json")
    found[f"{name}.inspect"] = said("inspect", name, "--json")
    found[f"{name}.eval"] = said("eval", name, "--text", "test.txt", "--json", "-")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to create, for models and checkpoints")
    parser.add_argument("--only", action="append", choices=list(RECIPES), help="this recipe alone (may be repeated)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    os.chdir(given.folder)  # manifests name the paths that recipes give
    Path("train.txt").write_text(TEXT)
    Path("test.txt").write_text(TEXT[::-1])
    for name in given.only or RECIPES:
        kind, passes = RECIPES[name]
        model = Path("models", kind)
        if not model.exists():
            save_model(model, kind)
        for file, content in sorted(written(name, passes, model).items()):
            print(hashlib.sha256(content).hexdigest()[:16], file, flush=True)


if __name__ == "__main__":
    main()
