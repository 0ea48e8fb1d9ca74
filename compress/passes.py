"""Define what a pass is: a frozen config, a class that works on one block at a time, an entry point (``CONTRIBUTING.md``)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.config import BlockShape, Shapes
from compress.quant.format import Codes
from compress.quant.records import PackedShape
from compress.ranks import ALONE, Ranks
from compress.settings import PASSES, Calibration, load_entry
from compress.settings import PassConfig as PassConfig
from compress.settings import kinds as kinds
from compress.statistics import Enough, watch
from compress.structure import Architecture, Linear
from compress.workspace import Record

Progress = Callable[[str, int, int], None]
"""Called as work proceeds, with (what, steps done, steps in all)."""
Run = Callable[[nn.Module], Tensor]
"""Calls a block on one calibration sample as the model does: [1, T, hidden]."""
Rows = Callable[[slice], Tensor]
"""Returns some rows of a matrix, float32 [rows, K]."""
Draw = Callable[[], Mapping[str, Rows]]
"""Draws labels for one sample; returns the gradient by each matrix that has one, by name, for use at once."""
OUTSIDE = -1
"""Index of the block that stands for the modules outside the blocks: the embedding and the head."""


@dataclass(frozen=True)
class Needs:
    """Say what a pass asks of the pipeline.

    Attributes:
        inputs: carry the calibration samples from block to block and hand over each block's inputs, as the
            ``original`` blocks produce them or as the blocks ``updated`` by this pass do.
        variants: with ``original`` inputs, also carry them through these versions of the updated blocks; the pass
            leaves ``block.show`` behind, which puts a block into each.
        variant_length: how many tokens of every sample, the first, go through the variants; all if None.
        divides: under ``torchrun`` every process calls :meth:`Pass.run_block` and :meth:`Pass.measure_block` with its own
            samples, and what they return must be the same in all (:attr:`Block.ranks`); else the main process alone does.
            Of a pass with ``whole_model``, that :meth:`Pass.run_model`, which all call in any case, shares out its work.
        outputs: :meth:`Pass.run_block` also leaves what the block makes of the samples in ``block.outputs``.
        squared_gradients: the diagonal Fisher information of every linear, summed over calibration samples.
        draws: what an error of each linear costs, by gradients of labels drawn from the model (:attr:`Block.draws`).
        gradient_samples: how many of the samples, the first, are enough for either; all if None.
        gradient_length: how many tokens of each, the first, are enough for draws; all if None.
        packs: leaves packed matrices behind, which no later pass can take for dense ones.
        packed: works on packed matrices, so a packing pass must come before.
        pattern: leaves zeros in an n:m pattern behind. Zeros stay: a later pass that changes dense weights changes no zero.
        zeros: sets weights to zero, in a pattern or not.
        loses_zeros: gives weights that are zero other values, so that it is refused after a pattern and told of after other zeros.
        breaks_pattern: takes columns out of matrices, so that a pattern of zeros would not be one any more.
        changes_shapes: leaves linears of other sizes, or fewer blocks, behind (:meth:`Pass.shapes_after`).
        removes_experts: leaves mixtures with fewer experts behind, in every layer as many (:meth:`Pass.experts_after`).
        model_statistics: measures the whole model, in memory, before any block is worked on (:meth:`Pass.measure_model`).
        whole_model: has the whole model in memory: the pipeline calls :meth:`Pass.run_model` instead of
            :meth:`Pass.run_block`.
        teacher: with ``whole_model``, also the dense model it came from (:attr:`Whole.dense`).
        sidecar: what :meth:`Pass.run_model` returns belongs beside the model, not into it: the model stays as it is, and
            :meth:`Pass.write_files` makes files of it. Such a pass comes last.
        text: what it learns from in place of the recipe's calibration.
    """

    inputs: Literal["original", "updated"] | None = None
    variants: tuple[str, ...] = ()
    variant_length: int | None = None
    divides: bool = False
    outputs: bool = False
    squared_gradients: bool = False
    draws: bool = False
    gradient_samples: int | None = None
    gradient_length: int | None = None
    packs: bool = False
    packed: bool = False
    pattern: bool = False
    zeros: bool = False
    loses_zeros: bool = False
    breaks_pattern: bool = False
    changes_shapes: bool = False
    removes_experts: bool = False
    model_statistics: bool = False
    whole_model: bool = False
    teacher: bool = False
    sidecar: bool = False
    text: Calibration | None = None

    @property
    def calibration(self) -> bool:
        """Tell whether it looks at text."""
        asked = (self.squared_gradients, self.draws, self.whole_model, self.model_statistics)
        return self.inputs is not None or any(asked)


@dataclass
class Block:
    """Hand one transformer block to a pass, in memory, with what the pass asked for.

    A pass changes ``linears[name].weight`` in place, puts smaller parameters into modules (and says so in ``shape``), sets
    ``removed``, or fills ``packed[name]``; everything else is the pipeline's work. The part of the model outside the blocks
    (embedding, head) is also handed over as a block, with ``index`` :data:`OUTSIDE`.

    Attributes:
        index: position in the model.
        name: module name, for example ``model.layers.3``.
        module: the real module, dense, float32.
        linears: every dense linear in it, by full name.
        squared_gradients: full name -> [out_features, in_features] float32, if asked for; of embedding and head the mean
            over every row, [out_features, 1].
        samples: one call per calibration sample, if inputs were asked for: ``for run in samples: run(module)``. Where the pass
            divides, those of this process.
        variants: the same calls on the inputs that each variant of the earlier blocks produces.
        statistics: of every finished round of calibration statistics, the records of all blocks in order.
        model_statistics: what :meth:`Pass.measure_model` returned.
        shape: its sizes; None where the architecture declares no groups.
        removed: whether the model is to go on without it.
        packed: full name -> codes and codebooks on the CPU, filled by a packing pass.
        skipped: name -> reason, for linears the pass leaves as they are.
        few_tokens: matrix of a mixture's expert -> tokens of calibration that came to it, where they are fewer than its columns;
            filled by a pass that counts them.
        show: set by a pass with variants: puts the weights of one of them into ``module``.
        draws: for :func:`compress.divergence.divergences`, those of this process's samples in lots, if asked for. The block's
            weights are to be the dense ones then.
        hessians: with squared gradients or draws of embedding and head, name of the matrix that the head multiplies by -> float32
            [in_features, in_features], the mean of ``h h^T`` over the head's inputs.
        outputs: variant (``""`` for the inputs of :attr:`samples`) -> what the next block is given, [1, T, hidden] each; filled
            by a pass that has announced it, and computed by the pipeline otherwise.
        ranks: the processes that work on this block; one alone, unless the pass divides.
        lots: how many of the samples each lot has (:meth:`compress.ranks.Ranks.lots`); all are one lot if there is none.
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, Linear]
    squared_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Sequence[Run] = ()
    variants: Mapping[str, Sequence[Run]] = field(default_factory=dict)
    statistics: Sequence[Sequence[Record]] = ()
    model_statistics: Mapping[str, Tensor] = field(default_factory=dict)
    shape: BlockShape | None = None
    removed: bool = False
    packed: dict[str, Codes] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    few_tokens: dict[str, int] = field(default_factory=dict)
    show: Callable[[str], None] | None = None
    draws: Sequence[Sequence[Draw]] = ()
    hessians: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    ranks: Ranks = ALONE
    lots: Sequence[int] = ()

    def each_lot(self) -> Iterator[Iterable[Run]]:
        """Yield the samples of one lot after the other."""
        runs = iter(self.samples)
        for count in self.lots or [len(self.samples)]:
            yield islice(runs, count)

    @torch.no_grad()
    def for_each_input(
        self,
        visit: Callable[[str, Tensor], object],
        modules: Mapping[str, nn.Module] | None = None,
        keep_outputs: bool = False,
        end_lot: Callable[[], object] = lambda: None,
    ) -> None:
        """Run the samples through the block; call ``visit(name, x)`` with the inputs [tokens, K] of its linears, in order.

        ``modules`` are those to look at, by name; every linear by its full name if None. ``keep_outputs`` leaves what the
        block makes of the samples in :attr:`outputs`, so many as are done; without, a run ends once all have been seen, if a run
        before has called each of them just once. ``end_lot`` is called after every lot of samples.
        """
        watched = {name: linear.module for name, linear in self.linears.items()} if modules is None else modules
        outputs: list[Tensor] = []
        if keep_outputs:
            self.outputs[""] = outputs
        calls, once = Counter[str](), False

        def seen(name: str, x: Tensor) -> None:
            visit(name, x.flatten(0, -2))
            calls[name] += 1
            if once and len(calls) == len(watched):
                raise Enough

        with watch(watched, seen):
            for lot in self.each_lot():
                for run in lot:
                    calls.clear()
                    with suppress(Enough):
                        output = run(self.module)
                        if keep_outputs:
                            outputs.append(output)
                    once = not keep_outputs and all(calls[name] == 1 for name in watched)
                end_lot()


@dataclass(frozen=True)
class Whole:
    """Hand the whole model to a pass with ``whole_model``, in float32 on the context's device.

    Attributes:
        model: as the passes before left it, packed modules included; to be left as it was found.
        load_dense: reads what :attr:`dense` is.
        samples: int64 [T] each, the text to learn from.
        scratch: a folder for what an interrupted unit continues from; deleted when the unit is finished.
    """

    model: PreTrainedModel
    load_dense: Callable[[], PreTrainedModel]
    samples: Sequence[Tensor]
    scratch: Path

    @cached_property
    def dense(self) -> PreTrainedModel:
        """Return the model the recipe began with; it is in memory from the first use on."""
        return self.load_dense()


@dataclass(frozen=True)
class Context:
    """Hold what is the same for all blocks of a run.

    Attributes:
        structure: of the model.
        device: where blocks are computed.
        seed: of the recipe; derive a generator from it with :meth:`generator`.
        linears: full name -> (out_features, in_features) of every linear inside the blocks.
        outside: the same for the embedding and the head.
        head: which of those is the head.
        tied: whether the two are one tensor.
        vocabulary: rows of the embedding.
        config: the model's.
        shapes: blocks that are not as large as the config says.
        biased: linears inside the blocks that have a bias.
        parameters: of the whole model, those of a tied head counted once.
        context_length: tokens the model can look at, if it has a limit.
        tokenizer: of the model.
        ranks: the processes of the run.
    """

    structure: Architecture
    device: torch.device
    seed: int
    linears: Mapping[str, tuple[int, int]]
    outside: Mapping[str, tuple[int, int]]
    head: str
    tied: bool
    vocabulary: int
    config: PretrainedConfig
    shapes: Shapes
    biased: frozenset[str]
    parameters: int
    context_length: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    ranks: Ranks = ALONE

    def generator(self, *place: int) -> torch.Generator:
        """Return a random generator that depends on the seed and a place (pass, block, …) only."""
        return derived_generator(self.seed, *place)


def derived_generator(seed: int, *place: int) -> torch.Generator:
    """Return a random generator that depends on a seed and a place (pass, block, step, …) only."""
    for part in place:
        seed = (seed * 1_000_003 + part + 1) % (1 << 63)
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Sizes:
    """Hold what is known of a run before it begins, for :meth:`Pass.memory`.

    Attributes:
        samples: of the calibration text, 0 without one.
        length: tokens of each.
        block: bytes of the largest block, float32.
        model: bytes of the whole model, float32.
    """

    samples: int
    length: int
    block: int
    model: int


@dataclass(frozen=True)
class Work:
    """Say how much text a pass with ``whole_model`` runs, for the plan's time.

    Attributes:
        trained: samples run forward and backward.
        scored: samples run forward alone.
        length: tokens of each.
        weights: gradients of the weights inside the blocks are taken too, not only those of what goes through them.
    """

    trained: int
    scored: int
    length: int
    weights: bool = False


ConfigT = TypeVar("ConfigT", bound=PassConfig)


class Pass(Generic[ConfigT]):
    """Compress a model by one method. Subclasses set ``Config`` and implement :meth:`run_block`, or :meth:`run_model`."""

    Config: ClassVar[type[PassConfig]]

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def needs(self) -> Needs:
        """Return what the pipeline has to provide with these settings."""
        return Needs()

    def check(self, context: Context) -> None:
        """Refuse, before any work and with a :class:`CompressError`, settings that do not fit the model."""

    def outside(self, context: Context) -> list[str]:
        """Name the modules outside the blocks that it also works on, out of ``context.outside``."""
        return []

    def packed_shapes(self, context: Context) -> dict[str, PackedShape]:
        """Return what it will leave packed, by full name, for the plan; codebooks are taken to fit float16."""
        return {}

    def shapes_after(self, context: Context) -> dict[str, BlockShape | None]:
        """Foresee (or estimate, where weights decide) the shape of every block it changes: None for one that is removed."""
        return {}

    def experts_after(self, context: Context) -> int:
        """Return how many experts it leaves in every mixture."""
        raise NotImplementedError(f"{type(self).__name__} has no experts_after")

    def memory(self, sizes: Sizes, context: Context) -> int:
        """Estimate, for the plan, the bytes that it takes itself: statistics, copies, gradients of its own.

        What the pipeline holds for it comes on top: the block or the model, the samples' hidden states, and what
        ``squared_gradients`` takes.
        """
        return 0

    def work(self, samples: int, length: int, packed: Mapping[str, PackedShape]) -> Work | None:
        """Count what a pass with ``whole_model`` runs, given so many samples of so many tokens; None if that is not known."""
        return None

    def measure_model(
        self, model: PreTrainedModel, samples: Sequence[Tensor], context: Context, progress: Progress
    ) -> dict[str, Tensor]:
        """Measure the whole model, float32 on the context's device; what is returned is every block's ``model_statistics``.

        The model is to be left as it was found; ``samples``, int64 [T] each, are the calibration text.
        """
        raise NotImplementedError(f"{type(self).__name__} has no measure_model")

    def wants_statistics(self, context: Context, statistics: Sequence[Sequence[Record]]) -> bool:
        """Tell whether to measure all blocks (once more) before any is worked on.

        ``statistics`` has, of every finished round, the records of all blocks in order. The answer must depend on these and
        the settings only.
        """
        return False

    def measure_block(self, block: Block, context: Context) -> Record:
        """Measure one block in a round; return what :meth:`run_block` and later rounds are to know (JSON).

        Earlier rounds are in ``block.statistics``. The block may be changed: the change is forgotten afterwards, but the next
        block's inputs come from the block as it is left.
        """
        return {}

    def run_block(self, block: Block, context: Context) -> Record:
        """Work on one block, knowing ``block.statistics``.

        Returns:
            Figures for the log and the manifest (JSON), without times: equal work, equal bytes. Every pass chooses its
            own, under names other than those of :data:`compress.runner.NOTES`. Two names have a meaning for all:

            * ``errors``: matrix -> bits -> ``{"relative", "weighted"}`` and perhaps ``"output"``
              (:func:`compress.quant.errors.layer_errors`) and ``"divergence"`` (:mod:`compress.divergence`). ``inspect`` shows
              them, and a mix of bits is chosen by the divergences, or by the weighted errors where there are none.
            * ``linears``: linear -> ``{"zeros": weights that are 0, "parameters": all}`` and whatever else there is to
              say of it. A linear with ``zeros`` above 0 is what makes a model pruned.
        """
        raise NotImplementedError(f"{type(self).__name__} has no run_block")

    def model_units(self, packed: Mapping[str, PackedShape]) -> list[str]:
        """Name the units of a pass with ``whole_model``, in order: each is finished, and resumed, by itself."""
        return ["model"]

    def run_model(
        self, unit: str, whole: Whole, context: Context, progress: Progress
    ) -> tuple[dict[str, Tensor], Record]:
        """Work on the whole model.

        Return changed tensors by full name, on the CPU as they are to be stored, and figures as for :meth:`run_block`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no run_model")

    def write_files(
        self, folder: Path, units: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Record]
    ) -> None:
        """Write what belongs beside the model into the checkpoint's folder; the manifest will have its digests.

        ``units`` and ``records`` have, by unit, the tensors and the figures that :meth:`run_model` returned.
        """


def pass_class(kind: str) -> type[Pass[Any]]:
    """Load the class behind a name; errors as of :func:`compress.settings.load_entry`."""
    loaded: type[Pass[Any]] = load_entry(PASSES, kind, Pass)
    return loaded
