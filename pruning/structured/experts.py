"""Remove whole experts of mixtures: those without which a layer's experts together make almost the same.

The error of removing an expert is that of the sum of all on the calibration tokens, when the router cannot choose it: others take its
place, with the weights that the smaller router gives them. Experts compute only for tokens that are sent elsewhere, so a round costs about
as many forward passes as a token has experts. They go a few at a time, each round's errors given those that have gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from math import lcm, prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from compress.carrying import Call as BlockCall
from compress.errors import CompressError, first_line
from compress.mixtures import Fewer, experts_of, fewer, smaller
from compress.models import stated, text_config
from compress.passes import Block, Context
from compress.pruning.settings import MiniLlmConfig
from compress.pruning.structured.routing import Call, Router
from compress.pruning.structured.scores import lowest
from compress.ranks import Sums
from compress.streaming import State, StreamedModel, built
from compress.structure import block_prefix
from compress.weights import TensorInfo
from compress.workspace import Record

ROUNDS = 8
"""In how many parts, at most, experts go by their output error."""
_PROBED = 256  # tokens on which a router is tried before any work
_SAME = 1e-5  # of a weight: what another order of the same sum may change


class ExpertRemoval:
    """Choose how many experts of every mixture go, and which; take them out."""

    def __init__(self, settings: MiniLlmConfig) -> None:
        self.settings = settings
        self._known: tuple[PretrainedConfig, Fewer] | None = None
        self._small: dict[int, PreTrainedModel] = {}

    def change(self, context: Context) -> Fewer:
        """Return how many experts every mixture has and will have.

        Raises:
            CompressError: none can be removed, or not as many as are to go.
        """
        if self._known is None or self._known[0] is not context.config:
            self._small = {}
            self._known = context.config, self._sized(context)
        return self._known[1]

    def _sized(self, context: Context) -> Fewer:
        settings, config = self.settings, context.config
        before, step = experts_of(config), lcm(_groups(config), settings.multiple)
        if before <= step:
            raise CompressError(
                f"mini_llm: {before} experts stay if their number is to be a multiple of {step}, so none can go."
            )
        one = fewer(config, context.structure, (before - 1) // step * step)
        each = one.lost / (before - one.after)  # parameters of one expert of every mixture
        inside = sum(rows * columns for rows, columns in context.linears.values())
        whole = {"model": context.parameters, "blocks": inside, "layers": before * each}[settings.ratio_of]
        wanted = settings.ratio * whole / each
        after = round((before - wanted) / step) * step
        if not 0 < after < before:
            raise CompressError(
                f"mini_llm: ratio {settings.ratio} of {whole:.0f} parameters is {wanted:.2f} of {before} experts of every layer, of "
                f"which a multiple of {step} is to stay; {step} to {before - step} can go."
            )
        return fewer(config, context.structure, after)

    def small(self, context: Context) -> Callable[[int], PreTrainedModel]:
        """Return what builds the empty model with some number of experts, once for each."""
        before = self.change(context).before

        def build(count: int) -> PreTrainedModel:
            if count not in self._small:
                self._small[count] = smaller(context.config, before, count)
            return self._small[count]

        return build

    def check(self, context: Context) -> None:
        """Refuse a model whose router, asked on made-up tokens, chooses others than before among experts that stay."""
        change, kind = self.change(context), context.config.model_type
        idle = [path for path in change.paths if any(name.startswith(f"{path}.") for name in context.structure.left)]
        if idle:
            raise CompressError(
                f"model type {kind!r}: no experts can be removed: the calibration text says nothing of {idle[0]} "
                f"({context.structure.left[next(n for n in context.structure.left if n.startswith(idle[0]))]})."
            )
        inside = [block_prefix(context.structure, index) for index in range(context.structure.depth)]
        blocks = {path: next((name for name in inside if path.startswith(f"{name}.")), "") for path in change.paths}
        if len({*blocks.values()} - {""}) < len(change.paths):
            raise CompressError(
                f"model type {kind!r}: no experts can be removed: a block has several mixtures, or they lie elsewhere."
            )
        seen = set()
        for index, name in enumerate(inside):
            axes = tuple(tensor.removeprefix(name) for tensor in change.axes if tensor.startswith(f"{name}."))
            if axes and axes not in seen:
                seen.add(axes)
                try:
                    self._try(context, index, name)
                except CompressError as error:
                    raise CompressError(
                        f"model type {kind!r}: no experts can be removed: {first_line(error).rstrip('.')}."
                    ) from error
                except Exception as error:  # whatever a model's code may raise
                    raise CompressError(
                        f"model type {kind!r}: no experts can be removed: its router cannot be tried by itself "
                        f"({type(error).__name__}: {first_line(error)})."
                    ) from error

    def _try(self, context: Context, index: int, name: str) -> None:
        """Try the router of one block on made-up weights and tokens."""
        change, structure = self.change(context), context.structure
        source = _MadeUp(built(context.config, {}, {}), name, change)
        model = StreamedModel(State(source, context.config, {}, "", {}, structure), torch.device("cpu"))
        first, calls = model.capture(torch.arange(_PROBED) % context.vocabulary)
        hidden = source.draw(_width(first, calls[index]))
        with model.block(index) as block:
            router = Router(block, name, change, _groups(context.config), self.small(context))
            call = router.call(lambda module: model.run(module, hidden, calls[index]), compute=False)
            chosen = call.weights[:, :-1] != 0
            most = int(chosen.sum(1).max())
            if most > change.after:
                raise CompressError(
                    f"{most} experts are chosen for a token, so no fewer can stay, and {change.after} would; lower ratio"
                )
            kept = self._kept(chosen, change, context)
            cut = router.cut_weights(call, kept)
            staying = ~chosen[:, [place for place in range(change.before) if place not in kept]].any(1)
            if not torch.equal((cut[:, :-1] != 0)[staying], chosen[staying]) or not cut.isfinite().all():
                raise CompressError("of tokens whose experts all stay its router, cut, chooses others")
            if router.masked and not torch.equal(router.weights(call, kept) != 0, cut != 0):
                raise CompressError(
                    "it chooses among groups of experts, and has no bias that keeps it from one of them"
                )

    def _kept(self, chosen: Tensor, change: Fewer, context: Context) -> list[int]:
        """Return as many experts as are to stay, all that are chosen for some tokens among them."""
        classes, found = self.classes(context), list[int]()
        quota = change.after // (int(classes.max()) + 1)
        for places in [*(row.nonzero().flatten().tolist() for row in chosen), [*range(change.before)]]:
            for place in places:
                same = sum(bool(classes[other] == classes[place]) for other in found)
                if place not in found and same < quota:
                    found.append(place)
        return sorted(found)

    def classes(self, context: Context) -> Tensor:
        """Return the group of every expert, int64 [E]; every group loses equally many."""
        before = self.change(context).before
        return torch.arange(before) // (before // _groups(context.config))

    def run_block(self, block: Block, context: Context) -> Record:
        """Take experts out of a block's mixture, if it has one."""
        change = self.change(context)
        if not any(path.startswith(f"{block.name}.") for path in change.paths):
            return {}
        router = Router(block.module, block.name, change, _groups(context.config), self.small(context))
        count, measured = change.before - change.after, self.settings.score in ("output", "frequency")
        if self.settings.score == "output":
            removed = self._by_error(block, router, count, context)
        else:
            removed = lowest(self._scores(block, router, context), self.classes(context), count)
        before = sum(parameter.numel() for parameter in block.module.parameters())
        error = _relative_error(block, router, removed) if measured else None
        self._cut(block, router, [place for place in range(change.before) if place not in removed], context)
        after = sum(parameter.numel() for parameter in block.module.parameters())
        return {
            "parameters": {"before": before, "after": after},
            "removed": {"experts": removed},
            "output_error": {"experts": error},
        }

    def _scores(self, block: Block, router: Router, context: Context) -> Tensor:
        """Score every expert, [E], by what is no error: the lowest go."""
        count = router.experts.num_experts
        if self.settings.score == "random":
            return torch.rand(count, generator=context.generator(block.index))
        if self.settings.score == "magnitude":
            held = (router.experts.expert(place).parameters() for place in range(count))
            return torch.stack([sum((p.double().square().sum() for p in own), torch.tensor(0.0)) for own in held])
        sums = Sums(block.ranks)
        for call in _calls(block, router, sums, compute=False):
            sums.add("chosen", (call.weights[:, :-1] != 0).sum(0).double())
        return sums.total["chosen"]

    def _by_error(self, block: Block, router: Router, count: int, context: Context) -> list[int]:
        """Choose experts by the error that is left when they have gone, in rounds, the lowest first."""
        classes, removed = self.classes(context), list[int]()
        groups = int(classes.max()) + 1
        at_once = -(-count // (ROUNDS * groups)) * groups
        while len(removed) < count:
            errors = _errors(block, router, removed)
            errors[removed] = float("inf")
            removed += lowest(errors, classes, min(at_once, count - len(removed)))
        return removed

    def _cut(self, block: Block, router: Router, kept: Sequence[int], context: Context) -> None:
        """Put transformers' own modules for fewer experts in place of those around a router."""
        change, module, prefix = self.change(context), block.module, f"{block.name}."
        small = self.small(context)(change.after).get_submodule(block.name)
        tensors = change.cut(module.state_dict(), prefix, kept)
        cut = [router.path, *(name for name in change.axes if name.startswith(prefix))]
        paths = (
            [router.scope] if router.scope else sorted({name.removeprefix(prefix).partition(".")[0] for name in cut})
        )
        for path in paths:
            fresh = deepcopy(small.get_submodule(path))
            inner = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
            fresh.load_state_dict(inner, assign=True)
            fresh.requires_grad_(False)
            for holder in fresh.modules():
                for name, buffer in holder.named_buffers(recurse=False):
                    setattr(holder, name, buffer.to(context.device))
            module.set_submodule(path, fresh)


def _groups(config: PretrainedConfig) -> int:
    """Return in how many groups experts are, of which a token chooses some before it chooses experts."""
    found = (stated(text_config(config), key) for key in ("n_group", "num_expert_group"))
    return next((groups for groups in found if groups), 1)


def _calls(block: Block, router: Router, sums: Sums, compute: bool = True) -> Iterable[Call]:
    """Yield the calls of a block's experts on all samples, and end the lots of sums that are made of them."""
    for lot in block.each_lot():
        for run in lot:
            yield router.call(run, compute)
        sums.end_lot()


def _without(router: Router, gone: Sequence[int]) -> list[int]:
    return [place for place in range(router.experts.num_experts) if place not in gone]


@torch.no_grad()
def _errors(block: Block, router: Router, gone: Sequence[int]) -> Tensor:
    """Measure the squared error of what experts make together without some and one more, float64 [E] on the CPU, summed over tokens."""
    sums, kept = Sums(block.ranks), _without(router, gone)
    for call in _calls(block, router, sums):
        weights = router.weights(call, kept) if gone else call.weights
        output = router.together(call.x, weights) if gone else call.output.float()
        errors = torch.zeros(router.experts.num_experts, dtype=torch.float64)
        for place in kept:
            new = router.weights(call, _without(router, [*gone, place]))
            ratio = new.sum(1, keepdim=True) / weights.sum(1, keepdim=True)  # all of a token's may count for more
            moved = ((new - ratio * weights).abs() > _SAME * new.amax(1, keepdim=True)).any(1).nonzero().flatten()
            made = output * ratio
            made[moved] = router.together(call.x[moved], new[moved])
            errors[place] = (made - call.output).double().square().sum()
        sums.add("errors", errors)
    return sums.total["errors"]


@torch.no_grad()
def _relative_error(block: Block, router: Router, gone: Sequence[int]) -> float:
    """Measure the mean square error of what experts make together without some, by that of what they make."""
    sums, kept = Sums(block.ranks), _without(router, gone)
    for call in _calls(block, router, sums):
        made = router.together(call.x, router.weights(call, kept))
        sums.add("error", (made - call.output).double().square().sum())
        sums.add("energy", call.output.double().square().sum())
    energy = float(sums.total["energy"])
    return float(sums.total["error"]) / energy if energy > 0 else 0.0


def _width(first: Tensor, call: BlockCall) -> tuple[int, ...]:
    """Return the shape of what a block is given, with all that is carried."""
    load = call.given
    if not load.items:
        return tuple(first.shape)
    return (*first.shape[:2], sum(-prod(shape) for shape in (load.hidden, *(item.shape for item in load.items))))


class _MadeUp:
    """Make up tensors of a model: random ones of one block, but for its experts, and zeros for all others, which take no memory."""

    def __init__(self, model: PreTrainedModel, block: str, change: Fewer) -> None:
        self._tensors, self._change = model.state_dict(), change
        self._block, self._generator = f"{block}.", torch.Generator().manual_seed(0)

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor."""
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.itemsize, Path(name))
            for name, tensor in self._tensors.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Make some tensors."""
        return {name: self._made(name, self._tensors[name]) for name in names}

    def _made(self, name: str, tensor: Tensor) -> Tensor:
        others = any(name.startswith(f"{path}.") for path in self._change.paths) or not name.startswith(self._block)
        if not tensor.is_floating_point():  # numbers of experts, perhaps
            return torch.randint(self._change.before, tensor.shape, generator=self._generator).to(tensor.dtype)
        if others:
            return torch.zeros(()).expand(tensor.shape)
        if tensor.numel() == tensor.shape[-1]:  # no bias for some: after softmax it might choose others of fewer
            return torch.ones(tensor.shape)
        return self.draw(tensor.shape).div_(tensor.shape[-1] ** 0.5)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(tuple(shape), generator=self._generator)
