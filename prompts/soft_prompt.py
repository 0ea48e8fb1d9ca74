"""Train virtual tokens before the text on the compressed model itself: compress, then prompt (arXiv 2305.11186)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compress.distillation import cache_teacher, distillation_loss
from compress.errors import CompressError
from compress.following import check_embeddings
from compress.hf import cache_name, packed_modules
from compress.loading import set_bits
from compress.models import text_config
from compress.passes import Context, Needs, Pass, Whole, Work
from compress.prompts.settings import SoftPromptConfig
from compress.prompts.stored import adapter_fields, embedding, new_prompt, write_prompt
from compress.quant.records import PackedShape, bits_range
from compress.ranks import processes
from compress.shapes import config_shape
from compress.sidecars import PROMPTS_FOLDER
from compress.streaming import built
from compress.tokens import token_ids
from compress.training import Loss, held_out_losses, hold_out, next_token_loss, train, training_work
from compress.workspace import Record


class SoftPrompt(Pass[SoftPromptConfig]):
    """Train each prompt in a unit of its own."""

    Config = SoftPromptConfig

    def needs(self) -> Needs:
        """Ask for the whole model as it will be used, and for the dense one only to learn from it."""
        teacher = bool(self.config.distill)
        return Needs(whole_model=True, divides=True, teacher=teacher, sidecar=True, text=self.config.text)

    def check(self, context: Context) -> None:
        """Refuse a prompt that leaves no room for text.

        Raises:
            CompressError: that, a prefix for blocks of different sizes, a starting text without tokens, or a model that takes
                no embeddings.
        """
        limit, tokens = context.context_length, self.config.tokens
        if limit is not None and limit - tokens < 2:
            raise CompressError(
                f"soft_prompt: {tokens} virtual tokens leave no room for text in a context of {limit}; lower tokens."
            )
        heads = {shape.key_value_heads for shape in context.shapes.values()}
        if self.config.method == "prefix" and heads and heads - {config_shape(context.config).key_value_heads}:
            raise CompressError(
                "soft_prompt: a prefix has keys for the heads that config.json names in every block, but a pass before leaves blocks "
                "with fewer; take method prompt, or prune in mode uniform."
            )
        if self.config.start_text is not None:
            self._given_tokens(self.config.start_text, context)
        if self.config.method == "prompt":
            check_embeddings(built(context.config, {}, context.shapes), context.structure)

    def model_units(self, packed: Mapping[str, PackedShape]) -> list[str]:
        """Name the units: ``prompt``, or one for each number of bits.

        Raises:
            CompressError: bits that the model does not have.
        """
        chosen, there = self._bits(packed.values())
        for bits in self.config.widths:
            if bits not in there:
                span = f"{there[0]} to {there[-1]}" if there else "none, as no pass before has quantised it"
                raise CompressError(f"soft_prompt: {bits} bits are not among those of the model ({span}).")
        if not self.config.per_width:
            return ["prompt"]
        if not there:
            raise CompressError("soft_prompt: per_width needs a quantised model; put a quantising pass before it.")
        return [f"{bits}bit" for bits in chosen]

    def work(self, samples: int, length: int, packed: Mapping[str, PackedShape]) -> Work:
        """Count its trainings, the validation without a prompt and what the dense model is asked."""
        states = max(1, len(self._bits(packed.values())[0]))
        found = training_work(self.config, samples, length + self.config.tokens, states)
        held, taught = len(hold_out(samples, self.config.held_out)[1]), samples if self.config.distill else 0
        trainings = states if self.config.per_width else 1
        return replace(found, trained=trainings * found.trained, scored=found.scored + states * held + taught)

    def _bits(self, packed: Iterable[PackedShape]) -> tuple[list[int], list[int]]:
        """List the numbers of bits to train at, and all that the model has."""
        there = list(bits_range(packed))
        return [bits for bits in there if bits in (self.config.widths or there)], there

    def run_model(
        self, unit: str, whole: Whole, context: Context, progress: Callable[[str, int, int], None]
    ) -> tuple[dict[str, Tensor], Record]:
        """Train one prompt.

        The record's ``without`` is the held-out loss without any prompt, which one that is any good beats.
        """
        model, config, room = whole.model, self.config, context.context_length
        packed = packed_modules(model).values()
        found = {module: module.bits for module in packed}
        samples = [sample if room is None else sample[: room - config.tokens] for sample in whole.samples]
        start = self._begin(whole, context)
        if config.relative:
            scale = float(start.square().mean().sqrt())
            config = config.model_copy(update={"learning_rate": config.learning_rate * scale})
        prompted = new_prompt(model, config.method, start)
        chosen, _ = self._bits(module.shape for module in packed)
        used = chosen if unit == "prompt" else [int(unit.removesuffix("bit"))]
        states = {str(bits): partial(set_bits, model, bits) for bits in used}
        loss: Loss = next_token_loss
        if config.distill:
            file = whole.scratch / "teacher.safetensors"
            tell = partial(progress, "what the dense model says")
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
            progress=lambda what, done, total: progress(f"{unit}, {what}", done, total),
        )
        for module, bits in found.items():
            module.bits = bits
        record = {"adapter": adapter_fields(prompted), "widths": used, "without": without, **trained.record()}
        return {"prompt_embeddings": embedding(prompted).detach().to("cpu", copy=True)}, record

    def write_files(
        self, folder: Path, units: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Record]
    ) -> None:
        """Write each prompt as a peft adapter of its own."""
        for unit, tensors in units.items():
            place = folder / PROMPTS_FOLDER if unit == "prompt" else folder / PROMPTS_FOLDER / unit
            write_prompt(place, tensors["prompt_embeddings"], records[unit]["adapter"])

    @torch.no_grad()
    def _begin(self, whole: Whole, context: Context) -> Tensor:
        """Return what the prompt begins as, float32 [tokens, embedding width]; of a prefix [tokens, 2 · blocks · keys]."""
        rows, count = int(text_config(whole.model.config).vocab_size), torch.arange(self.config.tokens)
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
        cache = whole.model(input_ids=ids[None], use_cache=True)[cache_name(whole.model)]
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]  # [1, heads, tokens, size] each
        return torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=1).float()

    @staticmethod
    def _given_tokens(text: str, context: Context) -> Tensor:
        assert context.tokenizer is not None
        tokens = token_ids(context.tokenizer, text, special_tokens=True)  # written for this model
        if not tokens:
            raise CompressError("soft_prompt: start_text has no tokens; give some words.")
        return torch.tensor(tokens)
