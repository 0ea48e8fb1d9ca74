"""Keep what the dense model says of a text, as its largest logits, and ask a student to say the same."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from compress.logits import Predictions
from compress.training import Batch, Loss
from compress.workspace import save_atomic


@torch.no_grad()
def cache_teacher(
    load: Callable[[], PreTrainedModel],
    samples: Sequence[Tensor],
    count: int,
    file: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the teacher's ``count`` likeliest next tokens at every place of every sample (int64 [T]), if that is not done yet.

    The file gets ``logs.i`` (float32 [T - 1, count], log-probabilities over the whole vocabulary) and ``tokens.i`` (int32, the
    same shape) for sample i. It must belong to these samples and this teacher, which is loaded only where there is no file.
    ``progress`` is called with (samples done, samples in all), to tell of progress.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            if len(handle.keys()) == 2 * len(samples):
                return
    except (FileNotFoundError, SafetensorError):
        pass
    teacher = load()
    kept: dict[str, Tensor] = {}
    for place, sample in enumerate(samples):
        progress(place, len(samples))
        found = Predictions(teacher, sample[None].to(teacher.device))
        parts = [_largest(found.logits(part)[0].log_softmax(-1), count) for part in found.parts()]
        kept[f"logs.{place}"] = torch.cat([part.values for part in parts]).cpu()
        kept[f"tokens.{place}"] = torch.cat([part.indices for part in parts]).int().cpu()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_atomic(file, kept, {"format": "pt"})


def distillation_loss(file: Path) -> Loss:
    """Return a loss: the divergence of the student's next-token distribution from the cached one, summed over tokens, in nats.

    ``KL(teacher || student)`` with all tokens outside the teacher's list taken as one event: never more than the
    divergence over the whole vocabulary, and equal to it where the list is the vocabulary.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with safe_open(file, framework="pt") as handle:
            logs = [handle.get_tensor(f"logs.{place}") for place in batch.places]
            tokens = [handle.get_tensor(f"tokens.{place}").long() for place in batch.places]
        device = batch.tokens.device
        wanted = pad_sequence(logs, batch_first=True).to(device)
        places = pad_sequence(tokens, batch_first=True).to(device)

        def apart(logits: Tensor, part: slice) -> Tensor:
            truth, listed = wanted[:, part], logits.log_softmax(-1).gather(-1, places[:, part])
            found = (truth.exp() * (truth - listed)).sum(-1)
            if truth.shape[-1] < logits.shape[-1]:
                rest, left = _rest(truth), _rest(listed)
                found = found + rest.exp() * (rest - left)
            return found

        return Predictions(model, batch.tokens).each(apart)[batch.scored].sum()

    return loss


def _largest(logs: Tensor, count: int) -> Any:
    """Return values and indices of the largest of each row, [T, count]."""
    return logs.topk(min(count, logs.shape[-1]))


def _rest(logs: Tensor) -> Tensor:
    """Return the log-probability of all tokens that are not listed, [..., count] -> [...]."""
    listed = logs.exp().sum(-1).clamp(max=1 - 1e-6)  # the largest may take up all that float32 can tell from 1
    return torch.log1p(-listed)
