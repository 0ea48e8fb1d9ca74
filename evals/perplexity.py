"""Compute loss, perplexity and bits per byte of a text, averaged over scored tokens only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.adapters import text_length, virtual_tokens
from compress.defaults import usual_defaults
from compress.errors import CompressError
from compress.logits import token_losses
from compress.tokens import bos_tokens, front_tokens, reading, token_ids

BATCH_TOKENS = 8192
"""Tokens that are run through a model at once; the logits of some of them are made at a time."""


@dataclass(frozen=True)
class Score:
    """Hold the result of one model on one text."""

    loss: float  # mean negative log-likelihood of a predicted token, in nats
    perplexity: float
    bits_per_byte: float  # summed negative log-likelihood in bits over the UTF-8 bytes that were predicted
    tokens: int  # predicted
    bytes: int  # predicted
    virtual: int = 0  # places that a soft prompt took in all windows together; they are not among ``tokens``

    @property
    def diluted_perplexity(self) -> float:
        """Return the perplexity with the prompt's own places counted as predicted without loss, to compare with figures so published."""
        return math.exp(min(700.0, self.loss * self.tokens / (self.tokens + self.virtual)))

    def json(self) -> dict[str, float | int]:
        """Return plain data; with a prompt also its places and the diluted perplexity."""
        plain = asdict(self)
        virtual = plain.pop("virtual")
        return plain | ({"virtual": virtual, "diluted_perplexity": self.diluted_perplexity} if virtual else {})


class Window(NamedTuple):
    """Hold a stretch of one document: ``tokens`` [T], of which the last ``scored`` are predicted."""

    tokens: list[int]
    scored: int


class Text(NamedTuple):
    """Hold a text ready to be scored: every token after a document's first is scored in just one window."""

    windows: list[Window]
    bytes: int  # of all scored tokens, in UTF-8


def prepare(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    stride: int | None = None,
    truncate: bool = False,
    disjoint: bool = False,
    special_tokens: bool = False,
    begin: Sequence[int] = (),
) -> Text:
    """Cut documents into windows.

    BOS is put in front of every document, or ``begin`` where the tokenizer has none; where there is neither, the first token is
    not predicted. What else the tokenizer
    itself begins texts with, as a baked prompt's does, stands in front of every window and is never predicted. Special tokens
    that a text spells are read as text unless ``special_tokens``. A document longer than ``length`` continues in windows that advance by ``stride`` tokens, each
    scoring only what no earlier one has, so every token is scored once with at least ``length - stride`` before it;
    ``truncate`` stops after a document's first window. ``disjoint`` is the papers' way: windows side by side, each without
    the others' tokens, its first token not predicted; what is left over is not scored.
    """
    front = front_tokens(tokenizer)
    length -= len(front)
    step = max(1, length // 2) if stride is None else stride
    if length < 2 or not 1 <= step < length:
        raise CompressError(
            f"windows of {length} tokens with stride {step}: the length must be at least 2, and 1 <= stride < length."
        )
    start = bos_tokens(tokenizer) or list(begin)
    windows: list[Window] = []
    size = 0
    for text in documents:
        ids = token_ids(tokenizer, text, special_tokens)
        tokens = [*start, *ids][: length if truncate else None]
        if len(tokens) < 2:
            continue
        if disjoint:
            ends = range(length, len(tokens) + 1, length)
            windows += [Window(front + tokens[end - length : end], length - 1) for end in ends]
            scored = [(end - length + 1 - len(start), end - len(start)) for end in ends]
        else:
            windows += [Window(front + window.tokens, window.scored) for window in _cut(tokens, length, step)]
            scored = [(1 - len(start), len(tokens) - len(start))]  # without BOS the first token is context only
        size += _bytes_of(text, ids, tokenizer, scored, special_tokens)
    if not windows:
        what = f"a window of {length} tokens" if disjoint else "a token to predict"
        raise CompressError(f"the text has no document with {what}.")
    return Text(windows, size)


def _cut(tokens: list[int], length: int, stride: int) -> Iterator[Window]:
    end = min(length, len(tokens))
    yield Window(tokens[:end], end - 1)
    while end < len(tokens):
        scored = min(stride, len(tokens) - end)
        end += scored
        yield Window(tokens[max(0, end - length) : end], scored)


def _bytes_of(
    text: str,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    scored: Sequence[tuple[int, int]],
    special_tokens: bool,
) -> int:
    """Count the UTF-8 bytes of a document's tokens from ``first`` to ``last``, summed over stretches."""
    if list(scored) == [(0, len(ids))]:
        return len(text.encode())
    if not tokenizer.is_fast:
        return sum(len(str(tokenizer.decode(ids[first:last])).encode()) for first, last in scored)
    spans = tokenizer(text, return_offsets_mapping=True, **reading(special_tokens))["offset_mapping"]
    size = 0
    for first, last in scored:
        start = spans[first - 1][1] if first else 0  # some tokenizers leave a token's leading space out of its span
        size += len(text[start : len(text) if last == len(ids) else spans[last - 1][1]].encode())
    return size


@usual_defaults()
@torch.no_grad()
def score(
    model: PreTrainedModel,
    text: Text,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    losses: Callable[[PreTrainedModel, Sequence[Window]], Tensor] | None = None,
) -> Score:
    """Score a prepared text with a causal LM in evaluation mode; a soft prompt stands before every window.

    ``losses`` computes the negative log-likelihoods of some windows, [windows, T - 1], zero where nothing is scored; without
    it each is one call of the model, without a cache.
    """
    losses = losses or window_losses
    # Padding is on the right, without a mask: causal attention keeps it from changing what is scored.
    ordered = sorted(text.windows, key=lambda window: (len(window.tokens), -window.scored), reverse=True)
    total, tokens, done = 0.0, 0, 0
    while done < len(ordered):
        count = max(1, batch_tokens // len(ordered[done].tokens))
        batch = ordered[done : done + count]
        total += float(losses(model, batch).sum(dtype=torch.float64))
        tokens += sum(window.scored for window in batch)
        done += len(batch)
        if progress is not None:
            progress(done, len(ordered))
    loss = total / tokens
    if math.isnan(loss):
        raise CompressError("the model's loss on this text is not a number; its weights or its arithmetic are damaged.")
    perplexity = math.exp(loss) if loss < 700 else math.inf
    virtual = virtual_tokens(model) * len(ordered)
    return Score(loss, perplexity, total / math.log(2) / text.bytes, tokens, text.bytes, virtual)


def as_tensors(batch: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens, padded on the right, [windows, T], and where the next one is scored, bool [windows, T - 1]."""
    longest = max(len(window.tokens) for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    wanted = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    for row, window in enumerate(batch):
        size = len(window.tokens)
        ids[row, :size] = torch.tensor(window.tokens)
        wanted[row, size - 1 - window.scored : size - 1] = True
    return ids.to(device), wanted.to(device)


def window_losses(model: PreTrainedModel, batch: Sequence[Window]) -> Tensor:
    """Return the negative log-likelihoods of the scored tokens, zero elsewhere: [windows, T - 1]."""
    ids, wanted = as_tensors(batch, model.device)
    first = min(len(window.tokens) - 1 - window.scored for window in batch)
    losses = torch.zeros(wanted.shape, device=ids.device)  # logits are made from the first position that is scored
    losses[:, first:] = token_losses(model, ids, ids[:, first + 1 :], range(first, wanted.shape[1]))
    return losses.masked_fill(~wanted, 0.0)


def context_length(model: PreTrainedModel, cap: int = 2048) -> int:
    """Return the tokens in a window unless told otherwise: the model's context, at most ``cap``, less what a prompt takes."""
    return text_length(model, cap) or cap
