"""Recipe keys of the quantising passes (no torch: see :mod:`compress.settings`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from compress.settings import Calibration, PassConfig

_NARROWEST = 512  # columns: narrower matrices were not measured
EmbeddingBits = int | dict[int, int] | Literal["auto"] | None
_EMBEDDING_BITS = (
    "Bits of the embedding and the head, which are stored once where they are tied: one number, the model's "
    "bits -> theirs, or auto: two more than the model's, one where they have sizes for groups of columns, at least 4 and at most 8. "
    "0 leaves them dense"
)


class QuantiseConfig(PassConfig):
    """Settings of every quantising pass."""

    ignore: tuple[str, ...] = Field(
        (), description="Linears to leave dense: full names, or 're:' and a regular expression for a full name."
    )
    include: tuple[str, ...] = Field(
        (),
        description="Head and embedding, by name or 're:', to quantise at the model's own bits where embedding_bits is 0.",
    )
    embedding_bits: EmbeddingBits = Field(0, description=f"{_EMBEDDING_BITS}.")

    def packs_embedding(self, columns: int) -> bool:
        """Tell whether an embedding and a head of so many columns are quantised, other than by ``include``."""
        if self.embedding_bits is None:
            return columns >= _NARROWEST and not self.include
        return self.embedding_bits != 0

    @field_validator("embedding_bits")
    @classmethod
    def _possible(cls, value: EmbeddingBits) -> EmbeddingBits:
        if value is None:
            return value
        table = value if isinstance(value, dict) else {8: value if isinstance(value, int) and value else 8}
        own = [table[bits] for bits in sorted(table)]
        if not own or own != sorted(own) or not all(2 <= bits <= 8 for bits in [*own, *table]):
            raise ValueError(f"{value} must be 0, auto, a number of bits from 2 to 8, or such numbers that do not fall")
        return value

    def embedding_table(self, model_bits: range, more: int) -> dict[int, int]:
        """Return the bits of embedding and head by those of the model, by default so many ``more``; none if they stay dense.

        Bits that a given table leaves out have those of the next lower ones in it, or of its first.
        """
        if self.embedding_bits == "auto" or (self.embedding_bits is None and not self.include):
            return {bits: max(4, min(bits + more, 8)) for bits in model_bits}
        if self.embedding_bits is None or isinstance(self.embedding_bits, int):
            return dict.fromkeys(model_bits, self.embedding_bits) if self.embedding_bits else {}
        given = self.embedding_bits
        assert isinstance(given, dict)
        nearest = {bits: max((b for b in given if b <= bits), default=min(given)) for bits in model_bits}
        return {bits: given[place] for bits, place in nearest.items()}


class SensitiveConfig(QuantiseConfig):
    """Settings of quantisers that weigh errors."""

    sensitivity: Literal["fisher", "activation", "none"] = Field(
        "fisher",
        description="What an error in a weight costs: the sum of its squared gradients over calibration samples, "
        "the mean square of its input, or the same for all weights.",
    )
    keep_zeros: bool = Field(
        False,
        description="Weights that are exactly zero stay exactly zero at every number of bits; a matrix with enough of them is "
        "stored without them.",
    )


class AnyPrecisionConfig(SensitiveConfig):
    """Any-precision: one set of nested codes, read at every number of bits from the seed's to the parent's.

    Every matrix, or every row of it, has a codebook per number of bits; the b-bit code is the top b bits of the parent's. Objective ``weight`` is the
    method of the paper with exact clustering: the seed is the optimal weighted one-dimensional k-means of each row, every
    further bit splits each cell at its best point. Objective ``output`` starts there and lowers the error of the layer's
    output on calibration text, for all numbers of bits up to 6 together. Deterministic. Works a block at a time; the Fisher
    sensitivity costs one backward pass over the calibration samples, with one block in memory and the samples' hidden
    states on disk.
    """

    kind: Literal["any_precision"] = Field("any_precision", description="Name of the pass.")
    seed_bits: int = Field(
        3, ge=2, le=8, description="The smallest number of bits, whose codes are optimised directly."
    )
    parent_bits: int = Field(8, ge=2, le=8, description="The largest number of bits.")
    objective: Literal["weight", "output"] = Field(
        "output",
        description="Which error is made small: of each weight, by its sensitivity, or of each layer's output.",
    )
    codebooks: Literal["auto", "shared", "row"] = Field(
        "auto",
        description="Objective output: whether the rows of a matrix share one codebook for each number of bits, and have a size for "
        "every 64 columns (not with keep_zeros), or each has codebooks of its own; auto: they are shared where rows have 512 columns or more. "
        "With objective weight each has its own.",
    )
    embedding_bits: EmbeddingBits = Field(
        None,
        description=f"{_EMBEDDING_BITS}; if not given: auto where they have 512 columns or more (and include is empty), else 0.",
    )
    focus: dict[int, float] = Field(
        {}, description="Objective output: bits -> how much their error counts beside the others', 1 where not given."
    )
    correction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Objective output: share of the correction by which a layer makes up for the errors of those before.",
    )

    def shares(self, columns: int) -> bool:
        """Tell whether the rows of a matrix with so many columns share their codebooks."""
        shared = columns >= _NARROWEST if self.codebooks == "auto" else self.codebooks == "shared"
        return shared and self.objective == "output" and not self.keep_zeros

    @model_validator(mode="after")
    def _ordered(self) -> AnyPrecisionConfig:
        if self.seed_bits > self.parent_bits:
            raise ValueError(f"seed_bits {self.seed_bits} must not exceed parent_bits {self.parent_bits}")
        for bits, share in self.focus.items():
            if not self.seed_bits <= bits <= self.parent_bits or not 0 < share < float("inf"):
                raise ValueError(f"focus {bits}: {share} must be bits from seed to parent and a positive number")
        return self


class KMeansConfig(SensitiveConfig):
    """Non-nested weighted k-means of each row at one number of bits: what nesting is measured against (SqueezeLLM)."""

    kind: Literal["kmeans"] = Field("kmeans", description="Name of the pass.")
    bits: int = Field(4, ge=2, le=8, description="The number of bits.")


class RoundToNearestConfig(QuantiseConfig):
    """Rounding to an even grid between each row's smallest and largest weight: the simplest quantiser there is."""

    kind: Literal["rtn"] = Field("rtn", description="Name of the pass.")
    bits: int = Field(4, ge=2, le=8, description="The number of bits.")


class TuneTablesConfig(PassConfig):
    """Train the codebooks of a quantised model to say what the dense model says on calibration text.

    It minimises the divergence of the quantised model's next-token distribution from the dense one's, for one number of bits after
    another. Where all rows of a matrix share a codebook, sizes of groups are trained too if the matrix has no other number of bits,
    which would read them. One of eight pieces of text is not trained on: what is not better on those stays as it was. Needs both
    models in memory, in float32.
    """

    kind: Literal["tune_tables"] = Field("tune_tables", description="Name of the pass.")
    widths: tuple[int, ...] = Field(
        (), description="Numbers of bits whose codebooks are trained; all if none is given."
    )
    steps: int = Field(40, ge=1, description="Steps of Adam, per number of bits.")
    batch: int = Field(8, ge=1, description="Pieces of calibration text per step.")
    length: int = Field(256, ge=2, description="Tokens of a piece: samples that are longer are cut.")
    learning_rate: float = Field(
        0.03,
        gt=0,
        description="Largest step of Adam, as a share of the mean distance between entries; a cosine ends it.",
    )
    target: Literal["dense", "text"] = Field(
        "dense", description="What is to be said: what the dense model says, or (a control) the text itself."
    )
    text: Calibration | None = Field(
        None,
        description="Text to train on, as of calibration; the recipe's calibration if absent. More of it than the codes were found with pays.",
    )


class KVCalibrateConfig(PassConfig):
    """Choose bits of the cache of keys and values for every layer, by what they change on calibration text; the model stays as it is.

    Measures how far each layer alone, at each number of bits, takes the predictions from those with a whole cache (divergence), and
    takes the numbers of bits whose sum of these is least at the mean that is asked for. ``compress.load(folder, kv="recommended")``
    then packs keys and values so.
    """

    kind: Literal["kv_calibrate"] = Field("kv_calibrate", description="Name of the pass.")
    bits: float = Field(4.0, ge=2, le=8, description="Mean number of bits of all layers.")
    choices: tuple[int, ...] = Field(
        (2, 3, 4, 6, 8), min_length=1, description="Numbers of bits that a layer may have."
    )
    group: int | tuple[int, int] | None = Field(
        None,
        description="Values that share a scale; (of keys, of values) if they differ. Absent: 128 tokens of a key's channel, up to 64 channels of a value.",
    )
    residual: int = Field(128, ge=0, description="So many of the last tokens stay whole.")
    layer_samples: int = Field(
        8,
        ge=1,
        description="Samples that each layer is measured on; the choice, and as many bits for all, are on all samples.",
    )
    text: Calibration | None = Field(
        None,
        description="Text to measure on, as of calibration; the recipe's calibration if absent. A few long samples are enough.",
    )

    @model_validator(mode="after")
    def _in_reach(self) -> KVCalibrateConfig:
        if any(not 2 <= bits <= 8 for bits in self.choices):
            raise ValueError("choices are numbers of bits from 2 to 8")
        if min(self.choices) > self.bits:
            raise ValueError(f"a mean of {self.bits} bits cannot be had of choices {self.choices}")
        return self
