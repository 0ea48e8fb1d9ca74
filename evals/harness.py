"""Show a model to lm-eval's harness; this imports lm-eval, so it is itself imported where tasks are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.adapters import virtual_tokens
from compress.errors import CompressError

_LOGITS = 1 << 28  # bytes of float32 logits in a batch on the CPU, where nothing tells that memory runs out


class Harness(HFLM):
    """Show lm-eval a loaded causal LM, or a peft model whose virtual tokens take a part of the context.

    The rows in a batch are chosen by the machine's memory if ``batch`` is None; ``progress`` gets (requests done, in all).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.virtual_tokens, self.progress, self.truncated = virtual_tokens(model), progress, 0
        self._done = self._total = 0
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch or "auto")
        if batch is None and self.device.type == "cpu":  # elsewhere lm-eval tries, and halves at out of memory
            self.batch_size_per_gpu = min(32, max(1, _LOGITS // (4 * self.max_length * len(tokenizer))))

    @property
    def max_length(self) -> int:
        """Return the tokens of text that fit; virtual tokens take their part."""
        return int(super().max_length) - self.virtual_tokens

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any) -> list[Any]:
        longest = max((len(after) for _, _, after in requests), default=0)
        if longest > self.max_length:
            raise CompressError(
                f"an answer has {longest} tokens, but the context holds {self.max_length}; this model can not take the task."
            )
        self.truncated += sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        self._done, self._total = 0, len(requests)
        return list(super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **kwargs))

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.inference_mode():
            logits = super()._model_call(inps, *args, **kwargs)
        self._done = min(self._done + len(inps), self._total)
        if self.progress is not None and self._total:
            self.progress(self._done, self._total)
        return logits  # type: ignore[no-any-return]
