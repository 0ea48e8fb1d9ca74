"""How the kernels divide their work: as measured for a GPU where somebody has, by rule elsewhere. No request measures anything.

Which kernel serves how many rows of activations: ``gemv`` 1 by rule and to 4 where that was measured to be faster, ``dot`` to 64,
``tile`` (the same with larger tiles) to 512, and above that the weights are looked up once for cuBLAS.

A tuning file is JSON, one for every GPU, by the name torch gives it: ``{"gpu": …, "triton": …, "configs": {key: fields of Config}}``
with keys as :attr:`Problem.key` makes them. Those that come with the package lie in ``kernels/tuning``; ``compress tune`` makes more, in
``~/.cache/compress/tuning`` (``XDG_CACHE_HOME`` is heeded).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from compress.kernels.ptx import PAIRED, REGISTER_BITS
from compress.kernels.variants import Config, Kind, Operation

GEMV_ROWS, DOT_ROWS, TILE_ROWS = 4, 64, 512
PAIRED_WORDS = 128  # a program that reads so many words of a row is worth its table of pairs, a tenth of its work
SHIPPED = Path(__file__).with_name("tuning")


@dataclass(frozen=True)
class Problem:
    """Describe what a configuration is chosen by."""

    rows: int  # N
    columns: int  # K
    bits: int  # of a code
    count: int  # rows of activations
    kind: Kind  # of the activations
    assembly: bool = True  # whether the kernels are those with assembly
    capability: int = 90  # 90 for sm_90; not part of the key, as files are by GPU

    @property
    def span(self) -> int:
        """Return the words in a row of weights."""
        return -(-self.columns // 32)

    @property
    def operation(self) -> Operation:
        """Return the kernel that serves so many rows of activations, if its configuration does not say otherwise."""
        if self.count <= GEMV_ROWS:
            return "gemv"
        return "dot" if self.count <= DOT_ROWS else "tile" if self.count <= TILE_ROWS else "look_up"

    @property
    def bucket(self) -> int:
        """Return the power of two up to which counts share a configuration."""
        return 1 << (min(self.count, TILE_ROWS + 1) - 1).bit_length()

    @property
    def key(self) -> str:
        """Return the key of a tuning file's entry."""
        return f"{self.rows}x{self.columns} {self.bits} bits, {self.bucket} rows, {self.kind}"


def candidates(problem: Problem) -> list[Config]:
    """Return every configuration that is worth measuring: about a dozen for each kernel."""
    if problem.operation == "gemv" and problem.assembly:
        words = _words(problem)
        found = [Config(warps, warps * w, split) for warps in (4, 8, 16) for w in words for split in (1, 2)]
        if problem.bits == PAIRED and problem.count == 1:
            found += [Config(warps, warps, split, pairs=True) for warps in (4, 8, 16) for split in (1, 2)]
        found = [config for config in found if config.step * config.split <= max(config.step, problem.span)]
        return found + ([_matrix(problem)] if problem.count > 1 else [])
    if problem.operation == "look_up" or not problem.assembly:
        return [heuristic(problem, 1, 1 << 30)]
    base = _matrix(problem)
    found = [
        replace(base, step=step, split=split, stages=stages)
        for step in sorted({base.step, 8})
        for split in (1, 2, 4)
        for stages in (1, 2, 3)
    ]
    found = [config for config in found if config.split * config.step <= max(config.step, problem.span)]
    return [config for config in found if launches(config, problem)]


@lru_cache(4096)  # it is asked at every call
def heuristic(problem: Problem, processors: int, shared: int) -> Config:
    """Choose a configuration from the sizes, the GPU's multiprocessors, and a program's bytes of ``shared`` memory."""
    if not problem.assembly:  # small tiles: these kernels hold 32 weights per word at once
        few = problem.operation not in ("dot", "tile")
        return Config(4, 4) if few else Config(4, 1, 1, 16 if problem.count <= 16 else 32, 32, 1)
    if problem.operation == "look_up":
        return Config(4, 4 if problem.bits > 4 else 16)
    if problem.operation == "gemv" and problem.count == 1:
        paired = by_warps(problem, processors, True)
        worth = problem.bits == PAIRED and problem.span >= PAIRED_WORDS * paired.split
        return paired if worth else by_warps(problem, processors, False)
    config = _matrix(problem, shared)
    programs = -(-problem.rows // config.bn) * -(-problem.count // config.bm)
    return replace(config, split=_split(programs, processors, problem.span, config.step))


def _words(problem: Problem) -> tuple[int, ...]:
    """Return the words that a warp may take at a time in ``gemv``, the best guess first.

    With one, a lane has one row: above 4 bits, where each lane then has a bank of its own, and for more than one row of
    activations, as they fill the registers. With two, two rows share what is done to activations; with four, four do.
    """
    if problem.count > 1:
        return (1,)
    if problem.bits > 4:
        return 1, 4
    return (4, 8) if problem.kind == "bf16" else (2, 8)


def by_warps(problem: Problem, processors: int, pairs: bool) -> Config:
    """Choose for ``gemv`` enough warps to keep the memory busy, in one program if it can be: no second kernel then adds up.

    Where weights are looked up in pairs a lane has one row, so that each lane of a warp has a bank of its own.
    """
    tiles, words = -(-problem.rows // 32), 1 if pairs else _words(problem)[0]
    warps = next((w for w in (4, 8) if tiles * w >= 16 * processors), 16)
    while warps > 4 and warps * words > problem.span:
        warps //= 2
    step = warps * words
    return Config(warps, step, _split(tiles * warps, 8 * processors, problem.span, step), pairs=pairs)


def _matrix(problem: Problem, shared: int = 1 << 30) -> Config:
    """Choose what keeps weights in registers and spills none of them, also for few rows of activations.

    Every further row in ``gemv`` adds instructions, and the matrix instructions take several for what one costs: by the
    counts of the static proof they win from two rows on. Those of sm_90 work on 64 rows of weights by four warps. Those of
    sm_100 take weights from elsewhere than registers, so few rows of activations go through the older ones there, with 32
    rows of weights. Tables of 8 bits leave room for 32, and those of 7 too where activations are few.
    """
    tile, bits = problem.operation == "tile", problem.bits
    bm = max(16, min(problem.bucket, 128 if bits <= 4 else 64))
    few = bits == 8 or (bits == 7 and bm < 64) or (problem.capability >= 100 and not tile)
    bn = 128 if tile and bits <= 6 else 32 if few else 64
    sizes = [(n, stages) for n in ((64, 32) if bn == 64 and bits == 7 else (bn,)) for stages in (2, 3)]
    every = [
        Config(4 if (bm, n) == (64, 32) else n // 16, 8, 1, bm, n, stages, problem.operation == "gemv")
        for n, stages in [*sizes, (sizes[-1][0], 1)]
    ]
    return next((config for config in every if launches(config, problem, shared)), every[-1])


def shared_bytes(config: Config, problem: Problem) -> tuple[int, int]:
    """Return what ``dot`` takes of shared memory: Triton's own part, for its pipeline and results, and tables above 4 bits."""
    codes = problem.bits * config.bn * config.step * 4 * (config.stages - 1)
    new = config.stages > 1 and 90 <= problem.capability < 120 and config.bn >= 64  # activations are read in place
    activations = config.step * config.bm * 64 * (config.stages - 1 + int(new))
    results = 2 * config.bn * (config.bm if config.stages == 1 else 16)
    return activations + codes + results, 2**problem.bits * config.bn * 4 if problem.bits > REGISTER_BITS else 0


def launches(config: Config, problem: Problem, shared: int = 1 << 30) -> bool:
    """Tell whether the driver gives ``dot`` its shared memory, of which a program may have so many bytes.

    More than 48 KiB have to be asked for, and Triton does so only where its own part is larger: tables beside a smaller part
    must not bring the sum above. 2 KiB are left free on either side, as another Triton may take a little more or less.
    """
    own, tables = shared_bytes(config, problem)
    if own + tables + 2048 <= 48 << 10:
        return True
    return own + tables + 2048 <= shared and (tables == 0 or own - 2048 > 48 << 10)


def _split(programs: int, wanted: int, span: int, step: int) -> int:
    """Return the power of two that gives the GPU enough to do, and no program less than one step."""
    split = 1
    while programs * split < wanted and split < 8 and span >= 2 * split * step:
        split *= 2
    return split


def file_name(gpu: str) -> str:
    """Return the name of the tuning file for a GPU, from the name torch gives it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower() + ".json"


def own_folder() -> Path:
    """Return the folder of the files that ``compress tune`` writes."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "compress" / "tuning"


@cache
def tuned(gpu: str) -> dict[str, Config]:
    """Read the measured configurations for a GPU, the user's own before those that come with the package.

    Raises:
        ValueError: a file that is not a tuning file.
    """
    found: dict[str, Config] = {}
    for folder in (SHIPPED, own_folder()):
        path = folder / file_name(gpu)
        if path.is_file():
            try:
                found |= {key: Config(**fields) for key, fields in json.loads(path.read_text())["configs"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}: is not a tuning file ({error}); delete it, or run compress tune again"
                ) from error
    return found


def choose_config(problem: Problem, gpu: str, processors: int, shared: int) -> Config:
    """Return the configuration for a problem: measured if there is one, by rule otherwise."""
    return tuned(gpu).get(problem.key) or heuristic(problem, processors, shared)
