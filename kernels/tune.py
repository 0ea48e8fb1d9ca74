"""Measure configurations on the GPU at hand and write the best into a tuning file (:mod:`compress.kernels.configs`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compress.kernels import configs, gpu
from compress.kernels.configs import Problem
from compress.kernels.layout import Tiled, random_tiled
from compress.kernels.timing import Timer, copies
from compress.kernels.variants import Config

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def packed_of(tiled: Tiled, bits: int) -> gpu.GpuMatrix:
    """Return a layout at one number of bits as the launcher takes it."""
    return gpu.GpuMatrix(tiled.tensors(bits), tiled.rows, tiled.columns, bits, tiled.head, tiled.groups)


def measure(problem: Problem, device: str, timer: Timer) -> dict[Config, float]:
    """Measure the seconds of every candidate for one problem; one that the GPU has no room for is left out."""
    size = problem.rows * problem.columns * problem.bits // 8
    matrices = [
        packed_of(random_tiled(problem.rows, problem.columns, problem.bits, device=device, seed=i), problem.bits)
        for i in range(copies(size))
    ]
    x = torch.randn(problem.count, problem.columns, dtype=torch.float32, device=device).to(DTYPES[problem.kind])
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
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure some problems on a GPU, and return the content of a tuning file; ``timer`` takes a list of calls.

    Problems of 512 rows and more have nothing to choose and are left out; ``progress`` is called with (what, done, total).
    """
    place = gpu.device_of(torch.cuda.current_device() if torch.cuda.is_available() else -1)
    here = (replace(problem, assembly=place.assembly, capability=place.capability) for problem in problems)
    wanted = [problem for problem in here if len(configs.candidates(problem)) > 1]
    chosen: dict[str, dict[str, int | bool]] = {}
    for done, problem in enumerate(wanted):
        progress(problem.key, done, len(wanted))
        seconds = measure(problem, device, timer)
        if seconds:
            chosen[problem.key] = asdict(min(seconds, key=lambda config: seconds[config]))
    return {"gpu": place.name, "triton": version("triton"), "torch": torch.__version__, "configs": chosen}


def write(result: dict[str, Any], path: Path | None = None) -> Path:
    """Write a tuning file, keeping what an older one of the same GPU says of other problems; return its path."""
    path = path or configs.own_folder() / configs.file_name(result["gpu"])
    older = json.loads(path.read_text())["configs"] if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = result | {"configs": older | result["configs"]}
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    configs.tuned.cache_clear()
    return path
