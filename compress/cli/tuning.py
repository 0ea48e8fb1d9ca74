"""Commands for the kernels of a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from compress.cli.common import JsonOption, app, out, progress_bar, write_json
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.kernels.configs import Problem
    from compress.kernels.variants import Kind

Shapes = Annotated[
    Optional[list[str]],
    typer.Option("--shape", help="N x K of a layer, such as 14336x4096; again for more. Those of Llama if absent."),
]


def _need_gpu(command: str) -> None:
    """Refuse to go on where torch sees no GPU, or there is no Triton."""
    import torch

    from compress.kernels import gpu

    reason = gpu.missing() or (None if torch.cuda.is_available() else "torch sees no GPU")
    if reason is not None:
        raise CompressError(f"compress {command} measures on a GPU, but {reason}; run it where there is one.")


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise CompressError(f"{option} {text!r}: give numbers from 1, comma-separated, for example 1,16,256.")
    return [int(part) for part in parts]


def _shapes(texts: list[str] | None) -> list[tuple[int, int]]:
    """Return (N, K) for each ``NxK``, or Llama's shapes where none is given."""
    from compress.evals.kernels_bench import Plan

    shapes: list[tuple[int, int]] = []
    for text in texts or ():
        found = re.fullmatch(r"\s*([1-9]\d*)\s*[xX]\s*([1-9]\d*)\s*", text)
        if found is None:
            raise CompressError(f"--shape: shape {text!r} is not N x K, such as 14336x4096.")
        shapes.append((int(found[1]), int(found[2])))
    return shapes or list(Plan().shapes)


@app.command(name="bench-kernels")
def bench_kernels(
    shape: Shapes = None,
    rows: Annotated[Optional[str], typer.Option(help="Rows of activations, comma-separated; 1 to 2048.")] = None,
    decode: Annotated[bool, typer.Option(help="Measure a whole decode step of Llama-3.1-8B's shapes too.")] = True,
    target: JsonOption = None,
) -> None:
    """Measure packed products and a decode step on the GPU at hand, beside cuBLAS and published figures."""
    _need_gpu("bench-kernels")
    from compress.evals.decoder import Shape
    from compress.evals.kernels_bench import ROWS, Plan, run, show
    from compress.kernels.timing import graph_time

    counts = list(ROWS) if rows is None else _numbers("--rows", rows)
    plan = Plan(_shapes(shape), counts, decode=Shape() if decode else None)
    with progress_bar() as progress:
        result = run(plan, graph_time, progress)
    if not write_json(result, target) or target != "-":
        show(result, out)


@app.command()
def tune(
    folder: Annotated[
        Optional[str], typer.Argument(help="Checkpoint whose layers to tune for; instead of shapes.", metavar="DIR")
    ] = None,
    shape: Shapes = None,
    bits: Annotated[str, typer.Option(help="Numbers of bits, comma-separated.")] = "3,4,8",
    rows: Annotated[str, typer.Option(help="Rows of activations, comma-separated.")] = "1,2,4,8,16,32,64,256",
    kind: Annotated[str, typer.Option(help="Of activations: fp16 or bf16.")] = "fp16",
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="File to write; where the kernels look if absent.")
    ] = None,
) -> None:
    """Measure how the kernels best divide their work on the GPU at hand, and keep it for the next load."""
    problems = _problems(folder, shape, bits, rows, kind)
    _need_gpu("tune")
    from compress.kernels import tune as tuning
    from compress.kernels.timing import graph_time

    with progress_bar() as progress:
        result = tuning.tune(problems, graph_time, progress=progress)
    path = tuning.write(result, output)
    out.print(f"{len(result['configs'])} configurations for {result['gpu']} in {path}", soft_wrap=True)


def _problems(folder: str | None, shapes: list[str] | None, bits: str, rows: str, kind: str) -> list[Problem]:
    """Return every combination of what was asked for, or refuse a number of bits, shape or kind that there is not."""
    from compress.kernels.configs import Problem

    if folder is not None and shapes:
        raise CompressError("give a checkpoint or --shape, not both.")
    if kind not in ("fp16", "bf16"):
        raise CompressError(f"--kind {kind!r} is not fp16 or bf16.")
    chosen: Kind = "bf16" if kind == "bf16" else "fp16"
    all_bits = _numbers("--bits", bits)
    if max(all_bits) > 8 or min(all_bits) < 2:
        raise CompressError(f"--bits {bits!r}: the kernels that are tuned have 2 to 8 bits.")
    sizes = _shapes(shapes) if folder is None else _layers(folder)
    buckets = {Problem(1, 1, 3, count, chosen).bucket: count for count in _numbers("--rows", rows)}
    return [Problem(n, k, b, count, chosen) for n, k in sizes for b in all_bits for count in buckets.values()]


def _layers(folder: str) -> list[tuple[int, int]]:
    """Return the sizes of a checkpoint's packed layers, each once, or refuse what is not a compressed checkpoint."""
    from compress.config import stored_config
    from compress.loading import read_config

    settings = stored_config(getattr(read_config(folder), "quantization_config", None))
    if settings is None:
        raise CompressError(f"{folder}: is not a compressed checkpoint, so it has no packed layers to tune for.")
    return list(dict.fromkeys((found.out_features, found.in_features) for found in settings.shapes().values()))
