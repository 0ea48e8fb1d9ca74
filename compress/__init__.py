"""Make a pretrained Hugging Face causal LM small and fast after training, and prove what that cost.

``import compress`` teaches transformers to read compressed checkpoints, so that plain
``AutoModelForCausalLM.from_pretrained(folder)`` works. Everything heavier is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.hf import register
from compress.loading import get_bits, load, set_bits
from compress.version import __version__

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = ["CompressError", "__version__", "backend", "get_bits", "load", "run", "set_bits"]

register()


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    workspace: str | Path | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Compress a model; see :func:`compress.pipeline.run`."""
    from compress import pipeline

    return pipeline.run(recipe, output, overrides, workspace, report)


def backend() -> str:
    """Which implementation multiplies by packed weights here, and why."""
    from compress.kernels.bitplane import backend as active

    return active()
