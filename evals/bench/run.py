"""Measure a whole run: the processor time of every stage, in a process of its own, so that no part hides."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Annotated, Any, Optional

import typer
from safetensors.torch import save_file

from compress.evals.bench.common import JsonOption, console, show, write
from compress.evals.fresh import in_fresh_process
from compress.evals.random_llama import llama, write_llama
from compress.plan import plan
from compress.recipe import load_recipe
from compress.shapes import fewer_blocks
from compress.source import open_source
from compress.structure import architecture, block_of

_BLOCK_OF_1B = {"intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}  # TinyLlama-1.1B
_RECIPE: dict[str, Any] = {
    "model": "builtin",
    "calibration": {"builtin": "stdlib", "samples": 16, "length": 256},
    "passes": [{"kind": "any_precision", "seed_bits": 2}],
}
# Function of the library -> the stage that its time belongs to, but for what another stage takes within it.
STAGES = {
    "compress/divergence.py:divergences": "errors",
    "compress/fisher.py:drawn_gradients": "gradients",
    "compress/fisher.py:squared_gradients": "gradients",
    "compress/runner.py:_outputs": "outputs carried",
    "compress/passes.py:for_each_input": "inputs of linears",
    "compress/statistics.py:add": "moments",
    "compress/streaming.py:_fill": "weights read",
    "compress/training.py:train": "training",
    "compress/workspace.py:load": "workspace",
    "compress/workspace.py:save": "workspace",
    "compress/writer.py:write_checkpoint": "checkpoint written",
    "pruning/joint.py:prune": "scores, pruning",
    "pruning/mrp.py:curve": "scores, pruning",
    "pruning/mrp.py:non_outlier_ratio": "scores, pruning",
    "pruning/prune.py:prune": "scores, pruning",
    "pruning/scores.py:measure": "scores, pruning",
    "pruning/structured/mini_llm.py:run_block": "scores, pruning",
    "quant/base.py:vocabulary_errors": "errors",
    "quant/errors.py:layer_errors": "errors",
    "quant/block_sweep.py:correction": "moments",
    "quant/replay.py:inputs": "inputs of linears",
    "quant/replay.py:outputs": "outputs carried",
    "quant/kmeans.py:nested_codebooks": "codebook search",
    "quant/nested.py:nested_output_codebooks": "codebook search",
    "quant/shared_search.py:shared_output_codebooks": "codebook search",
    "quant/vocabulary.py:fit_vocabulary": "codebook search",
    "quant/tune.py:run_model": "training",
}
RUN = r"""
import torch
from compress.evals.bench.run import watched_run

recipe, output, threads = request
if threads:
    torch.set_num_threads(threads)
print(json.dumps(watched_run(recipe, output) | {"peak_bytes": resident("VmHWM")}))
"""


class Stopwatch:
    """Divide the processor time of this thread's work among stages, by the functions that begin and end them.

    Attributes:
        seconds: stage -> processor time of all threads, without that of a stage within it.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack, self._mark, self._known = ["everything else"], time.process_time(), dict[CodeType, str | None]()

    def _stage(self, code: CodeType) -> str | None:
        if code not in self._known:
            place = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_name}"
            self._known[code] = STAGES.get(place)
        return self._known[code]

    def _follow(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event not in ("call", "return") or (stage := self._stage(frame.f_code)) is None:
            return
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._mark
        self._mark = now
        if event == "call":
            self._stack.append(stage)
        else:
            self._stack.pop()

    def run(self, work: Callable[[], object]) -> None:
        """Do some work and follow it."""
        self._mark = time.process_time()
        sys.setprofile(self._follow)
        try:
            work()
        finally:
            sys.setprofile(None)
        self.seconds[self._stack[-1]] += time.process_time() - self._mark


def watched_run(recipe: dict[str, Any], output: str) -> dict[str, Any]:
    """Run a recipe in this process; return seconds in all, by stage, and on the clock."""
    from compress import pipeline

    watch, began, clock = Stopwatch(), time.process_time(), time.perf_counter()
    watch.run(lambda: pipeline.run(recipe, output))
    spent = {"processor_seconds": time.process_time() - began, "wall_seconds": time.perf_counter() - clock}
    return {**spent, "stages": dict(watch.seconds)}


def cut(model: str, blocks: int, folder: Path) -> Path:
    """Write the first blocks of a model as a model of its own."""
    source = open_source(model)
    state, structure = source.state, architecture(source.state.config)
    names = [name for name in state.source.info() if (block_of(name, structure) or 0) < blocks]
    fewer_blocks(state.config, range(blocks)).save_pretrained(folder)
    save_file(state.source.read(names), folder / "model.safetensors", metadata={"format": "pt"})
    for path in source.folder.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return folder


def main(
    recipe: Annotated[
        Optional[Path], typer.Argument(help="Recipe; any-precision of the built-in model if none.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Take a random Llama with the blocks of a 1.1B one.")
    ] = False,
    blocks: Annotated[int, typer.Option(help="Cut the model after so many; 0 for all.")] = 0,
    settings: Annotated[list[str], typer.Option("--set", help="key.0.key=value, as for `compress run`.")] = [],  # noqa: B006
    threads: Annotated[list[int], typer.Option(help="Threads; again to compare; 0 for all cores.")] = [0],  # noqa: B006
    foresee: Annotated[bool, typer.Option(help="Also show what `compress plan --time` says beforehand.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Measure a whole run, by stages: processor time of all threads, wall time, and peak memory.

    Every run has a process of its own. Models may be cut after some blocks, so that a measurement takes minutes.
    """
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = load_recipe(recipe or _RECIPE, settings).model_dump(mode="json")
        if random:
            wanted["model"] = str(write_llama(folder / "model", llama(2048, blocks or 2, **_BLOCK_OF_1B)))
        elif blocks:
            wanted["model"] = str(cut(wanted["model"], blocks, folder / "model"))
        if foresee:
            steps = plan(wanted, seconds=True)["passes"]
            known = [step["processor_seconds"] for step in steps if step["processor_seconds"] is not None]
            console.print(
                f"foreseen: {sum(known):.1f} seconds of processor time by {len(known)} of {len(steps)} passes"
            )
        for count in threads:
            found[count] = in_fresh_process(RUN, [wanted, str(folder / f"packed-{count}"), count])
    stages = sorted(
        {name for one in found.values() for name in one["stages"]}, key=lambda n: -found[threads[0]]["stages"].get(n, 0)
    )
    rows = [(stage, *(f"{one['stages'].get(stage, 0):.1f}" for one in found.values())) for stage in stages]
    for label, key, scale in (
        ("in all", "processor_seconds", 1),
        ("on the clock", "wall_seconds", 1),
        ("peak memory, MB", "peak_bytes", 1e6),
    ):
        rows.append((label, *(f"{one[key] / scale:.1f}" for one in found.values())))
    show("Seconds of processor time", ["", *(f"{n or 'all'} threads" for n in found)], rows)
    write(found, json_file)
