"""Make a pretrained Hugging Face causal LM small and fast after training, and prove what that cost.

``import compress`` teaches transformers to read compressed checkpoints, so that plain
``AutoModelForCausalLM.from_pretrained(folder)`` works. Everything else is imported when it is used.

Transformers can only be taught once it is imported, which with torch takes seconds. The ``compress`` command should answer a
mistyped option sooner: under :mod:`compress_command`, :mod:`compress.hf` is imported when something loads a model.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.version import __version__

if TYPE_CHECKING:
    from compress.drafting import view
    from compress.kernels.bitplane import backend
    from compress.kv import KVCache
    from compress.loading import get_bits, load, set_bits
    from compress.pipeline import run

if "compress_command" not in sys.modules:
    import compress.hf  # noqa: F401  (registers it)

__all__ = ["CompressError", "KVCache", "__version__", "backend", "get_bits", "load", "run", "set_bits", "view"]

_HOMES = dict.fromkeys(("get_bits", "load", "set_bits"), "compress.loading")
_HOMES |= {
    "KVCache": "compress.kv",
    "backend": "compress.kernels.bitplane",
    "run": "compress.pipeline",
    "view": "compress.drafting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
