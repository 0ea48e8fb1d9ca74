"""Bytes that loading at a width really reads: ``python -m compress.evals.bench_load`` (Linux).

A random Llama of two blocks with 2048 columns is compressed from 3 to 8 bits. For every width the files are dropped
from the page cache, a fresh process loads the checkpoint, and the operating system says which of their pages
are in memory afterwards. The kernel reads ahead, so a little more than the tensors' own bytes is expected.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import compress
from compress.evals.bench_memory import random_model
from compress.inspect import inspect

_LOAD = "import compress, sys; compress.load(sys.argv[1], bits=int(sys.argv[2]))"


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def resident(file: Path) -> int:
    """Bytes of a file that the page cache holds (mincore)."""
    size = file.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with file.open("rb") as handle:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle.fileno(), 0)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), "mincore failed")
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def main() -> None:
    """Measure every width and print the table."""
    table = Table("bits", "tensor bytes needed, MB", "bytes read from the files, MB", "share of all")
    with tempfile.TemporaryDirectory() as name:
        dense, packed = Path(name) / "dense", Path(name) / "packed"
        random_model(dense, hidden=2048, blocks=2)
        passes = [{"kind": "any_precision", "objective": "weight", "sensitivity": "none"}]
        compress.run({"model": str(dense), "passes": passes}, packed)
        shards = list(packed.glob("*.safetensors"))
        at = inspect(packed)["bytes_at_bits"]
        whole = sum(file.stat().st_size for file in shards)
        for bits, needed in at.items():
            for file in shards:
                forget(file)
            subprocess.run([sys.executable, "-c", _LOAD, packed, bits], check=True, stderr=subprocess.DEVNULL)
            read = sum(resident(file) for file in shards)
            table.add_row(bits, f"{needed / 1e6:.1f}", f"{read / 1e6:.1f}", f"{read / whole:.1%}")
        size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    Console().print(table)
    print(json.dumps({"dense_bfloat16_bytes": size, "checkpoint_bytes": whole, "needed_bytes": at}))


if __name__ == "__main__":
    main()
