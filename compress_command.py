"""Where the ``compress`` command begins: its presence tells the library to import transformers only when it is needed."""

import ctypes
import gc
import os
from contextlib import suppress

_MMAP_THRESHOLD = -3  # glibc's name for it, M_MMAP_THRESHOLD
_LARGE = 1 << 20


def give_back_large_arrays() -> None:
    """Have glibc return the memory of arrays of 1 MB or more when they are freed, unless the environment says what is to be.

    By itself it comes to keep those of up to 32 MB in its heaps, where a training's leave holes: half as much again at the peak.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(OSError, AttributeError, TypeError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def main() -> None:
    """Run the command line."""
    # Importing torch and transformers makes a million objects that all stay: looking for garbage among them takes up to a fifth of that time.
    gc.set_threshold(100_000, 20, 20)
    give_back_large_arrays()
    from compress.cli import main as run

    run()
