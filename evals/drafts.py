"""Measure what a model's own low planes gain as a draft: ``compress bench --draft-bits``.

Plain decoding, prompt look-up and every draft continue each prompt in turn, in an order that rotates; all greedy, so that the texts
have to be the same. What a drafted token and a checked one cost is measured first, on the same model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.drafting import Decoding, Drafting, view
from compress.errors import CompressError
from compress.evals.evaluate import Protocol, documents_of
from compress.evals.timing import now, spread
from compress.hf import cache_name
from compress.loading import load_tokenizer
from compress.passes import Progress

PLAIN, LOOK_UP = "plain", "prompt look-up"
_CHECKED = 4  # tokens in the pass whose cost is measured
_PROMPT = 48  # tokens


@torch.inference_mode()
def draft_speed(
    model: PreTrainedModel,
    starts: Sequence[Tensor],
    bits: Sequence[int],
    tokens: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode with drafts at several numbers of bits, with prompt look-up and without any.

    Args:
        model: at the bits that check.
        starts: the prompts (:func:`beginnings`), int64 [1, T] each.
        bits: of drafts, which round activations to 8 bits on a CPU.
        tokens: written to each prompt.
        progress: called with (what, done, total).

    Returns:
        ``{"plain" | "prompt look-up" | "3": {"tokens_per_second", "versus_plain": {"median", "low", "high"}, "same_text"}}``, and of a
        draft ``accepted`` (share of its tokens), ``drafted_per_round``, ``cost`` and ``check`` (of a drafted and of a checked
        token, in plain ones) and ``break_even``, the accepted share at which a draft of one token pays.

    Raises:
        CompressError: bits that were not loaded.
    """
    drafts = {str(one): view(model, one, exact=False) for one in bits}
    single, several = _step_time(model, 1), _step_time(model, _CHECKED)
    check = max(0.0, several / single - 1) / (_CHECKED - 1)
    costs = {name: _step_time(draft, 1) / single for name, draft in drafts.items()}
    loops = {name: Drafting(draft, costs[name], check) for name, draft in drafts.items()}
    options: dict[str, dict[str, Any]] = {
        PLAIN: {"custom_generate": Decoding()},
        LOOK_UP: {"prompt_lookup_num_tokens": _CHECKED - 1},
    }
    options |= {name: {"custom_generate": loop} for name, loop in loops.items()}
    names = list(options)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    same = dict.fromkeys(names, True)
    for turn, start in enumerate(starts):
        written: dict[str, Tensor] = {}
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            begun = now(start.device)
            written[name] = _continued(model, start, tokens, options[name])
            seconds[name].append((now(start.device) - begun) / tokens)
            (progress or _silent)(f"drafts, {name}", turn * len(names) + place + 1, len(starts) * len(names))
        same = {name: same[name] and torch.equal(written[name], written[PLAIN]) for name in names}
    found = {name: _figures(seconds[name], seconds[PLAIN]) | {"same_text": same[name]} for name in names}
    for name, loop in loops.items():
        accepted, each = loop.accepted / max(1, loop.drafted), loop.drafted / max(1, loop.rounds)
        found[name] |= {"accepted": accepted, "drafted_per_round": each, "cost": costs[name], "check": check}
        found[name]["break_even"] = costs[name] + check
    return found


def _silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


def beginnings(folder: str, text: str, count: int) -> list[Tensor]:
    """Return so many prompts for a folder's model, int64 [1, T] each: beginnings of a text's documents, or pieces of a single one.

    ``text`` is a file's name or ``builtin``.

    Raises:
        CompressError: there is no such text, or no document is long enough.
    """
    tokenizer, (documents, _) = load_tokenizer(folder), documents_of(text, Protocol())
    found: list[Tensor] = []
    for document in documents:
        ids = torch.tensor([tokenizer(document[: 16 * _PROMPT * count])["input_ids"]])
        pieces = [piece for piece in torch.split(ids, _PROMPT, 1) if piece.shape[1] == _PROMPT]
        found += pieces if len(documents) < count else pieces[:1]
    if not found:
        raise CompressError(f"{text}: has no document of {_PROMPT} tokens to continue; give a longer text.")
    return found[:count]


def _continued(model: Any, start: Tensor, tokens: int, options: dict[str, Any]) -> Tensor:
    """Return a prompt and what is written after it, greedily, whatever would end it."""
    fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    made: Tensor = model.generate(start, attention_mask=torch.ones_like(start), **fixed, **options)
    return made


def _step_time(model: Any, count: int) -> float:
    """Return the seconds of a pass over so many tokens behind a few, the median of several."""
    name, token = cache_name(model), torch.zeros(1, count, dtype=torch.long, device=model.device)
    cache, taken = model(input_ids=token[:, :1].expand(1, _PROMPT), use_cache=True)[name], []
    for turn in range(12):
        begun = now(token.device)
        cache = model(input_ids=token, use_cache=True, logits_to_keep=count, **{name: cache})[name]
        taken += [now(token.device) - begun] if turn > 1 else []
    return statistics.median(taken)


def _figures(seconds: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    ratios = [theirs / ours for theirs, ours in zip(plain, seconds, strict=True)]
    return {"tokens_per_second": spread([1 / one for one in seconds]), "versus_plain": spread(ratios)}
