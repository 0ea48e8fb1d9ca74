"""Measure what packing keys and values costs, beside controls and transformers' own QuantizedCache."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers.cache_utils import DynamicCache, QuantizedCache

import compress
from compress.evals.bench.common import JsonOption, show, write
from compress.evals.evaluate import Protocol, documents_of
from compress.evals.kv import bytes_of
from compress.hf import cache_name
from compress.kv import KVCache
from compress.kv_settings import KVBits
from compress.loading import load_tokenizer

_PEER_RESIDUAL = (
    384  # of QuantizedCache, whose window fills from nothing to it: on average as many whole tokens as ours
)
_KIVI = {"group": 32, "nested": False, "rotate": False, "sinks": 0}


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
        add(f"{bits} bits, keys not scaled", bits, scale_keys=False, **ours)
        add(f"{bits} bits, keys not centred", bits, centre_keys=False, **ours)
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


@torch.inference_mode()
def side_by_side(
    model: Any, windows: Sequence[Sequence[int]], makers: Mapping[str, Callable[[], Any]], block: int
) -> dict[str, dict[str, float]]:
    """Read windows of tokens a block at a time with every cache in turn, the one named ``plain`` first.

    Returns:
        For every cache: loss, perplexity and ``above_plain``; ``error``, the standard error of its loss less the plain one's, by token;
        ``divergence``, the mean Kullback-Leibler divergence of its predictions from the plain cache's, in nats; and ``bytes`` per token, the
        mean after the calls of a window's second half, as windows of whole tokens fill and empty. A cache that fails is said and left out.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in makers}
    sizes: dict[str, list[float]] = {name: [] for name in makers}
    name_of_cache = cache_name(model)
    for window in windows:
        ids = torch.tensor([list(window)], device=model.device)
        caches: dict[str, Any] = {}
        for start in range(0, len(window) - 1, block):
            after = ids[0, start + 1 : start + block + 1]
            plain = None
            for name in list(rows):
                try:
                    if name not in caches:
                        caches[name] = makers[name]()
                    own = {name_of_cache: caches[name]}
                    found = model(input_ids=ids[:, start : start + block], use_cache=True, **own)
                except (ImportError, RuntimeError, ValueError, TypeError) as error:
                    print(f"{name}: not measured ({type(error).__name__}: {str(error).splitlines()[0]})", flush=True)
                    del rows[name]
                    continue
                logs = found.logits[0, : len(after)].float().log_softmax(-1)
                plain = logs if plain is None else plain
                divergence = (plain.exp() * (plain - logs)).sum(-1)
                if 2 * start >= len(window):
                    sizes[name].append(bytes_of(caches[name]) / min(start + block, len(window)))
                rows[name].append(torch.stack([-logs[range(len(after)), after], divergence]).cpu().double())
    each = {name: torch.cat(parts, 1) for name, parts in rows.items()}
    losses = {name: found[0] for name, found in each.items()}
    return {
        name: {
            "loss": float(loss.mean()),
            "perplexity": math.exp(loss.mean()),
            "above_plain": math.expm1(float((loss - losses["plain"]).mean())),
            "error": float((loss - losses["plain"]).std()) / len(loss) ** 0.5,
            "divergence": float(each[name][1].mean()),
            "bytes": sum(sizes[name]) / len(sizes[name]),
        }
        for name, loss in losses.items()
    }


def main(
    model: Annotated[str, typer.Argument(help="Dense model or checkpoint.")],
    text: Annotated[str, typer.Argument(help="Text file.")],
    bits: Annotated[str, typer.Option(help="Comma-separated.")] = "4,2",
    windows: Annotated[int, typer.Option(help="Windows side by side, from the first.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    block: Annotated[int, typer.Option(help="Tokens of a call.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    only: Annotated[
        str, typer.Option(help="Regular expression: measure names in which it is found, and the plain cache.")
    ] = "",
    target: JsonOption = None,
) -> None:
    """Measure perplexity with each cache in the loop, how far predictions are from the plain cache's, and the bytes it takes."""
    network = compress.load(model, dtype=getattr(torch, dtype))
    documents, _ = documents_of(text, Protocol(join="\n\n"))
    cut = Protocol(length=length, disjoint=True).cut(documents, load_tokenizer(model))
    makers = candidates(network.config, [int(one) for one in bits.split(",")])
    makers = {name: make for name, make in makers.items() if name == "plain" or re.search(only, name)}
    found = side_by_side(network, [window.tokens for window in cut.windows[:windows]], makers, block)
    show(
        "packed caches",
        ["cache", "perplexity", "above plain", "standard error", "divergence", "bytes per token"],
        [
            [
                name,
                f"{row['perplexity']:.4f}",
                f"{row['above_plain']:+.2%}",
                f"{row['error']:.2%}",
                f"{row['divergence']:.4f}",
                f"{row['bytes']:.0f}",
            ]
            for name, row in found.items()
        ],
    )
    write(
        {"model": model, "windows": windows, "length": length, "block": block, "dtype": dtype, "caches": found}, target
    )
