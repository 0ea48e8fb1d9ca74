"""Measure configurations on the GPU at hand and write the best into a tuning file (:mod:`compress.kernels.configs`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compress.kernels import configs, gpu
from compress.kernels.configs import Problem
from compress.kernels.layout import Tiled, random_tiled
from compress.kernels.timing import Timer, cache_bytes, copies
from compress.kernels.variants import Config

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def packed_of(tiled: Tiled, bits: int) -> gpu.Packed:
    """Return one width of a layout as the launcher takes it."""
    return gpu.Packed(tiled.tensors(bits), tiled.rows, tiled.columns, bits, tiled.head)


def measure(problem: Problem, device: str, timer: Timer) -> dict[Config, float]:
    """Seconds of every candidate for one problem; one that the GPU has no room for is left out."""
    size = problem.rows * problem.columns * problem.bits // 8
    matrices = [
        packed_of(random_tiled(problem.rows, problem.columns, problem.bits, device=device, seed=i), problem.bits)
        for i in range(copies(size, cache_bytes()))
    ]
    dtype = DTYPES[problem.kind]
    x = torch.randn(problem.count, problem.columns, device=device).to(dtype)
    found: dict[Config, float] = {}
    for config in configs.candidates(problem):
        try:
            found[config] = timer([partial(gpu.multiply, x, matrix, None, config) for matrix in matrices])
        except Exception as error:  # triton.OutOfResources and what its compiler raises have no common type
            if not any(word in str(error).lower() for word in ("resource", "shared memory", "registers")):
                raise
    return found


def tune(
    problems: Iterable[Problem],
    timer: Timer,
    device: str = "cuda",
    report: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """The content of a tuning file for some problems.

    Args:
        problems: what to measure; those of 512 rows and more have nothing to choose and are left out.
        timer: seconds of a list of calls.
        device: a GPU.
        report: is told (what, done, total).
    """
    place = gpu.device_of(torch.cuda.current_device() if torch.cuda.is_available() else -1)
    here = (replace(problem, assembly=place.assembly, capability=place.capability) for problem in problems)
    wanted = [problem for problem in here if len(configs.candidates(problem)) > 1]
    chosen: dict[str, dict[str, int | bool]] = {}
    for done, problem in enumerate(wanted):
        if report is not None:
            report(problem.key, done, len(wanted))
        seconds = measure(problem, device, timer)
        if seconds:
            chosen[problem.key] = min(seconds, key=lambda config: seconds[config]).json()
    return {"gpu": place.name, "triton": version("triton"), "torch": torch.__version__, "configs": chosen}


def write(result: dict[str, Any], path: Path | None = None) -> Path:
    """Write a tuning file, keeping what an older one of the same GPU says of other problems; returns where."""
    path = path or configs.own_folder() / configs.file_name(result["gpu"])
    older = json.loads(path.read_text())["configs"] if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = result | {"configs": older | result["configs"]}
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    configs.tuned.cache_clear()
    return path
