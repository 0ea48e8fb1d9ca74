"""Train whatever is trained after compression, in one loop: prompts, adapters, weights that were left.

The learning rate, the order of samples, the state drawn for a step and the random numbers of dropout depend on the seed and the
number of the step only, so a run that was killed continues from its last checkpoint and ends with the same bits. Under
``torchrun`` or ``accelerate launch`` every process takes its share of each step's samples.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from compress.defaults import usual_defaults
from compress.errors import CompressError
from compress.logits import token_losses
from compress.passes import Progress, Work, derived_generator
from compress.ranks import processes
from compress.settings import TrainingConfig as TrainingConfig  # a part of this contract
from compress.weights import read_tensors
from compress.workspace import digest, save_atomic


@dataclass(frozen=True)
class Batch:
    """Hold some samples side by side.

    Attributes:
        tokens: int64 [B, T], padded on the right (out of sight of what comes before, so no mask is needed).
        scored: bool [B, T - 1], which of ``tokens[:, 1:]`` are to be predicted: all but the padding.
        places: where the samples are in the list that was given to :func:`train`.
    """

    tokens: Tensor
    scored: Tensor
    places: Sequence[int]


Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a batch, summed (not averaged) over the tokens to be predicted, in nats."""

States = Mapping[str, Callable[[], object]]
"""Label -> call that brings the model into a state to be trained in, a number of bits for example."""
_AS_IT_IS: States = {"loss": lambda: None}


def predictions(model: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the logits for ``tokens[:, 1:]``, float32 [B, T - 1, vocabulary]; those of a prompt's virtual tokens are dropped.

    With a large vocabulary this is much memory: :class:`compress.logits.Predictions` makes a part of them at a time.
    """
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, -tokens.shape[1] : -1].float()


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum the cross-entropy of the tokens after each sample's first."""
    return token_losses(model, batch.tokens)[batch.scored].sum()


@dataclass
class Trained:
    """Hold the outcome of a training.

    Attributes:
        history: a row per validation: ``step``, ``learning_rate``, ``loss`` (mean over the tokens trained on since the
            row before, None at step 0), ``held_out`` (mean loss by state), all in nats per token.
        best: the row whose parameters the model was left with.
        trained: numbers that were trained.
        samples: ``{"trained", "held_out"}``.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any]
    trained: int
    samples: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return plain data for the manifest, without times: equal work, equal bytes."""
        return dict(vars(self))


def training_work(config: TrainingConfig, samples: int, length: int, states: int = 1, weights: bool = False) -> Work:
    """Count what :func:`train` runs, for the plan's time; of ``states`` all are validated."""
    validations, held = 1 + -(-config.steps // config.validate_every), len(hold_out(samples, config.held_out)[1])
    return Work(config.steps * config.batch, validations * states * held, length, weights)


def hold_out(count: int, share: int) -> tuple[list[int], list[int]]:
    """Choose the places of the samples to train on, and of those held out: one of ``share``, at least one."""
    if count < 2:
        raise CompressError("training needs at least two samples, one of them to hold out; give more text.")
    held = list(range(0, count, share))
    return [place for place in range(count) if place % share], held


@usual_defaults()
def train(
    model: nn.Module,
    samples: Sequence[Tensor],
    config: TrainingConfig,
    seed: int,
    *,
    loss: Loss = next_token_loss,
    states: States | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train the parameters of a model that require a gradient.

    Modules stay in training or evaluation mode as they are (dropout is the caller's choice), all are in evaluation mode
    while the held-out samples are scored. The model is left with the parameters that were best on those, which may be
    those it came with.

    Args:
        model: causal LM, possibly within an adapter, on its device; what is trained must be float32.
        samples: int64 [T] each, T at least 2.
        config: steps, batches, learning rate, validation.
        seed: of everything random.
        loss: what a step minimises; the validation is in its terms too.
        states: one is drawn for every step; the held-out loss is the mean over all. None trains the model as it is.
        folder: for checkpoints, which an interrupted training continues from; deleted by the caller.
        progress: called with (what, steps done, steps in all), to tell of progress.

    Raises:
        CompressError: nothing to train, too few samples, a loss that is not finite.
    """
    loop = _Loop(model, samples, config, seed, loss, states or _AS_IT_IS, folder)
    return loop.run(progress or (lambda *_: None))


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Tensor],
        config: TrainingConfig,
        seed: int,
        loss: Loss,
        states: States,
        folder: Path | None,
    ) -> None:
        self.model, self.samples, self.config, self.seed = model, samples, config, seed
        self.loss, self.states = loss, states
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise CompressError("training: no parameter of the model requires a gradient.")
        self.device = next(iter(self.parameters.values())).device
        self.trained_on, self.held_out = hold_out(len(samples), config.held_out)
        self.processes = processes(self.device)
        for parameter in self.parameters.values():
            parameter.data.copy_(broadcast(parameter.data))
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step, self.history, self.best = 0, list[dict[str, Any]](), dict[str, Any]()
        self.kept = self._copy()  # the parameters of the row that is best
        start = [
            (name, sha256(t.cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest())
            for name, t in self.kept.items()
        ]
        tokens = [sample.tolist() for sample in samples]
        self.key = digest(config.model_dump(mode="json"), seed, list(states), tokens, start)
        self.path = folder / "training.safetensors" if folder else None

    def run(self, progress: Progress) -> Trained:
        total, scored = self.config.steps, (0.0, 0)
        if not self._resume():
            self._validate(None)
        while self.step < total:
            best = f"held-out loss {_mean(self.best['held_out']):.4f} at step {self.best['step']}"
            progress(best, self.step, total)
            summed, tokens = self._step(self.step)
            scored = scored[0] + summed, scored[1] + tokens
            self.step += 1
            if self.step % self.config.validate_every == 0 or self.step == total:
                self._validate(scored[0] / scored[1])
                self._save()
                scored = 0.0, 0
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.kept[name])
        count = sum(parameter.numel() for parameter in self.parameters.values())
        samples = {"trained": len(self.trained_on), "held_out": len(self.held_out)}
        return Trained(self.history, self.best, count, samples)

    def _step(self, step: int) -> tuple[float, int]:
        """Make one step; return the summed loss and the tokens it is over, of all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        places = self._places(step)
        count = sum(len(self.samples[place]) - 1 for place in places)
        labels = list(self.states)
        self.states[labels[int(torch.randint(len(labels), (), generator=derived_generator(self.seed, 1, step)))]]()
        self.optimizer.zero_grad()
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        mine = places[self.processes.process_index :: self.processes.num_processes]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # dropout's numbers are the step's own
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=derived_generator(self.seed, 2, step))))
            for batch in _batches(self.samples, mine, self.config.micro_batch, self.device):
                loss = _loss(self.loss, self.model, batch, self.config)
                (loss / count).backward()  # type: ignore[no-untyped-call]
                summed += loss.detach()
        value = float(reduce(summed, "sum"))
        if not math.isfinite(value):
            raise CompressError(f"training: the loss at step {step} is not finite; lower learning_rate.")
        share_gradients(list(self.parameters.values()), self.processes)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.optimizer.step()
        return value, count

    def learning_rate(self, step: int) -> float:
        """Return a step's learning rate: linear up, then linear down."""
        config = self.config
        rising = min(1.0, (step + 1) / (config.warmup + 1))
        return config.learning_rate * min(rising, (config.steps - step) / max(1, config.steps - config.warmup))

    def _places(self, step: int) -> list[int]:
        """Choose the samples of a step: epoch after epoch, each in an order of its own."""
        count, size = len(self.trained_on), self.config.batch
        positions = range(step * size, (step + 1) * size)
        orders = {
            epoch: torch.randperm(count, generator=derived_generator(self.seed, 0, epoch)).tolist()
            for epoch in range(positions[0] // count, positions[-1] // count + 1)
        }
        return [self.trained_on[orders[position // count][position % count]] for position in positions]

    def _validate(self, loss: float | None) -> None:
        """Add a row to the history; keep the parameters if they are the best so far."""
        config, states, step = self.config, self.states, self.step
        found = held_out_losses(self.model, self.samples, config, self.device, loss=self.loss, states=states)
        if not step and not math.isfinite(_mean(found)):
            raise CompressError("training: the loss of the held-out samples is not finite before the first step.")
        rate = self.learning_rate(step - 1) if step else 0.0
        self.history.append({"step": step, "learning_rate": rate, "loss": loss, "held_out": found})
        if not self.best or _mean(found) < _mean(self.best["held_out"]):
            self.best, self.kept = self.history[-1], self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _save(self) -> None:
        if self.path is None or not self.processes.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"best/{name}": tensor for name, tensor in self.kept.items()}
        for name, parameter in self.parameters.items():
            tensors[f"now/{name}"] = parameter.detach()
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{kind}/{name}"] = value
        on_cpu = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        progress = {"step": self.step, "history": self.history, "best": self.best}
        save_atomic(self.path, on_cpu, {"key": self.key, "progress": json.dumps(progress)})

    def _resume(self) -> bool:
        """Continue from a checkpoint of this very training, if there is one that can be read."""
        if self.path is None:
            return False
        try:
            with safe_open(self.path, framework="pt") as handle:
                metadata = handle.metadata() or {}
            if metadata.get("key") != self.key:
                return False
            tensors = read_tensors(self.path)
        except (FileNotFoundError, SafetensorError):
            return False
        progress = json.loads(metadata["progress"])
        self.step, self.history, self.best = progress["step"], progress["history"], progress["best"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors.pop(f"now/{name}"))
                self.kept[name] = tensors.pop(f"best/{name}").to(self.device)
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            self.optimizer.state[self.parameters[name]][kind] = tensor if kind == "step" else tensor.to(self.device)
        return True


@usual_defaults()
@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    samples: Sequence[Tensor],
    config: TrainingConfig,
    device: torch.device,
    *,
    loss: Loss = next_token_loss,
    states: States | None = None,
) -> dict[str, float]:
    """Measure the mean loss per token of the held-out samples in every state, in evaluation mode; arguments as of :func:`train`."""
    team = processes(device)
    _, held = hold_out(len(samples), config.held_out)
    mine = held[team.process_index :: team.num_processes]
    tokens = sum(len(samples[place]) - 1 for place in held)
    modes, found = {module: module.training for module in model.modules()}, {}
    model.eval()
    try:
        for label, enter in (states or _AS_IT_IS).items():
            enter()
            summed = torch.zeros((), dtype=torch.float64, device=device)
            for batch in _batches(samples, mine, config.micro_batch, device):
                summed += _loss(loss, model, batch, config)
            found[label] = float(reduce(summed, "sum")) / tokens
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found


def share_gradients(parameters: Sequence[nn.Parameter], team: PartialState) -> None:
    """Sum the gradients over processes, in one message; a parameter without one counts as zero."""
    if team.num_processes == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    parts = reduce(flat, "sum").split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).clone()


def _batches(samples: Sequence[Tensor], places: Sequence[int], size: int, device: torch.device) -> Iterator[Batch]:
    """Yield micro-batches; samples of like length go together."""
    ordered = sorted(places, key=lambda place: -len(samples[place]))
    for start in range(0, len(ordered), size):
        chosen = [samples[place] for place in ordered[start : start + size]]
        scored = [torch.ones(len(tokens) - 1, dtype=torch.bool) for tokens in chosen]
        yield Batch(
            pad_sequence(chosen, batch_first=True).to(device),
            pad_sequence(scored, batch_first=True).to(device),
            ordered[start : start + size],
        )


def _loss(loss: Loss, model: nn.Module, batch: Batch, config: TrainingConfig) -> Tensor:
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return loss(model, batch)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
