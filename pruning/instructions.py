"""Read instruction data from a file: prompts that are only read, answers that are learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from compress.errors import CompressError
from compress.logits import token_losses
from compress.settings import Calibration
from compress.tokens import bos_tokens, token_ids
from compress.training import Batch, Loss

ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{given}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Instruction:
    """Hold one sample: int64 [T] tokens of a prompt, its answer and the end of text; how many are the prompt."""

    tokens: Tensor
    prompt: int


def read_instructions(text: Calibration, tokenizer: PreTrainedTokenizerBase) -> list[Instruction]:
    """Read the first lines of a file whose answers begin within the length.

    ``text`` names a JSON lines file with the keys ``instruction``, ``output`` and, possibly empty, ``input``.

    Raises:
        CompressError: not such a file, or too few lines.
    """
    assert text.text is not None
    path = Path(text.text)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    found: list[Instruction] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        prompts = [(_prompt(row["instruction"], row.get("input") or ""), str(row["output"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(
            f"instructions {path}: not JSON lines with the keys instruction and output ({error})."
        ) from error
    for prompt, answer in prompts:
        start = bos_tokens(tokenizer) + token_ids(tokenizer, prompt)
        tokens = (start + token_ids(tokenizer, answer) + end)[: text.length]
        if len(tokens) > len(start) and len(found) < text.samples:
            found.append(Instruction(torch.tensor(tokens, dtype=torch.long), len(start)))
    if len(found) < text.samples:
        raise CompressError(
            f"instructions {path}: {text.samples} samples asked for, but {len(found)} answers begin within {text.length} tokens; "
            "lower samples or raise length."
        )
    return found


def _prompt(instruction: str, given: str) -> str:
    return ALPACA.format(
        paired=PAIRED if given else "", instruction=instruction, given=f"### Input:\n{given}\n\n" if given else ""
    )


def answer_loss(samples: Sequence[Instruction]) -> Loss:
    """Return the cross-entropy of answers only, as a loss to train with.

    Each sample's mean counts as many times as it has predicted tokens, prompt included.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        targets = batch.tokens[:, 1:]
        losses = token_losses(model, batch.tokens)
        first = torch.tensor([samples[place].prompt - 1 for place in batch.places], device=targets.device)
        answer = batch.scored & (torch.arange(targets.shape[1], device=targets.device) >= first[:, None])
        return ((losses * answer).sum(1) / answer.sum(1) * batch.scored.sum(1)).sum()

    return loss
