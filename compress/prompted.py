"""Run a model behind a soft prompt so that no row of a batch depends on the others (imports peft: import it late).

peft alone puts virtual tokens before the padding of rows padded on the left, where positions between prompt and text depend on
the longest row, and takes part in every step of ``generate`` by names that transformers changes. Here virtual tokens stand
between padding and text, and ``generate`` is the base model's own, begun with their embeddings.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from compress.errors import CompressError
from compress.hf import cache_name


class _TextOnly(BaseStreamer):
    """Hand a streamer its tokens without the first columns of the first."""

    def __init__(self, streamer: Any, count: int) -> None:
        self.streamer, self.count = streamer, count

    def put(self, value: Tensor) -> None:
        self.streamer.put(value[:, self.count :] if self.count else value)
        self.count = 0

    def end(self) -> None:
        self.streamer.end()


class PromptedModel(PeftModelForCausalLM):
    """A causal LM behind a prompt (embeddings before the text) or a prefix (keys and values of every block)."""

    _disabled = False

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Leave the prompt off for the length of a ``with``."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on text behind the prompt; logits are [B, virtual tokens + T, vocabulary], the last ones the text's.

        A cache that is not empty holds the prompt already, and ``attention_mask`` [B, T], 0 for padding on either side, is
        then of the whole text so far. A prefix that a sliding window would lose with the padding is refused.
        """
        model: Any = self.get_base_model()
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if self._disabled:
            return model(**given, attention_mask=attention_mask, labels=labels, **kwargs)
        for name in ("token_type_ids", "position_ids", "task_ids"):  # as peft does: positions follow from the mask
            kwargs.pop(name, None)
        mask, cache = self._mask(attention_mask), kwargs.get("past_key_values", kwargs.get("cache"))
        begun = cache is not None and cache.get_seq_length() > 0
        if not begun and self._is_prefix:
            rows = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]  # type: ignore[union-attr]
            kwargs[cache_name(self)] = self.get_prompt(rows)
        elif not begun:
            embedded = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            given = {"inputs_embeds": self._behind_prompt(embedded, attention_mask)}
            if labels is not None:
                labels = self._placed(labels.new_full((len(labels), self._tokens), -100), labels, attention_mask)
        new = next(value for value in given.values() if value is not None).shape[1]
        if mask is not None and not mask.all() and "position_ids" in inspect.signature(model.forward).parameters:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        return model(**given, attention_mask=mask, labels=labels, **kwargs)

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Continue texts behind the prompt, as ``generate`` of the base model does; lengths count text alone.

        A prefix lies in the cache, which is then used whatever ``use_cache`` says: the tokens are the same.
        """
        model: Any = self.get_base_model()
        if self._disabled:
            return model.generate(inputs, generation_config=generation_config, **kwargs)
        config: Any = copy.deepcopy(generation_config or model.generation_config)
        kwargs = config.update(**kwargs)
        ids, embeds = kwargs.pop("input_ids", inputs), kwargs.pop("inputs_embeds", None)
        mask = kwargs.pop("attention_mask", None)
        kwargs.pop("token_type_ids", None)
        if mask is None and ids is not None:
            ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            padded = config.pad_token_id is not None and config.pad_token_id not in ends
            mask = ids.ne(config.pad_token_id).long() if padded else torch.ones_like(ids)
        length = 0 if ids is None else ids.shape[1]
        for limit, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if getattr(config, limit):  # transformers would count the virtual tokens
                setattr(config, new, getattr(config, new) or max(getattr(config, limit) - length, 0))
                setattr(config, limit, None)
        placed = self._mask(mask, config.max_new_tokens or 20)
        if not self._is_prefix:
            embedded = model.get_input_embeddings()(ids) if embeds is None else embeds
            kwargs |= {"inputs_embeds": self._behind_prompt(embedded, mask), "attention_mask": placed}
            return model.generate(**({} if ids is None else {"input_ids": ids}), generation_config=config, **kwargs)
        if ids is None:
            raise CompressError("behind a prefix generate needs input_ids; embeddings alone can follow a prompt.")
        config.use_cache = True
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        kwargs |= {cache_name(self): self.get_prompt(len(ids) * copies), "attention_mask": placed}
        if kwargs.get("streamer"):
            kwargs["streamer"] = _TextOnly(kwargs["streamer"], self._tokens)
        # A cache that is given stands for the first ids; which these are does not matter, and they are taken away again.
        whole = torch.cat([ids[:, :1].expand(-1, self._tokens), ids], 1)
        made = model.generate(whole, generation_config=config, **kwargs)
        if isinstance(made, Tensor):
            return made[:, self._tokens :]
        made.sequences = made.sequences[:, self._tokens :]
        return made

    @property
    def _is_prefix(self) -> bool:
        return bool(self.active_peft_config.peft_type == "PREFIX_TUNING")

    @property
    def _tokens(self) -> int:
        return int(self.active_peft_config.num_virtual_tokens)

    def _behind_prompt(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        return self._placed(self.get_prompt(len(embedded)).to(embedded.dtype), embedded, mask)

    def _placed(self, front: Tensor, rest: Tensor, mask: Tensor | None) -> Tensor:
        """Put [B, P, …] in front of [B, T, …], behind each row's padding on the left."""
        joined = torch.cat([front, rest], 1)
        if mask is None:
            return joined
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        place, count = torch.arange(joined.shape[1], device=joined.device), front.shape[1]
        order = torch.where(place < padding + count, place - padding, place)
        order = torch.where(place < padding, place + count, order)
        return joined[torch.arange(len(joined), device=joined.device)[:, None], order]

    def _mask(self, mask: Tensor | None, more: int = 0) -> Tensor | None:
        """Return the attention mask with ones for the virtual tokens; ``more`` tokens will come behind the text."""
        if mask is None:
            return None
        if mask.dim() != 2:
            raise CompressError("behind a soft prompt attention_mask must be [rows, tokens], a number per text token.")
        ones = mask.new_ones(len(mask), self._tokens)
        if not self._is_prefix:
            return self._placed(ones, mask, mask)
        config = self.get_base_model().config
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        if window and not mask[:, 0].all() and self._tokens + mask.shape[1] + more > window:
            raise CompressError(
                f"a prefix lies before the padding, out of reach of this model's window of {window} tokens in padded rows only; "
                "give texts of equal length, or one at a time."
            )
        return torch.cat([ones, mask], 1)
