"""Time llama.cpp's own ``llama-bench`` on a GGUF file, beside our models: ``compress bench --gguf``.

On one thread processor time is counted, as for ours. The tool reports only wall time, so what its processes took is subtracted: one
that computes a token, one that reads the prompt first, and one that goes on decoding.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from compress.errors import CompressError

TOOL = "llama-bench"
_SAME_MODEL = 0.01  # files differ in padding and in frequencies that are stored


class LlamaCpp:
    """Run ``llama-bench`` on one file.

    Args:
        path: GGUF file.
        threads: of the CPU.
        device: torch's name; layers stay on the CPU if it is that.

    Raises:
        CompressError: no such file, or no ``llama-bench`` on PATH.
    """

    def __init__(self, path: Path, threads: int, device: str = "cpu") -> None:
        if not path.is_file():
            raise CompressError(f"--gguf {path}: there is no such file.")
        tool = shutil.which(TOOL)
        if tool is None:
            raise CompressError(
                f"--gguf {path}: {TOOL} of llama.cpp is not on PATH; install llama.cpp, or leave --gguf out."
            )
        self.path, self.threads = path, threads
        self._command = [tool, "--no-warmup", "-m", str(path), "-t", str(threads), "-r", "1", "-o", "json"]
        self._command += ["-ngl", "0"] if device == "cpu" else []

    def parameters(self) -> int:
        """Return how many weights the file has, by the tool."""
        return int(self._run(tokens=1)[1]["model_n_params"])

    def times(self, prompt: int, tokens: int) -> tuple[float, float]:
        """Return the seconds to read a prompt, and those for each of ``tokens`` later tokens."""
        if self.threads > 1:
            (_, read), (_, decoded) = self._run(prompt=prompt), self._run(tokens=tokens, behind=prompt)
            return read["avg_ns"] / 1e9, decoded["avg_ns"] / 1e9 / tokens
        (start, _), (first, _) = self._run(tokens=1), self._run(tokens=1, behind=prompt)
        whole, _ = self._run(tokens=1 + tokens, behind=prompt)
        if not start < first < whole:
            raise CompressError(f"{self.path}: too short to be timed; raise --prompt-tokens and --tokens.")
        return first - start, (whole - first) / tokens

    def _run(self, prompt: int = 0, tokens: int = 0, behind: int = 0) -> tuple[float, dict[str, Any]]:
        """Run the tool once; return its processor time in seconds and what it reports."""
        sizes = ["-p", str(prompt), "-n", str(tokens), "-d", str(behind)]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = subprocess.Popen([*self._command, *sizes], stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            said, wrong = (_text(file) for file in (out, err))
        try:
            (found,) = json.loads(said)
        except ValueError as error:
            last = (wrong.strip() or said.strip() or f"exit status {child.returncode}").splitlines()[-1]
            raise CompressError(f"{TOOL} failed on {self.path}: {last}") from error
        return usage.ru_utime + usage.ru_stime, found


def _text(file: IO[bytes]) -> str:
    """Return all that was written to a file."""
    file.seek(0)
    return file.read().decode(errors="replace")


def opened(files: Sequence[Path], count: Callable[[], int], threads: int, device: str) -> Mapping[str, LlamaCpp]:
    """Return what times each file, by its name; refuse files of another model, whose number of weights is not what ``count`` gives.

    Raises:
        CompressError: no tool, no such file, two of one name, or another model.
    """
    if not files:
        return {}
    found = {f"llama.cpp {path.stem}": LlamaCpp(path, threads, device) for path in files}
    if len(found) < len(files):
        raise CompressError("--gguf: two files have the same name; rename one, so that the table can tell them apart.")
    weights = count()
    for one in found.values():
        theirs = one.parameters()
        if abs(theirs - weights) > _SAME_MODEL * weights:
            raise CompressError(
                f"--gguf {one.path}: has {theirs:,} weights, the model {weights:,}; give a file of the same model."
            )
    return found
