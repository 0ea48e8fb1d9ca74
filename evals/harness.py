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
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.adapters import virtual_tokens
from compress.errors import CompressError
from compress.evals.perplexity import BATCH_TOKENS, Window, context_length, prepare, window_losses
from compress.logits import Predictions


class Harness(HFLM):
    """Show lm-eval a loaded causal LM, or a peft model whose virtual tokens take a part of the context.

    Without ``batch`` the rows in a batch are chosen by their length, and where texts are generated on a GPU by lm-eval;
    ``progress`` gets (requests done, in all).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.virtual_tokens, self.progress, self.truncated = virtual_tokens(model), progress, 0
        self._done, self._total, self._batch = 0, 0, batch
        self.began = ""  # what stood in front of documents that were scored whole
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch or "auto")
        if batch is None and self.device.type == "cpu":  # elsewhere lm-eval tries, and halves at out of memory
            self.batch_size_per_gpu = min(32, self._rows(self.max_length))

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
        self.began = str(self.tokenizer.bos_token or self.tokenizer.decode([self.prefix_token_id]))
        for number, request in enumerate(requests):
            text = [request.args[0]] if request.args[0] else []
            windows = prepare(text, self.tokenizer, length, begin=[self.prefix_token_id]).windows if text else []
            step = self._rows(length)
            found.append(-sum(self._loss(windows[i : i + step]) for i in range(0, len(windows), step)))
            self._tell(number + 1, len(requests))
        return found

    def _rows(self, length: int) -> int:
        """Return the rows in a batch of texts, if nobody has said how many."""
        return self._batch or max(1, BATCH_TOKENS // length)

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
        """Return (log-likelihood of the answer, whether each of its tokens is the likeliest) of (_, before, answer).

        What is too long loses its beginning, as with lm-eval. Answers of one token share a run of what is before them.
        """
        longest = max((len(after) for _, _, after in requests), default=0)
        if longest > self.max_length:
            raise CompressError(
                f"an answer has {longest} tokens, but the context holds {self.max_length}; this model can not take the task."
            )
        self.truncated += sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        asked: dict[tuple[int, ...], list[int]] = {}
        for place, (_, before, after) in enumerate(requests):
            asked.setdefault(tuple((before + after)[-self.max_length - 1 : -1]), []).append(place)
        ordered, found = sorted(asked, key=len, reverse=True), [(0.0, False)] * len(requests)
        done = told = 0
        while done < len(ordered):
            batch = ordered[done : done + self._rows(len(ordered[done]))]
            places = [(row, place) for row, text in enumerate(batch) for place in asked[text]]
            answers = self._answers(batch, [(row, requests[place][2]) for row, place in places])
            for (_, place), answer in zip(places, answers, strict=True):
                found[place] = answer
            done, told = done + len(batch), told + len(places)
            self._tell(told, len(requests))
        return found

    @torch.inference_mode()
    def _answers(
        self, texts: Sequence[Sequence[int]], answers: Sequence[tuple[int, list[int]]]
    ) -> list[tuple[float, bool]]:
        """Score answers, (row of the text that ends with all but their last token, tokens)."""
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(self.device)
        ends = [len(texts[row]) for row, _ in answers]
        first = min(end - len(tokens) for end, (_, tokens) in zip(ends, answers, strict=True))
        targets = torch.full((len(answers), max(ends) - first), -1)
        for target, end, (_, tokens) in zip(targets, ends, answers, strict=True):
            target[end - len(tokens) - first : end - first] = torch.tensor(tokens)
        targets, rows = targets.to(self.device), torch.tensor([row for row, _ in answers], device=self.device)

        def score(logits: Tensor, part: slice) -> Tensor:
            wanted = targets[:, part]
            columns = torch.arange(wanted.shape[1], device=wanted.device)
            logs = logits.log_softmax(-1)[rows[:, None], columns, wanted.clamp(min=0)]
            return torch.stack([logs, (logits.argmax(-1)[rows] == wanted).float()], -1)

        found = Predictions(self.model, ids, range(first, max(ends))).each(score).double()
        scored = targets >= 0
        sums = (found[..., 0] * scored).sum(1)
        return list(zip(sums.tolist(), ((found[..., 1] == 1) | ~scored).all(1).tolist(), strict=True))


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
