"""Runs in a process with TRITON_INTERPRET=1: the benchmark and the tuner from end to end, with a stub for the clock.

The interpreter stands in for the GPU and a stub for time, so that what runs on the first GPU somebody has is what ran here.
"""

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from compress.evals import kernels_bench
from compress.evals.decoder import Shape
from compress.kernels import configs, tune
from compress.kernels.configs import Problem
from compress.kernels.variants import Config


class Stub:
    """Runs every call once; the n-th measurement takes n microseconds."""

    def __init__(self):
        self.measured = 0

    def __call__(self, calls):
        for call in calls:
            call()
        self.measured += 1
        return self.measured * 1e-6


small = Shape(hidden=64, intermediate=96, layers=2, heads=4, key_heads=2, vocabulary=50, length=8)
plan = kernels_bench.Plan([(64, 96), (40, 64)], (1, 6, 520), ((3, 3, 16), (4, 4, 16), (4, 4, 8)), small, "cpu")
result = kernels_bench.run(plan, Stub())
assert len(result["products"]) == 2 * 3 * 3
assert all(0 < entry["error"] < 1e-3 for entry in result["products"])
assert [entry["bits"] for entry in result["decode"]] == [16, 3, 4, 4]
assert json.loads(json.dumps(result)) == result
page = io.StringIO()
kernels_bench.show(result, Console(file=page, width=160))
assert all(text in page.getvalue() for text in ("64 x 96", "4, seed 4, 8-bit entries", "decode step", "273", "AnyBCQ"))
print("benchmark: ok")

problems = [Problem(64, 512, 3, count, "fp16") for count in (1, 6, 600)]  # of the last there is nothing to choose
configs.candidates = lambda problem: [Config(4, 2, split, 16, 32, 1) for split in (2, 1)][
    : 1 if problem.count > 512 else 2
]
found = tune.tune(problems, Stub(), device="cpu")
assert set(found["configs"]) == {problem.key for problem in problems[:2]}
path = tune.write(found, Path(sys.argv[1]) / "tuning.json")
first = found["configs"]
tune.write(found | {"configs": {"else": first[problems[0].key]}}, path)
assert set(json.loads(path.read_text())["configs"]) == {*first, "else"}
print("tuning: ok")

configs.own_folder = lambda: Path(sys.argv[1])
path.rename(path.with_name(configs.file_name("A GPU (80 GB)")))
assert asdict(configs.choose_config(problems[0], "A GPU (80 GB)", 1, 1)) == first[problems[0].key]
print("measured configurations are used: ok")
