"""Recipe keys of the soft prompt (no torch: see :mod:`compress.settings`)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.settings import TrainingConfig


class SoftPromptConfig(TrainingConfig):
    """Train virtual tokens that stand before every text, on the compressed model as it is; nothing else changes.

    They are stored beside the model as ordinary peft adapters, in ``soft_prompt/``. They take ``tokens`` places of the
    context, so samples are cut to what is left of it.
    """

    # What the authors' scripts set; they train on 1024 tokens at a time, which is for ``text`` to say.
    PRESETS: ClassVar = {
        "paper": {
            "tokens": 100,
            "start": "vocabulary",
            "steps": 30_000,
            "batch": 2,
            "micro_batch": 2,
            "learning_rate": 1e-3,
            "relative": False,
            "warmup": 500,
            "weight_decay": 0.0,
            "clip": 1.0,
            "validate_every": 100,
        }
    }

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
    widths: tuple[int, ...] = Field(
        (), description="Numbers of bits of a quantised model to train at; all if none is given."
    )
    per_width: bool = Field(
        False,
        description="A prompt for each number of bits, rather than one for all, which draws a number of bits for every step.",
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

    @model_validator(mode="after")
    def _start(self) -> SoftPromptConfig:
        if self.start_text is not None and self.start != "text":
            raise ValueError("start_text goes with start: text")
        return self
