"""Show a model to lm-eval's harness; this imports lm-eval, so it is itself imported where tasks are run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.adapters import virtual_tokens
from compress.errors import CompressError
from compress.evals.perplexity import Window, context_length, prepare, window_losses

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

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in nats, as ``compress eval --text`` counts it in its default windows.

        BOS is context and never predicted. lm-eval would predict it where the tokenizer puts it in front, too. Where there is
        none, EOS stands for it, as with lm-eval, so that all of a text is predicted.
        """
        length, found = context_length(self.model), list[float]()
        for number, request in enumerate(requests):
            text = [request.args[0]] if request.args[0] else []
            windows = prepare(text, self.tokenizer, length, begin=[self.prefix_token_id]).windows if text else []
            found.append(-sum(self._loss(windows[i : i + self._rows]) for i in range(0, len(windows), self._rows)))
            self._tell(number + 1, len(requests))
        return found

    @property
    def _rows(self) -> int:
        return self.batch_size if isinstance(self.batch_size, int) else 1

    @torch.inference_mode()
    def _loss(self, windows: Sequence[Window]) -> float:
        return float(window_losses(self.model, windows).sum(dtype=torch.float64))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts, and tell of progress by batches."""
        self._done, self._total = 0, len(requests)
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = super()._model_generate(context, *args, **kwargs)
        self._done = min(self._done + len(context), self._total)
        self._tell(self._done, self._total)
        return made

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None and total:
            self.progress(done, total)

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
        self._tell(self._done, self._total)
        return logits  # type: ignore[no-any-return]


_SEED, _OTHER_SEED = 0, 1234  # lm-eval's own, of ``random`` and of everything else


def run_task(
    harness: Harness, task: str | dict[str, Any], manager: TaskManager, fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """Run one task as lm-eval's ``simple_evaluate`` does, in its schema, but ask neither git nor pip about the machine."""
    random.seed(_SEED)  # tasks shuffle by it
    numpy.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
    loaded = manager.load([task])
    for one in loaded["tasks"].values():
        own = one.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):  # a task that says 0 means it
            one.set_config(key="num_fewshot", value=fewshot or 0)
        one.set_fewshot_seed(seed=_OTHER_SEED)
    found: dict[str, Any] = evaluate(lm=harness, task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=True)
    seeds = {"random_seed": _SEED} | dict.fromkeys(("numpy_seed", "torch_seed", "fewshot_seed"), _OTHER_SEED)
    config = {"model": type(harness).__name__, "model_args": None, **harness.get_model_info(), "limit": limit, **seeds}
    about: dict[str, Any] = {"date": time.time(), "max_length": harness.max_length}
    about |= {f"{package}_version": version(package) for package in ("lm_eval", "transformers")}
    return {**found, "config": {**config, "bootstrap_iters": 1000}, **about}
