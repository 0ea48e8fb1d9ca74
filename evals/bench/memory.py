"""Measure the peak memory of runs, each in a process of its own, beside the model's size and the plan (Linux)."""

from __future__ import annotations

import shutil
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import compress
from compress.evals.bench.common import JsonOption, show, write
from compress.evals.fresh import AT_ONCE, in_fresh_process
from compress.evals.random_llama import llama, sized, write_llama
from compress.plan import plan

CALIBRATION: dict[str, Any] = {"builtin": "stdlib", "samples": 8, "length": 256}
PASSES: dict[str, dict[str, Any]] = {
    "any_precision": {
        "weight objective": {"objective": "weight", "sensitivity": "none"},
        "weight, activations": {"objective": "weight", "sensitivity": "activation"},
        "weight, Fisher": {"objective": "weight", "sensitivity": "fisher"},
        "output objective, Fisher": {"objective": "output", "sensitivity": "fisher"},
    },
    "rtn": {"4 bits": {"bits": 4}},
    "prune": {
        "wanda": {"score": "wanda", "allocation": "mrp", "sparsity": 0.5},
        "sparsegpt": {"score": "sparsegpt", "allocation": "mrp", "sparsity": 0.5},
    },
    "mini_llm": {
        "output error (default)": {"score": "output"},
        "|W| |X|, no gradient": {"score": "no_gradient"},
        "|W| |X| |noise|": {"score": "noise"},
        "magnitude (L2)": {"score": "magnitude"},
        "random": {"score": "random"},
        "gates, residual gradient": {"score": "gates"},
        "FMS, one SPSA draw (paper)": {"score": "fms"},
        "gates, backprop (Fisher)": {"score": "gates", "estimator": "backprop"},
        "Taylor, backprop": {"score": "taylor"},
    },
}
ALWAYS: dict[str, dict[str, Any]] = {"mini_llm": {"ratio": 0.2, "compensate": False}}

RUN = r"""
import compress, compress.pipeline, compress.quant.any_precision

found, begun = {"imports": resident()}, time.perf_counter()
compress.run(*request)
print(json.dumps(found | {"peak": resident("VmHWM"), "seconds": time.perf_counter() - begun}))
"""
FORWARD = r"""
import compress, compress.pipeline, compress.quant.any_precision, torch

found = {"imports": resident()}
folder, samples, length = request
model = compress.load(folder, dtype=torch.float32)
tokens = torch.arange(samples * length).view(samples, length) % 2048
with torch.no_grad():
    model(tokens, labels=tokens, use_cache=False)
print(json.dumps(found | {"peak": resident("VmHWM")}))
"""
PROMPT = r"""
import torch, compress
from compress.prompts.stored import new_prompt
from compress.prompts.settings import SoftPromptConfig
from compress.training import train

found = {"imports": resident()}
folder, keep_dense = request
model = compress.load(folder, dtype=torch.float32, keep_dense=keep_dense)
tensors = [*model.parameters(), *model.buffers()]
found["tensors"] = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
found["loaded"] = resident()
samples = [torch.arange(128) * step % 2048 for step in (1, 3, 5)]
prompted = new_prompt(model, "prompt", model.get_input_embeddings()(torch.arange(16)).detach())
config = SoftPromptConfig(steps=2, batch=1, micro_batch=1, validate_every=2, warmup=0)
result = train(prompted, samples, config, 0)
assert result.history[-1]["step"] == 2
print(json.dumps(found | {"peak": resident("VmHWM")}))
"""


class Kind(str, Enum):
    """Name a kind of pass to measure."""

    any_precision = "any_precision"
    rtn = "rtn"
    prune = "prune"
    mini_llm = "mini_llm"
    soft_prompt = "soft_prompt"


def run_passes(kind: str, dense: Path, only: str | None = None) -> list[dict[str, Any]]:
    """Measure every setting of a kind of pass on a model; bytes, by ``float32`` (of the dense weights), ``planned`` and so on."""
    rows = []
    for label, settings in PASSES[kind].items():
        if only not in (None, label):
            continue
        step = {"kind": kind, **ALWAYS.get(kind, {}), **settings}
        recipe = {"model": str(dense), "calibration": CALIBRATION, "passes": [step]}
        foreseen, output = plan(recipe), dense.with_name("compressed")
        sizes = {"float32": 4 * foreseen["parameters"], "planned": foreseen["peak_memory_bytes"]}
        rows.append({"what": label, **sizes, **in_fresh_process(RUN, [recipe, str(output)], AT_ONCE)})
        shutil.rmtree(output)
    if kind == "mini_llm" and only is None:
        request = [str(dense), CALIBRATION["samples"], CALIBRATION["length"]]
        rows.append({"what": "a forward pass of as much text", **in_fresh_process(FORWARD, request, AT_ONCE)})
    return rows


def train_prompts(dense: Path) -> list[dict[str, Any]]:
    """Measure two steps of training a soft prompt on a dense model and on a packed one, whose weights are looked up or kept."""
    recipe = {"model": str(dense), "passes": [{"kind": "rtn", "bits": 4}]}
    packed = compress.run(recipe, dense.with_name("packed"))
    cases = {"4 bits, packed": (packed, False), "4 bits, weights kept": (packed, True), "dense": (dense, None)}
    return [
        {"what": label, **in_fresh_process(PROMPT, [str(place), keep], AT_ONCE)}
        for label, (place, keep) in cases.items()
    ]


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the figures that there are; sizes in MB."""
    columns = ("float32", "tensors", "imports", "loaded", "peak", "planned", "seconds")
    there = [column for column in columns if any(column in row for row in rows)]
    lines = []
    for row in rows:
        scaled = {column: row[column] / (1 if column == "seconds" else 1e6) for column in there if column in row}
        lines.append((row["what"], row["blocks"], *(f"{scaled[c]:.0f}" if c in scaled else "" for c in there)))
    show(title, ["", "blocks", *there], lines)


def main(
    kind: Annotated[Kind, typer.Argument(help="Kind of pass.")] = Kind.any_precision,
    hidden: Annotated[int, typer.Option(help="Hidden units of the random Llama.")] = 1024,
    blocks: Annotated[list[int], typer.Option(help="Its blocks; again for more models.")] = [24],  # noqa: B006
    size: Annotated[
        Optional[str], typer.Option(help="Its other sizes, in place of --hidden: llama-7b, llama-8b, …")
    ] = None,
    setting: Annotated[
        Optional[str], typer.Option(help="Measure this setting of the pass alone, such as wanda.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure the peak memory of runs beside the size of the model and the plan.

    A random Llama is written to a temporary folder and compressed by a process of its own; the peak of its resident memory (VmHWM) is read
    from the operating system. That process hands every freed tensor back at once, so that the peak is what was in use; left to
    itself, the C library keeps freed tensors below 32 MB, and the peak of a small model's run is up to twice this.
    """
    rows: list[dict[str, Any]] = []
    for depth in blocks:
        with tempfile.TemporaryDirectory() as name:
            dense = write_llama(Path(name) / "dense", sized(size, depth) if size else llama(hidden, depth))
            found = train_prompts(dense) if kind is Kind.soft_prompt else run_passes(kind.value, dense, setting)
            rows += [{"blocks": depth, **row} for row in found]
    for row in rows:
        row["peak"] -= row["imports"]
    print_rows(f"{kind.value}, {size or f'{hidden} hidden units'}; MB, the peak above what the imports take", rows)
    write(rows, json_file)
