"""Measure what packing keys and values costs, beside controls and transformers' own QuantizedCache."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from transformers.cache_utils import DynamicCache, QuantizedCache

import compress
from compress.evals.bench.common import JsonOption, show, write
from compress.evals.evaluate import Protocol, documents_of
from compress.evals.kv import CachedLosses
from compress.evals.perplexity import Text, score
from compress.kv import KVCache
from compress.kv_settings import KVBits
from compress.loading import load_tokenizer

_PEER_RESIDUAL = (
    288  # of QuantizedCache, whose window fills from nothing to it: on average as many whole tokens as ours
)
_KIVI = {"nested": False, "rotate": False, "sinks": 0}


def candidates(config: Any, wanted: list[KVBits]) -> dict[str, Callable[[], Any]]:
    """Name the caches that are compared; QuantizedCache's backends that are not installed are left out."""
    found: dict[str, Callable[[], Any]] = {"plain": lambda: DynamicCache(config=config)}

    def add(name: str, bits: KVBits, **options: Any) -> None:
        found[name] = lambda: KVCache(bits, config=config, **options)

    def add_peer(name: str, **options: Any) -> None:
        found[name] = lambda: QuantizedCache(config=config, **options)

    ours = {"residual": 124}  # and four sinks: as many whole tokens as the controls have
    for bits in wanted:
        add(f"{bits} bits", bits, **ours)
        add(f"{bits} bits, groups 128:64", bits, group=(128, 64), **ours)
        add(f"{bits} bits, not rotated", bits, rotate=False, **ours)
        add(f"{bits} bits, no sinks", bits, sinks=0)
        add(f"{bits} bits, KIVI", bits, **_KIVI)
        for package, backend in (("optimum.quanto", "quanto"), ("hqq", "hqq")):
            if find_spec(package.partition(".")[0]) and bits in (2, 4):
                axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
                add_peer(
                    f"QuantizedCache {backend}, {bits} bits",
                    backend=backend,
                    nbits=bits,
                    residual_length=_PEER_RESIDUAL,
                    **axis,
                )
    add_peer("QuantizedCache fp8", backend="fp8")
    return found


def measure(model: Any, text: Text, make: Callable[[], Any], block: int) -> dict[str, Any]:
    """Return loss, and bytes of the cache per token when it is fullest."""
    losses = CachedLosses(make, block)
    found = score(model, text, 1, None, losses)
    return {"loss": found.loss, "perplexity": found.perplexity, "bytes": losses.bytes / losses.tokens}


def main(
    model: Annotated[str, typer.Argument(help="Dense model or checkpoint.")],
    text: Annotated[str, typer.Argument(help="Text file.")],
    bits: Annotated[str, typer.Option(help="Comma-separated.")] = "4,2",
    windows: Annotated[int, typer.Option(help="Windows side by side, from the first.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    block: Annotated[int, typer.Option(help="Tokens of a call.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    only: Annotated[str, typer.Option(help="Part of the names to measure, beside the plain cache.")] = "",
    target: JsonOption = None,
) -> None:
    """Measure perplexity with each cache in the loop, and the bytes it takes."""
    network = compress.load(model, dtype=getattr(torch, dtype))
    documents, _ = documents_of(text, Protocol(join="\n\n"))
    cut = Protocol(length=length, disjoint=True).cut(documents, load_tokenizer(model))
    cut = Text(cut.windows[:windows], cut.bytes)
    found: dict[str, Any] = {}
    for name, make in candidates(network.config, [int(one) for one in bits.split(",")]).items():
        if name != "plain" and only not in name:
            continue
        try:
            found[name] = measure(network, cut, make, block)
        except (ImportError, RuntimeError, ValueError, TypeError) as error:
            print(f"{name}: not measured ({type(error).__name__}: {str(error).splitlines()[0]})", flush=True)
            continue
        more = math.exp(found[name]["loss"] - found["plain"]["loss"]) - 1
        found[name]["above_plain"] = more
        print(
            f"{name}: {found[name]['perplexity']:.4f} {more:+.2%} {found[name]['bytes']:.0f} bytes per token",
            flush=True,
        )
    show(
        "packed caches",
        ["cache", "perplexity", "above plain", "bytes per token"],
        [
            [name, f"{row['perplexity']:.4f}", f"{row['above_plain']:+.2%}", f"{row['bytes']:.0f}"]
            for name, row in found.items()
        ],
    )
    write(
        {"model": model, "windows": windows, "length": length, "block": block, "dtype": dtype, "caches": found}, target
    )
