"""Structured pruning: whole heads, channels or blocks go, and the model that stays is really smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.passes import Block, Context, Needs, Pass, PassConfig
from compress.pruning.criteria import Variant, element_scores, group_scores, lowest
from compress.pruning.groups import Kind, Part, Unit, block_parts, cut, parts_of, remaining
from compress.pruning.least_squares import Moments, compensated, output_error, removal_order
from compress.pruning.survey import whole_model_scores
from compress.pruning.targets import Counts, Target, depth_count, equal_counts, protected_blocks, ranked_counts
from compress.shapes import BlockShape, block_shape, config_shape, groups_of, ordinary_config
from compress.structure import Linear, block_prefix
from compress.workspace import Record

Score = Literal["output", "fms", "taylor", "gates", "no_gradient", "noise", "magnitude", "random"]
Estimator = Literal["spsa", "backprop", "residual"]
WHOLE_MODEL = ("fms", "taylor", "gates")
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "score": "fms", "estimator": "spsa", "variant": "F1", "mode": "local", "protect": "llm_pruner",
        "compensate": False,
    },
    "llm_pruner": {
        "score": "taylor", "estimator": "backprop", "variant": "F3", "mode": "local", "protect": "llm_pruner",
        "ratio_of": "layers", "ratio": 0.25, "compensate": False,
    },
}  # fmt: skip


class MiniLlmConfig(PassConfig):
    """Structured pruning: remove whole heads and channels (or blocks), so that the model is really smaller.

    What stays is refitted, by default, so that each layer's output on calibration text changes least (least squares). Mode ``uniform``
    leaves the same size in every block and so an ordinary config that plain transformers loads without this library; ``local``
    and ``global`` record the sizes in quantization_config.
    """

    kind: Literal["mini_llm"] = Field("mini_llm", description="Name of the pass.")
    preset: Literal["default", "paper", "llm_pruner"] = Field(
        "default",
        description="Settings for keys that are not given: this library's, MINI-LLM's (arXiv 2407.11681: one SPSA draw, F1, "
        "first 4 and last 2 of 32 blocks kept), or LLM-Pruner's (25 % of the groups of those blocks, backpropagated Taylor).",
    )
    ratio: float = Field(0.2, gt=0, lt=1, description="Share that is to go.")
    ratio_of: Literal["model", "blocks", "layers"] = Field(
        "model",
        description="Of what: all parameters, those inside blocks, or the groups of every layer that is not protected.",
    )
    remove: Literal["groups", "blocks"] = Field("groups", description="Heads and channels, or whole blocks.")
    mode: Literal["uniform", "local", "global"] = Field(
        "uniform",
        description="The same size in all blocks; the same share of each block that is not protected; or the groups that are cheapest "
        "per parameter, wherever they are.",
    )
    score: Score = Field(
        "output",
        description="What a group is worth: the error of the block's output that least squares cannot make up for (output); "
        "|W| |X| |gradient| (fms), the same without gradient (no_gradient) or with noise for one (noise); |W gradient| (taylor); "
        "the loss's sensitivity to a gate on the group (gates); the weights' L2 norm (magnitude); nothing (random).",
    )
    estimator: Estimator | None = Field(
        None,
        description="Where gradients come from: forward passes with perturbed weights or gates (spsa), backpropagation (backprop), or "
        "for gates, the residual stream's gradient (residual). If absent: spsa for fms, backprop for taylor, residual for gates.",
    )
    draws: int = Field(1, ge=1, description="Perturbations that spsa averages over.")
    step: float = Field(1e-3, gt=0, description="Size of a perturbation.")
    variant: Variant = Field(
        "F1",
        description="Score of one weight for fms and taylor: |W||X||g|, |W mean(X) g|, |W g|, or their signed sum.",
    )
    aggregate: Literal["sum", "max"] = Field("sum", description="Over the matrices that a group has parts in.")
    rounds: int = Field(
        1, ge=1, description="For fms, taylor and gates: score again after each of so many equal parts."
    )
    compensate: bool = Field(True, description="Refit what stays to the calibration text by least squares.")
    protect: Literal["none", "llm_pruner"] | tuple[int, int] = Field(
        "none", description="Blocks left whole: the first and last so many; llm_pruner: 4 and 2 of every 32."
    )
    attention: float = Field(
        1.0, ge=0, description="Share that attention loses, as a multiple of what MLPs lose; 0 leaves all heads."
    )
    unit: Unit = Field(
        "groups",
        description="Heads go as key-value heads with all their queries, or as queries, equally many of every key-value head.",
    )
    multiple: int = Field(1, ge=1, description="Channels that stay are a multiple of this (modes uniform and local).")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("preset") in PRESETS:
            settings = {**PRESETS[str(data["preset"])], **data}
        else:
            settings = data
        if isinstance(settings, Mapping) and settings.get("score") == "taylor":
            settings = {"variant": "F3", **settings}
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> MiniLlmConfig:
        fitting = {
            "fms": ("spsa", "backprop"),
            "taylor": ("backprop", "spsa"),
            "gates": ("residual", "spsa", "backprop"),
        }
        if self.estimator is not None and self.estimator not in fitting.get(self.score, ()):
            known = ", ".join(fitting.get(self.score, ())) or "none"
            raise ValueError(f"estimator {self.estimator} does not go with score {self.score}, which knows {known}")
        if self.rounds > 1 and self.score not in WHOLE_MODEL:
            raise ValueError(f"rounds {self.rounds} goes with the scores {', '.join(WHOLE_MODEL)} only")
        if self.mode == "uniform" and self.protect not in ("none", (0, 0)) and self.remove == "groups":
            raise ValueError(
                "mode uniform leaves every block the same size, so none can be protected; take local or global"
            )
        if isinstance(self.protect, tuple) and min(self.protect) < 0:
            raise ValueError(f"protect {self.protect} counts blocks, so neither number can be negative")
        if self.remove == "blocks" and self.rounds > 1:
            raise ValueError("rounds is for heads and channels, not for whole blocks")
        if self.mode == "global" and self.multiple > 1:
            raise ValueError("multiple goes with the modes uniform and local")
        return self

    @property
    def source(self) -> Estimator:
        """The estimator in use."""
        chosen: dict[str, Estimator] = {"fms": "spsa", "taylor": "backprop", "gates": "residual"}
        return self.estimator or chosen.get(self.score, "residual")


class MiniLlm(Pass[MiniLlmConfig]):
    """Score, choose, cut, refit: attention first, then the MLP on what attention has become."""

    Config = MiniLlmConfig

    def needs(self) -> Needs:
        """Inputs of blocks for what is measured there, the whole model for what is estimated there."""
        config = self.config
        inside = config.compensate or config.score in ("output", "no_gradient", "noise")
        return Needs(
            inputs="updated" if inside or config.remove == "blocks" else None,
            hessians=config.compensate or config.score == "output",
            model_survey=config.score in WHOLE_MODEL,
            backward=config.score in WHOLE_MODEL and config.source == "backprop",
            changes_shapes=True,
        )

    # -- what is to go ------------------------------------------------------------------------------------------------

    def _parts(self, context: Context) -> list[Mapping[Kind, Part]]:
        """Of every block; none of a protected one."""
        names = _block_names(context)
        kept = self._protected(len(names))
        bias = f"{names[0]}.{context.structure.mlp[0]}" in context.biased
        return [
            {}
            if index in kept
            else parts_of(
                context.structure,
                context.config,
                block_shape(context.config, context.shapes, name),
                self.config.unit,
                bias,
            )
            for index, name in enumerate(names)
        ]

    def _protected(self, blocks: int) -> set[int]:
        if self.config.protect == "none":
            return set()
        first, last = (4, 2)
        if self.config.protect == "llm_pruner":
            first, last = round(first * blocks / 32), round(last * blocks / 32)
        else:
            first, last = self.config.protect
        return protected_blocks(blocks, first, last)

    def _target(self, context: Context) -> Target:
        config = self.config
        groups_of(context.structure)
        parts = self._parts(context)
        if not any(parts):
            raise CompressError("mini_llm: protect leaves no block from which anything may go; protect fewer.")
        inside = sum(rows * columns for rows, columns in context.linears.values())
        count = round(config.ratio * (inside if config.ratio_of == "blocks" else context.parameters))
        share = None
        if config.ratio_of == "layers":
            share = config.ratio
            count = round(
                sum(
                    share * part.units * part.cost * (config.attention if kind == "attention" else 1)
                    for block in parts
                    for kind, part in block.items()
                )
            )
        return Target(count, parts, share, config.attention, config.multiple)

    def _equal(self, context: Context) -> list[Counts]:
        """What each block loses in the modes uniform and local."""
        target = self._target(context)
        now = {block_shape(context.config, context.shapes, name) for name in _block_names(context)}
        if len(now) > 1:
            raise CompressError(
                f"mini_llm: an earlier pass has left blocks of different sizes, so mode {self.config.mode} cannot take the same "
                "from each; use mode global."
            )
        before = now.pop()

        def allowed(units: int) -> bool:
            if self.config.mode != "uniform":
                return True
            parts = target.parts[0]
            shape = parts["attention"].shape(before, units) if units else before
            shape = parts["mlp"].shape(shape, 1)
            return ordinary_config(context.config, shape) is not None

        if self.config.mode == "uniform" and not allowed(0):
            raise CompressError(
                f"mini_llm: the config of model type {context.config.model_type!r} cannot say how many channels an MLP has, so "
                "uniform pruning would give a model that plain transformers cannot build; use mode local."
            )
        return equal_counts(target, allowed, exact=self.config.mode == "local")

    def _depth(self, context: Context) -> int:
        """How many blocks go."""
        if getattr(context.config, groups_of(context.structure).depth_fixed or "-", False):
            raise CompressError(
                f"mini_llm: config.json sets {groups_of(context.structure).depth_fixed}, so blocks depend on their position and "
                "none can be removed."
            )
        names = _block_names(context)
        inside = sum(rows * columns for rows, columns in context.linears.values())
        count = depth_count(
            self.config.ratio,
            inside if self.config.ratio_of != "model" else context.parameters,
            inside // len(names),
            len(names),
        )
        if count > len(names) - len(self._protected(len(names))):
            raise CompressError(f"mini_llm: {count} blocks are to go, but protect leaves fewer; protect fewer.")
        return count

    def check(self, context: Context) -> None:
        """Whether the target can be met."""
        config_shape(context.config)
        if self.config.remove == "blocks":
            self._depth(context)
        elif self.config.mode == "global":
            self._ranked(context, None)
        else:
            self._equal(context)

    def shapes_after(self, context: Context) -> dict[str, BlockShape | None]:
        """Exact in modes uniform and local; in mode global, and of blocks, what goes is yet to be found."""
        names = _block_names(context)
        if self.config.remove == "blocks":
            return dict.fromkeys(names[-self._depth(context) :])
        counts = self._ranked(context, None) if self.config.mode == "global" else self._equal(context)
        after: dict[str, BlockShape | None] = {}
        for name, parts, lost in zip(names, self._parts(context), counts, strict=True):
            shape = block_shape(context.config, context.shapes, name)
            for kind, count in lost.items():
                shape = parts[kind].shape(shape, count)
            after[name] = shape
        return after

    def _ranked(self, context: Context, survey: Sequence[Record] | None) -> list[Counts]:
        """Mode global, from the survey's prices; from equal ones before there are any."""
        target = self._target(context)
        if survey is None:
            prices = [
                {kind: [part.cost * (n + 1) / part.units for n in range(part.units)] for kind, part in parts.items()}
                for parts in target.parts
            ]
        else:
            prices = [record["prices"] for record in survey]
        return ranked_counts(target, prices)

    def _counts(self, block: Block, context: Context) -> Counts:
        """What one block loses."""
        counts = self._ranked(context, block.surveys[0]) if self.config.mode == "global" else self._equal(context)
        return counts[block.index]

    # -- what it is worth ---------------------------------------------------------------------------------------------

    def survey_model(
        self,
        model: PreTrainedModel,
        samples: Sequence[Tensor],
        context: Context,
        report: Callable[[str, int, int], None],
    ) -> dict[str, Tensor]:
        """Scores that need the whole model, ``<block>.<part>`` -> [U]."""
        parts = self._parts(context)
        everything = [
            counts or {} for counts in (self._equal(context) if self.config.mode != "global" else [{}] * len(parts))
        ]
        return whole_model_scores(self.config, model, samples, context, parts, everything, report)

    def wants_survey(self, context: Context, surveys: Sequence[Sequence[Record]]) -> bool:
        """Comparing blocks needs a look at all of them."""
        return not surveys and (self.config.mode == "global" or self.config.remove == "blocks")

    def survey_block(self, block: Block, context: Context) -> Record:
        """Prices of units in the order in which they would go; or of the whole block."""
        if self.config.remove == "blocks":
            return {"price": self._block_price(block, context)}
        if block.index in self._protected(len(_block_names(context))):
            return {"prices": {}}
        parts = block_parts(block, context.structure, context.config, self.config.unit)
        prices: dict[str, list[float]] = {}
        for kind, part in parts.items():
            prices[kind] = self._prices(block, part, context)
        return {"prices": prices}

    def _prices(self, block: Block, part: Part, context: Context) -> list[float]:
        if self.config.score == "output":
            moments = self._moments(block, part)
            weight = self._last(block, part).weight
            _, errors = removal_order(weight, moments, part.columns, part.classes, part.units - part.step)
            scale = float(((weight.double() @ moments.gram) * weight).sum()) or 1.0
            return [(after - before) / scale for before, after in zip([0.0, *errors], errors, strict=False)]
        scores = self._scores(block, part, context)
        order = lowest(scores, part.classes, part.units)
        return [float(scores[unit]) for unit in order]

    def _block_price(self, block: Block, context: Context) -> float:
        """Of a whole block: what it changes in the stream relative to it, or the sum of its groups' scores."""
        if self.config.score == "random":
            return float(torch.rand(1, generator=context.generator(block.index)))
        if self.config.score == "output":
            inputs: list[Tensor] = []
            handle = block.module.register_forward_pre_hook(
                lambda _m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            try:
                with torch.no_grad():
                    apart = [1 - _cosine(run(block.module), inputs.pop()) for run in block.samples]
            finally:
                handle.remove()
            return sum(apart) / len(apart)
        parts = block_parts(block, context.structure, context.config, self.config.unit)
        return sum(float(self._scores(block, part, context).sum()) for part in parts.values())

    def _scores(self, block: Block, part: Part, context: Context) -> Tensor:
        """[U]; not for ``output``, where an order is found instead."""
        score = self.config.score
        if score == "random":
            return torch.rand(part.units, generator=context.generator(block.index, part.kind == "mlp"))
        if score in WHOLE_MODEL:
            return block.findings[f"{block.index}.{part.kind}"]
        members = {name: Linear(name, block.module.get_submodule(name)).weight for name in part.members}
        if score == "magnitude":
            return group_scores(
                part, {name: weight.square() for name, weight in members.items()}, self.config.aggregate
            )
        norms = _input_norms(block, part)
        generator = context.generator(block.index, part.kind == "mlp")
        elements = {}
        for name, weight in members.items():
            scores = element_scores(weight, norms[name], norms[name], None, "F1")
            if score == "noise":
                scores = scores * torch.randn(weight.shape, generator=generator).abs().to(scores.device)
            elements[name] = scores
        return group_scores(part, elements, self.config.aggregate)

    # -- removing it --------------------------------------------------------------------------------------------------

    def run_block(self, block: Block, context: Context) -> Record:
        """Cut the block, attention first."""
        if self.config.remove == "blocks":
            return self._run_depth(block, context)
        counts = self._counts(block, context)
        parts = block_parts(block, context.structure, context.config, self.config.unit)
        before = sum(parameter.numel() for parameter in block.module.parameters())
        removed, errors = {}, {}
        for kind, part in parts.items():
            if counts.get(kind):
                removed[kind], errors[kind] = self._remove(block, part, counts[kind], context)
        after = sum(parameter.numel() for parameter in block.module.parameters())
        return {"parameters": {"before": before, "after": after}, "removed": removed, "output_error": errors}

    def _remove(self, block: Block, part: Part, count: int, context: Context) -> tuple[list[int], float | None]:
        """Returns the units, lowest first, and the relative output error that remains, where it was measured."""
        last = self._last(block, part)
        weight, bias = last.weight, getattr(last.module, "bias", None)
        bias = None if bias is None else bias.data
        measured = self.config.compensate or self.config.score == "output"
        moments = self._moments(block, part) if measured else None
        if self.config.score == "output":
            assert moments is not None
            removed, _ = removal_order(weight, moments, part.columns, part.classes, count)
        else:
            removed = lowest(self._scores(block, part, context), part.classes, count)
        kept = remaining(weight.shape[1], part.columns[torch.tensor(removed)]).to(weight.device)
        changed = weight[:, kept].clone()
        if self.config.compensate:
            assert moments is not None
            changed, bias = compensated(weight, bias, moments, kept)
        error = None if moments is None else output_error(weight, changed, moments, kept)
        cut(block, part, removed, context.structure, context.config, changed, bias)
        return removed, error

    def _run_depth(self, block: Block, context: Context) -> Record:
        prices = [record["price"] for record in block.surveys[0]]
        free = [index for index in range(len(prices)) if index not in self._protected(len(prices))]
        gone = sorted(free, key=lambda index: (prices[index], index))[: self._depth(context)]
        block.removed = block.index in gone
        return {"price": prices[block.index], "removed": block.removed}

    def _last(self, block: Block, part: Part) -> Linear:
        return Linear(part.last, block.module.get_submodule(part.last))

    def _moments(self, block: Block, part: Part) -> Moments:
        """Of the inputs of a part's last linear, as the block is now."""
        last = self._last(block, part)
        centred = self.config.compensate and getattr(last.module, "bias", None) is not None
        moments = Moments.empty(last.shape[1], centred, last.weight.device)
        _watch(block, {part.last: moments.add})
        moments.finish()
        if not torch.isfinite(moments.gram).all():
            raise CompressError(
                f"{block.name}.{part.last}: its inputs on the calibration text are not finite; check the model's weights."
            )
        return moments


def _watch(block: Block, visits: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Run the samples; show each named linear's inputs, [tokens, K]."""

    def hook(visit: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda _module, inputs: visit(inputs[0].flatten(0, -2))

    handles = [
        block.module.get_submodule(name).register_forward_pre_hook(hook(visit)) for name, visit in visits.items()
    ]
    try:
        with torch.no_grad():
            for run in block.samples:
                run(block.module)
    finally:
        for handle in handles:
            handle.remove()


def _input_norms(block: Block, part: Part) -> dict[str, Tensor]:
    """Root mean square of every member's inputs, [K]."""
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(part.members, 0)

    def visit(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            sums[name] = sums.get(name, torch.zeros(x.shape[1], device=x.device)) + x.square().sum(0)
            tokens[name] += x.shape[0]

        return add

    _watch(block, {name: visit(name) for name in part.members})
    return {name: (total / tokens[name]).sqrt() for name, total in sums.items()}


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.float(), right.float(), dim=-1).mean())


def _block_names(context: Context) -> list[str]:
    count = int(context.config.num_hidden_layers)
    return [block_prefix(context.structure, index) for index in range(count)]
