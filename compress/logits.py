"""Make the logits of many positions a part at a time, so that memory does not grow with text times vocabulary."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from compress.models import text_config

LOGITS_BYTES = 1 << 28
"""The most bytes of float32 logits that are made at a time."""


class Predictions:
    """Hold what a causal LM predicts at positions of some texts: logits where they are few, else what its head is given.

    The head is then run a part at a time, by the model itself, so that whatever it does to the head's output (scaling, soft
    capping) is done: it is called on one token a row, and its head on what is to be predicted from.

    Args:
        model: causal LM, possibly within adapters or behind a prompt.
        tokens: int64 [B, T], padded on the right.
        wanted: positions in ``tokens`` to predict the next token from; all but the last if None.
        **options: for the model, a cache for example; there is none by default.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, wanted: range | None = None, **options: Any) -> None:
        self._model, self._tokens = model, tokens
        chosen = range(tokens.shape[1] - 1) if wanted is None else wanted
        self.count, after = len(chosen), tokens.shape[1] - chosen.stop  # a prompt lies before them
        self._hidden: Tensor | None = None

        def keep(hidden: Tensor) -> Tensor:
            made = hidden if wanted is None else self._cut(hidden, after)
            if 4 * made.shape[0] * made.shape[1] * _vocabulary(model) <= LOGITS_BYTES:
                return made
            self._hidden = self._cut(hidden, after)
            return hidden[:, -1:]

        with _before_head(model, keep) as found:
            logits: Tensor = model(input_ids=tokens, **{"use_cache": False, **options}).logits
        self._logits = logits if found and wanted is not None else self._cut(logits, after)

    def _cut(self, values: Tensor, after: int) -> Tensor:
        """Return what is wanted of [B, S, ...]; ``after`` are the positions behind it."""
        end = values.shape[1] - after
        return values[:, end - self.count : end]

    def parts(self) -> Iterator[slice]:
        """Yield the positions that are in memory together, counted from the first that is wanted."""
        step = self.count
        if self._hidden is not None:
            step = max(1, LOGITS_BYTES // (4 * len(self._hidden) * _vocabulary(self._model)))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def logits(self, part: slice) -> Tensor:
        """Return the logits of a part, float32 [B, positions, vocabulary]."""
        return self._logits[:, part].float() if self._hidden is None else self._made(self._hidden[:, part])

    def each(self, score: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Join what ``score`` makes of the logits of every part, [B, positions, ...]; gradients make the logits again."""
        if self._hidden is None:
            return score(self.logits(slice(0, self.count)), slice(0, self.count))
        found = []
        for part in self.parts():

            def scored(hidden: Tensor, part: slice = part) -> Tensor:
                return score(self._made(hidden), part)

            hidden = self._hidden[:, part]
            again = torch.is_grad_enabled() and hidden.requires_grad
            found.append(checkpoint(scored, hidden, use_reentrant=False) if again else scored(hidden))
        return torch.cat(found, 1)

    def _made(self, hidden: Tensor) -> Tensor:
        with _before_head(self._model, lambda _: hidden):
            logits: Tensor = _innermost(self._model)(input_ids=self._tokens[:, :1], use_cache=False).logits
        return logits.float()


def token_losses(
    model: nn.Module, tokens: Tensor, after: Tensor | None = None, wanted: range | None = None, **options: Any
) -> Tensor:
    """Compute the negative log-likelihood of every text's tokens but its first: float32 [B, T - 1], in nats.

    Arguments as of :class:`Predictions`; ``after``, int64 [B, N], are the tokens after those at ``wanted``, which are the first N if it
    is None: losses are [B, N] then.
    """
    targets = tokens[:, 1:] if after is None else after
    chosen = range(after.shape[1]) if after is not None and wanted is None else wanted

    return Predictions(model, tokens, chosen, **options).each(lambda logits, part: losses_of(logits, targets[:, part]))


def losses_of(logits: Tensor, after: Tensor) -> Tensor:
    """Return the negative log-likelihoods of tokens, int64 [B, T], under logits, [B, T, vocabulary]: float32 [B, T], in nats."""
    # A row for each position: with the vocabulary second, of three dimensions, it takes ten times as long.
    return cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="none").view(after.shape)


def run_inside(model: nn.Module, tokens: Tensor) -> None:
    """Run a causal LM on texts, int64 [B, T], for what its hooks see; logits are made of one position only."""
    Predictions(model, tokens, range(1))


def _innermost(model: Any) -> Any:
    """Return the model within adapters and prompts."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def _vocabulary(model: Any) -> int:
    config = getattr(model, "config", None)
    return 0 if config is None else int(getattr(text_config(config), "vocab_size", 0))


@contextmanager
def _before_head(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[list[bool]]:
    """Give a model's head, for this thread and the length of a ``with``, what ``change`` makes of its input [B, T, hidden].

    What is yielded is not empty once that has happened: some models have no head that is a module.
    """
    inner, thread, found = _innermost(model), threading.get_ident(), list[bool]()
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        yield found
        return

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread or not args or args[0].dim() != 3:
            return None
        found.append(True)
        return (change(args[0]).contiguous(), *args[1:])  # a part of rows would be multiplied row by row

    handle = head.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
