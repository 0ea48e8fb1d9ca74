"""A pass that trains: the weights of norms and all biases learn to say what the dense model says."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import kl_div

from compress.passes import Context, Needs, Pass, Progress, Whole
from compress.training import Batch, TrainingConfig, predictions, train
from compress.workspace import Record


class TuneNormsConfig(TrainingConfig):
    """Train norms and biases to give the dense model's next-token distribution."""

    kind: Literal["tune_norms"] = Field("tune_norms", description="Name of the pass.")


class TuneNorms(Pass[TuneNormsConfig]):
    """Trains every vector of the model; its matrices, packed or dense, stay as they are."""

    Config = TuneNormsConfig

    def needs(self) -> Needs:
        """Ask for the whole model as it is by now, and for the dense one it came from."""
        return Needs(whole_model=True, teacher=True, text=self.config.text)

    def run_model(
        self, unit: str, whole: Whole, context: Context, progress: Progress
    ) -> tuple[dict[str, Tensor], Record]:
        """Train; return the changed tensors by name."""
        for parameter in whole.model.parameters():
            parameter.requires_grad_(parameter.ndim == 1)

        def loss(model: nn.Module, batch: Batch) -> Tensor:  # summed over the tokens to predict, in nats
            with torch.no_grad():
                wanted = predictions(whole.dense, batch.tokens).log_softmax(-1)
            found = predictions(model, batch.tokens).log_softmax(-1)
            return kl_div(found, wanted, reduction="none", log_target=True).sum(-1)[batch.scored].sum()

        trained = train(
            whole.model, whole.samples, self.config, context.seed, loss=loss, folder=whole.scratch, progress=progress
        )
        changed = {name: p.detach().cpu() for name, p in whole.model.named_parameters() if p.requires_grad}
        return changed, trained.record()
