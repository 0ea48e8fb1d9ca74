"""Keep what the dense model says of a text, as its largest logits, and ask a student to say the same."""

from collections.abc import Callable, Sequence
from pathlib import Path

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
        logs, tokens = likeliest(teacher, sample[None].to(teacher.device), count)
        kept[f"logs.{place}"] = logs[0].cpu()
        kept[f"tokens.{place}"] = tokens[0].cpu()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_atomic(file, kept, {"format": "pt"})


@torch.no_grad()
def likeliest(teacher: nn.Module, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` likeliest next tokens at every place of samples, int64 [B, T], or the whole vocabulary if that is less.

    Log-probabilities over the whole vocabulary, float32 [B, T - 1, count], and tokens, int32 of the same shape.
    """
    found = Predictions(teacher, tokens)
    logs = (found.logits(part).log_softmax(-1) for part in found.parts())
    largest = [part.topk(min(count, part.shape[-1])) for part in logs]
    return torch.cat([part.values for part in largest], 1), torch.cat([part.indices for part in largest], 1).int()


def listed_divergence(model: nn.Module, tokens: Tensor, logs: Tensor, listed: Tensor) -> Tensor:
    """Return ``KL(teacher || student)`` of the predictions on samples, int64 [B, T]: float32 [B, T - 1], in nats.

    ``logs`` and ``listed`` are what :func:`likeliest` found. All tokens outside the list are taken as one event.
    """
    return Predictions(model, tokens).each(lambda logits, part: apart(logits, logs[:, part], listed[:, part]))


def apart(logits: Tensor, logs: Tensor, listed: Tensor) -> Tensor:
    """Return the divergence of a student's logits, [..., vocabulary], from a teacher's likeliest tokens, [..., count]: [...], in nats."""
    found = logits.log_softmax(-1).gather(-1, listed.long())
    lost = (logs.exp() * (logs - found)).sum(-1)
    if logs.shape[-1] == logits.shape[-1]:
        return lost
    rest, left = _rest(logs), _rest(found)
    return lost + rest.exp() * (rest - left)


def distillation_loss(file: Path) -> Loss:
    """Return a loss: the divergence of the student's next-token distribution from the cached one, summed over tokens, in nats.

    ``KL(teacher || student)`` with all tokens outside the teacher's list taken as one event: never more than the
    divergence over the whole vocabulary, and equal to it where the list is the vocabulary.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with safe_open(file, framework="pt") as handle:
            logs = [handle.get_tensor(f"logs.{place}") for place in batch.places]
            tokens = [handle.get_tensor(f"tokens.{place}") for place in batch.places]
        device = batch.tokens.device
        wanted, listed = (pad_sequence(part, batch_first=True).to(device) for part in (logs, tokens))
        return listed_divergence(model, batch.tokens, wanted, listed)[batch.scored].sum()

    return loss


def _rest(logs: Tensor) -> Tensor:
    """Return the log-probability of all tokens that are not listed, [..., count] -> [...]."""
    listed = logs.exp().sum(-1).clamp(max=1 - 1e-6)  # the largest may take up all that float32 can tell from 1
    return torch.log1p(-listed)
