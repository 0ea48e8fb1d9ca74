"""Train what pruning has left, by low-rank adapters or as a whole, to say again what the text says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.errors import CompressError
from compress.passes import Context, Needs, Pass, Sizes, Whole, Work
from compress.pruning.instructions import answer_loss, read_instructions
from compress.pruning.lora import adapter_model, adapter_state, masked_model, merge_masked, write_adapter
from compress.pruning.settings import LoraRecoveryConfig
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import PackedShape
from compress.sidecars import ADAPTER_FOLDER
from compress.structure import block_prefix, is_linear
from compress.training import Loss, hold_out, next_token_loss, train, training_work
from compress.workspace import Record


class LoraRecovery(Pass[LoraRecoveryConfig]):
    """Train once, on the whole model: one unit of work. Weights that are zero stay zero where the weights themselves change."""

    Config = LoraRecoveryConfig

    def needs(self) -> Needs:
        """Ask for the whole model."""
        return Needs(whole_model=True, divides=True, sidecar=not self.config.merge, text=self.config.text)

    def model_units(self, packed: Mapping[str, PackedShape]) -> list[str]:
        """Name the one unit of work.

        Raises:
            CompressError: weights that are to change are packed.
        """
        if packed and self.config.merge:
            what = "full trains weights" if self.config.full else "adapters cannot be added to packed weights"
            raise CompressError(
                f"lora_recovery: {what}, but a pass before has quantised them; put it before that pass, or set merge: false."
            )
        return [ADAPTER_FOLDER if not self.config.merge else "model"]

    def memory(self, sizes: Sizes, context: Context) -> int:
        """Estimate what training weights takes beside the model, or what adapters and zeros make of them, all at once.

        Of the linears' inputs, which both need, half are kept anyway.
        """
        linears = context.linears.values()
        tokens = min(sizes.samples, self.config.micro_batch) * sizes.length
        kept = 2 * tokens * sum(columns for _, columns in linears)
        if self.config.full:
            return kept + 4 * sizes.model
        return kept + 5 * sum(rows * columns for rows, columns in linears)

    def work(self, samples: int, length: int, packed: Mapping[str, PackedShape]) -> Work:
        """Count its training; adapters' own products are small."""
        return training_work(self._resolved(samples), samples, length, weights=self.config.full)

    def run_model(
        self, unit: str, whole: Whole, context: Context, progress: Callable[[str, int, int], None]
    ) -> tuple[dict[str, Tensor], Record]:
        """Train; return the changed weights, or the adapter's tensors."""
        config = self._resolved(len(whole.samples))
        model: Any = whole.model.requires_grad_(config.full)
        targets = _targets(model, context)
        zeros = [name for name in targets if config.merge and not model.get_parameter(f"{name}.weight").all()]
        trained = model
        if config.full:
            for name in zeros:
                weight = model.get_parameter(f"{name}.weight")
                weight.register_hook((weight != 0).mul)
        else:
            put = masked_model if zeros else adapter_model
            trained = put(model, targets, config.rank, config.alpha, config.dropout, context.seed)
            for name, module in trained.named_modules():
                module.train("lora_dropout" in name)  # the model's own dropout stays off
        samples, loss = self._samples(whole, context)
        result = train(trained, samples, config, context.seed, loss=loss, folder=whole.scratch, progress=progress)
        if not config.merge:
            tensors, fields = adapter_state(trained)
            return tensors, {**result.record(), "adapter": fields}
        names = {name for name, _ in model.named_parameters()}
        if not config.full:
            model = merge_masked(trained) if zeros else trained.merge_and_unload()
            names = {f"{name}.weight" for name in targets}
        state = model.state_dict()
        return {name: state[name].to("cpu", copy=True) for name in sorted(names)}, result.record()

    def _samples(self, whole: Whole, context: Context) -> tuple[Sequence[Tensor], Loss]:
        """Return the samples to train on, and the loss that says what of them is learned."""
        if not self.config.instructions:
            return whole.samples, next_token_loss
        assert self.config.text is not None
        assert context.tokenizer is not None
        found = read_instructions(self.config.text, context.tokenizer)
        return [sample.tokens for sample in found], answer_loss(found)

    def _resolved(self, samples: int) -> LoraRecoveryConfig:
        """Return the settings with epochs turned into steps."""
        if self.config.epochs is None:
            return self.config
        seen = len(hold_out(samples, self.config.held_out)[0])
        return self.config.model_copy(update={"steps": max(1, round(self.config.epochs * seen / self.config.batch))})

    def write_files(
        self, folder: Path, units: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Record]
    ) -> None:
        """Write the adapter in peft's own form."""
        for unit, tensors in units.items():
            write_adapter(folder / ADAPTER_FOLDER, tensors, records[unit]["adapter"])


_MAMBA = (
    "falcon_h1",
    "falcon_mamba",
    "mamba",
    "mamba2",
    "nemotron_h",
)  # types whose kernels read the weight of ``out_proj``


def _targets(model: nn.Module, context: Context) -> list[str]:
    """List the names of all linears inside the blocks, packed or not, that peft puts adapters on."""
    blocks = tuple(f"{block_prefix(context.structure, i)}." for i in range(context.structure.depth))
    inside = {
        name
        for name, module in model.named_modules()
        if name.startswith(blocks) and (is_linear(module) or isinstance(module, BitPlaneLinear))
    } - context.structure.left.keys()
    if context.config.model_type in _MAMBA:
        inside = {name for name in inside if not name.endswith(".out_proj")}
    return [name for name, _ in model.named_modules() if name in inside]
