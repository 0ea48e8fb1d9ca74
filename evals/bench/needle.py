"""Measure whether a fact deep in a long context is still found when keys and values are packed."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers.cache_utils import DynamicCache

import compress
from compress.evals.bench.common import JsonOption, show, write
from compress.evals.bench.kv import candidates
from compress.evals.evaluate import Protocol, documents_of
from compress.hf import cache_name
from compress.loading import load_tokenizer

_FACT, _QUESTION, _ANSWER = (
    "\nThe secret number of the lighthouse is 48213.\n",
    "\nThe secret number of the lighthouse is",
    " 48213",
)


@torch.inference_mode()
def answer(model: Any, cache: Any, question: Tensor, wanted: Tensor) -> tuple[float, bool]:
    """Return the loss per token of what is wanted after a question [1, T], and whether every token of it is the likeliest."""
    asked = torch.cat([question, wanted], 1)
    logits = (
        model(input_ids=asked, use_cache=True, **{cache_name(model): cache})
        .logits[0, question.shape[1] - 1 : -1]
        .float()
    )
    return float(torch.nn.functional.cross_entropy(logits, wanted[0])), bool((logits.argmax(-1) == wanted[0]).all())


@torch.inference_mode()
def read(model: Any, tokens: Tensor) -> DynamicCache:
    """Read a context [1, T] in stretches of 512, each with all before it as it is."""
    cache = DynamicCache(config=model.config)
    for part in torch.split(tokens, 512, 1):
        model(input_ids=part, use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
    return cache


def main(
    model: Annotated[str, typer.Argument(help="Dense model or checkpoint.")],
    text: Annotated[str, typer.Argument(help="Text file to hide the fact in.")],
    bits: Annotated[str, typer.Option(help="Comma-separated.")] = "4,2",
    length: Annotated[int, typer.Option(help="Tokens of the context.")] = 4096,
    depths: Annotated[str, typer.Option(help="Where the fact is, as shares of the context.")] = "0.1,0.5,0.9",
    target: JsonOption = None,
) -> None:
    """Hide a number in text and ask for it: loss per token of the answer, and whether greedy decoding gives it."""
    network: Any = compress.load(model, dtype=torch.bfloat16)
    tokenizer: Any = load_tokenizer(model)
    (document,), _ = documents_of(text, Protocol(join="\n\n"))
    filler, fact, question, wanted = (
        torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])[None]
        for words in (document[: length * 8], _FACT, _QUESTION, _ANSWER)
    )
    makers = candidates(network.config, [int(one) for one in bits.split(",")])
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in makers}
    for depth in map(float, depths.split(",")):
        place = int(depth * (length - fact.shape[1]))
        context = torch.cat([filler[:, :place], fact, filler[:, place : length - fact.shape[1]]], 1)
        held: list[Any] = read(network, context).layers
        for name, make in makers.items():
            cache = make()
            for number, layer in enumerate(held):
                cache.update(layer.keys, layer.values, number)
            found[name].append(answer(network, cache, question, wanted))
    rows = [
        [name, f"{sum(right for _, right in each)} of {len(each)}", *(f"{loss:.3f}" for loss, _ in each)]
        for name, each in found.items()
    ]
    show(
        f"answers found in {length} tokens, and their loss",
        ["cache", "found", *(f"at {one}" for one in depths.split(","))],
        rows,
    )
    write({"model": model, "length": length, "depths": depths, "caches": found}, target)
