"""A pass that works block by block: it scales the columns of weights whose input is quiet."""

from typing import Literal

import torch
from pydantic import Field

from compress.passes import Block, Context, Needs, Pass, PassConfig
from compress.workspace import Record


class ShrinkConfig(PassConfig):
    """Scale the columns of every linear that see less than average input."""

    kind: Literal["shrink"] = Field("shrink", description="Name of the pass.")
    factor: float = Field(0.5, ge=0, le=1, description="What those columns are multiplied by.")


class Shrink(Pass[ShrinkConfig]):
    """Looks at the inputs of each block as the shrunk blocks before it produce them."""

    Config = ShrinkConfig

    def needs(self) -> Needs:
        """Ask for calibration samples, carried through the blocks that this pass has changed."""
        return Needs(inputs="updated")

    def run_block(self, block: Block, context: Context) -> Record:
        """Measure every linear's input, then scale weights in place."""
        energy: dict[str, torch.Tensor] = {}

        def visit(name: str, x: torch.Tensor) -> None:  # x: [tokens, in_features]
            energy[name] = energy.get(name, 0) + x.square().sum(0)

        block.for_each_input(visit)
        quiet = {name: total < total.mean() for name, total in energy.items()}
        for name, linear in block.linears.items():  # linear.weight: [out_features, in_features]
            linear.weight[:, quiet[name]] *= self.config.factor
        return {"quiet": {name: int(mask.sum()) for name, mask in quiet.items()}}
