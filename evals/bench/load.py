"""Measure the bytes that loading at a number of bits really reads, by the page cache's own account (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from pathlib import Path

import compress
from compress.evals.bench.common import JsonOption, show, write
from compress.evals.fresh import in_fresh_process
from compress.evals.random_llama import llama, write_llama
from compress.inspect import inspect

_LOAD = "import compress; compress.load(*request); print(json.dumps({}))"


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def resident(file: Path) -> int:
    """Return the bytes of a file that the page cache holds (mincore)."""
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


def main(hidden: int = 2048, json_file: JsonOption = None) -> None:
    """Measure the bytes that loading at a number of bits really reads.

    A random Llama of two blocks is compressed from 3 to 8 bits. For every number of bits the files are dropped from the page cache, a
    fresh process loads the checkpoint, and the operating system says which of their pages are in memory
    afterwards. The kernel reads ahead, so a little more than the tensors' own bytes is expected.
    """
    with tempfile.TemporaryDirectory() as name:
        dense = write_llama(Path(name) / "dense", llama(hidden, blocks=2))
        passes = [{"kind": "any_precision", "objective": "weight", "sensitivity": "none"}]
        packed = compress.run({"model": str(dense), "passes": passes}, Path(name) / "packed")
        shards = list(packed.glob("*.safetensors"))
        needed: dict[str, int] = inspect(packed)["bytes_at_bits"]
        read = {}
        for bits in needed:
            for file in shards:
                forget(file)
            in_fresh_process(_LOAD, [str(packed), int(bits)])
            read[bits] = sum(map(resident, shards))
        whole = sum(file.stat().st_size for file in shards)
        size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    heads = ["bits", "tensor bytes needed, MB", "bytes read from the files, MB", "share of all"]
    rows = [
        (bits, f"{n / 1e6:.1f}", f"{read[bits] / 1e6:.1f}", f"{read[bits] / whole:.1%}") for bits, n in needed.items()
    ]
    show(f"{size / 1e6:.1f} MB in bfloat16, checkpoint of {whole / 1e6:.1f} MB", heads, rows)
    figures = {"dense_bfloat16_bytes": size, "checkpoint_bytes": whole, "needed_bytes": needed, "read_bytes": read}
    write(figures, json_file)
