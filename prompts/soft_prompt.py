"""Compress, then prompt (arXiv 2305.11186): virtual tokens before the text, trained on the compressed model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration import token_ids
from compress.distillation import cache_teacher, distillation_loss
from compress.errors import CompressError
from compress.hf import packed_modules
from compress.loading import set_bits
from compress.passes import Context, Needs, Pass, Whole
from compress.processes import processes
from compress.prompts.stored import adapter_fields, embedding, new_prompt, write_prompt
from compress.quant.format import PackedShape
from compress.sidecars import PROMPTS_FOLDER
from compress.training import Loss, TrainingConfig, held_out_losses, next_token_loss, train
from compress.workspace import Record

_STEPS = {"steps": 30_000, "batch": 2, "micro_batch": 2, "warmup": 500, "validate_every": 100}
_RATE = {"learning_rate": 1e-3, "relative": False, "weight_decay": 0.0, "clip": 1.0}
PAPER: dict[str, Any] = {"tokens": 100, "start": "vocabulary", **_STEPS, **_RATE}
"""What the authors' scripts set; they train on 1024 tokens at a time, which is for ``text`` to say."""


class SoftPromptConfig(TrainingConfig):
    """Train virtual tokens that stand before every text, on the compressed model as it is; nothing else changes.

    They are stored beside the model as ordinary peft adapters, in ``soft_prompt/``. They take ``tokens`` places of the
    context, so samples are cut to what is left of it.
    """

    kind: Literal["soft_prompt"] = Field("soft_prompt", description="Name of the pass.")
    preset: Literal["paper"] | None = Field(
        None, description="'paper' takes the published settings for every key that is not given."
    )
    tokens: int = Field(100, ge=1, description="Virtual tokens.")
    method: Literal["prompt", "prefix"] = Field(
        "prompt", description="Embeddings before the text, or keys and values of every block (prefix tuning)."
    )
    start: Literal["text", "vocabulary", "words"] = Field(
        "text",
        description="What a prompt begins as: start_text; the first rows of the embedding, as in the paper; or rows drawn by "
        "the seed. A prefix begins as the keys and values of these tokens.",
    )
    start_text: str | None = Field(
        None,
        description="Repeated or cut to the number of virtual tokens; the beginning of the training text if absent.",
    )
    widths: tuple[int, ...] = Field((), description="Widths of a quantised model to train at; all if none is given.")
    per_width: bool = Field(
        False, description="A prompt for each width, rather than one for all, which draws a width for every step."
    )
    distill: int = Field(
        0,
        ge=0,
        description="Learn the dense model's next-token distribution, of which so many likeliest tokens are kept, in place of "
        "the text; 0 learns the text.",
    )
    learning_rate: float = Field(0.2, gt=0, description="At its largest, after the warm-up; it falls linearly to 0.")
    relative: bool = Field(
        True,
        description="learning_rate is a share of the root mean square of what the prompt begins as, which fits one model and "
        "another; if false it is taken as it is, as in the paper.",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        return {**PAPER, **data} if isinstance(data, Mapping) and data.get("preset") == "paper" else data

    @model_validator(mode="after")
    def _start(self) -> SoftPromptConfig:
        if self.start_text is not None and self.start != "text":
            raise ValueError("start_text goes with start: text")
        return self


class SoftPrompt(Pass[SoftPromptConfig]):
    """Train each prompt in a unit of its own."""

    Config = SoftPromptConfig

    def needs(self) -> Needs:
        """Ask for the whole model as it will be used, and for the dense one only to learn from it."""
        return Needs(whole_model=True, teacher=bool(self.config.distill), beside=True, text=self.config.text)

    def check(self, context: Context) -> None:
        """Refuse a prompt that leaves no room for text.

        Raises:
            CompressError: that, or a starting text without tokens.
        """
        limit, tokens = context.context_length, self.config.tokens
        if limit is not None and limit - tokens < 2:
            raise CompressError(
                f"soft_prompt: {tokens} virtual tokens leave no room for text in a context of {limit}; lower tokens."
            )
        if self.config.start_text is not None:
            self._given_tokens(self.config.start_text, context)

    def model_units(self, packed: Mapping[str, PackedShape]) -> list[str]:
        """Name the units: ``prompt``, or one for each number of bits.

        Raises:
            CompressError: a width that the model does not have.
        """
        there = sorted({bits for shape in packed.values() for bits in shape.widths})
        for bits in self.config.widths:
            if bits not in there:
                span = f"{there[0]} to {there[-1]}" if there else "none, as no pass before has quantised it"
                raise CompressError(f"soft_prompt: width {bits} is not among those of the model ({span}).")
        if not self.config.per_width:
            return ["prompt"]
        if not there:
            raise CompressError("soft_prompt: per_width needs a quantised model; put a quantising pass before it.")
        return [f"{bits}bit" for bits in there if bits in (self.config.widths or there)]

    def run_model(
        self, unit: str, whole: Whole, context: Context, report: Callable[[str, int, int], None]
    ) -> tuple[dict[str, Tensor], Record]:
        """Train one prompt.

        The record's ``without`` is the held-out loss without any prompt, which one that is any good beats.
        """
        model = whole.model
        found = {name: module.bits for name, module in packed_modules(model).items()}
        samples = [self._cut(sample, context) for sample in whole.samples]
        start = self._begin(whole, context)
        config = self._scaled(start)
        prompted = new_prompt(model, config.method, start)
        states = {str(bits): partial(set_bits, model, bits) for bits in self._widths(unit, model)}
        loss: Loss = next_token_loss
        if config.distill:
            file = whole.scratch / "teacher.safetensors"
            tell = partial(report, "what the dense model says")
            with processes(model.device).main_process_first():
                cache_teacher(lambda: whole.dense, samples, config.distill, file, tell)
            loss = distillation_loss(file)
        with prompted.disable_adapter():
            without = held_out_losses(prompted, samples, config, model.device, loss=loss, states=states)
        trained = train(
            prompted,
            samples,
            config,
            context.seed,
            loss=loss,
            states=states,
            folder=whole.scratch,
            report=lambda what, done, total: report(f"{unit}, {what}", done, total),
        )
        for name, bits in found.items():
            packed_modules(model)[name].bits = bits
        record = {
            "adapter": adapter_fields(prompted),
            "widths": [int(bits) for bits in states],
            "without": without,
            **trained.record(),
        }
        return {"prompt_embeddings": embedding(prompted).detach().to("cpu", copy=True)}, record

    def write_files(
        self, folder: Path, units: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Record]
    ) -> None:
        """Write each prompt as a peft adapter of its own."""
        for unit, tensors in units.items():
            place = folder / PROMPTS_FOLDER if unit == "prompt" else folder / PROMPTS_FOLDER / unit
            write_prompt(place, tensors["prompt_embeddings"], records[unit]["adapter"])

    def _widths(self, unit: str, model: torch.nn.Module) -> list[int]:
        """List the bits that a unit's prompt is trained at; none where nothing is packed."""
        if unit != "prompt":
            return [int(unit.removesuffix("bit"))]
        there = sorted({bits for module in packed_modules(model).values() for bits in module.shape.widths})
        return [bits for bits in there if bits in (self.config.widths or there)]

    def _cut(self, sample: Tensor, context: Context) -> Tensor:
        """Return what of a sample fits beside the prompt."""
        return sample if context.context_length is None else sample[: context.context_length - self.config.tokens]

    def _scaled(self, start: Tensor) -> SoftPromptConfig:
        """Return the settings with an absolute learning rate."""
        if not self.config.relative:
            return self.config
        size = float(start.square().mean().sqrt())
        return self.config.model_copy(update={"learning_rate": self.config.learning_rate * size})

    @torch.no_grad()
    def _begin(self, whole: Whole, context: Context) -> Tensor:
        """Return what the prompt begins as, float32 [tokens, hidden]; of a prefix [tokens, 2 · blocks · keys]."""
        rows, count = int(whole.model.config.vocab_size), torch.arange(self.config.tokens)
        if self.config.start == "vocabulary":
            ids = count % rows
        elif self.config.start == "words":
            ids = torch.randperm(rows, generator=context.generator(0))[count % rows]
        else:
            text = self.config.start_text
            # The first sample is held out.
            given = whole.samples[:2][-1] if text is None else self._given_tokens(text, context)
            ids = given[count % len(given)]
        ids = ids.to(whole.model.device)
        if self.config.method == "prompt":
            embedded: Tensor = whole.model.get_input_embeddings()(ids)
            return embedded.float()
        cache = whole.model(input_ids=ids[None], use_cache=True).past_key_values
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]  # [1, heads, tokens, size] each
        return torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=1).float()

    @staticmethod
    def _given_tokens(text: str, context: Context) -> Tensor:
        assert context.tokenizer is not None
        tokens = token_ids(context.tokenizer, text)
        if not tokens:
            raise CompressError("soft_prompt: start_text has no tokens; give some words.")
        return torch.tensor(tokens)
