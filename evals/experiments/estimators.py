"""Measure what a group score knows of the loss: ``python -m compress.evals.experiments.estimators --help``.

The scores of the grids ``structured`` and ``estimators`` are set beside two true ones, found by backpropagation on the same text, by
Spearman's rank correlation over each MLP's channels. Forward passes are counted over the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor

from compress.calibration import draw_samples
from compress.evals import tables
from compress.evals.grids import script
from compress.evals.grids.grid import read_grid
from compress.passes import Block, Context
from compress.pruning.settings import WHOLE_MODEL, MiniLlmConfig
from compress.pruning.structured.gradients import whole_model_scores
from compress.pruning.structured.groups import last_linear
from compress.pruning.structured.scores import BlockScores, removal_order
from compress.pruning.structured.sizes import Removals
from compress.settings import Calibration
from compress.shapes import config_shape
from compress.source import Source, make_context, open_source, pick_device
from compress.streaming import StreamedModel
from compress.structure import block_prefix, linears_of

REFERENCES = ("Taylor, backprop", "gates, backprop (Fisher)")
PARTS = 2  # of a block, whose gates are perturbed apart


def dense_blocks(
    source: Source, context: Context, samples: Sequence[Tensor], model_statistics: Mapping[str, Tensor]
) -> Iterator[Block]:
    """Yield the blocks of the dense model in order, each with its inputs."""
    streamed = StreamedModel(source.state, context.device)
    streamed.whole()
    captured = [streamed.capture(tokens) for tokens in samples]
    hidden = [first for first, _ in captured]
    for index, module in enumerate(streamed.blocks):
        calls = [call[index] for _, call in captured]
        runs = [partial(streamed.run, hidden=h, call=call) for h, call in zip(hidden, calls, strict=True)]
        name, shape = block_prefix(context.structure, index), config_shape(context.config)
        yield Block(
            index, name, module, linears_of(module, name), samples=runs, model_statistics=model_statistics, shape=shape
        )
        hidden = [run(module) for run in runs]


@torch.no_grad()
def channel_scores(config: MiniLlmConfig, source: Source, context: Context, samples: Sequence[Tensor]) -> list[Tensor]:
    """Return the scores of the channels of every MLP of the dense model, one vector per block."""
    parts, model_statistics, scores = Removals(config.sizes, context).parts, dict[str, Tensor](), []
    if config.score in WHOLE_MODEL:
        with torch.enable_grad():
            model = StreamedModel(source.state, context.device).whole()
            model_statistics = whole_model_scores(config.gradients, model, samples, context, parts, [], lambda *_: None)
    for block in dense_blocks(source, context, samples, model_statistics):
        part, found = parts[block.index]["mlp"], BlockScores(config.scores, block, context)
        if config.score != "output":
            scores.append(found.scores(part))
            continue
        weight, moments = last_linear(block, part).weight, found.moments(part)
        order, _ = removal_order(weight, moments, part.columns, part.classes, part.count - 1)
        rank = torch.full((part.count,), float(part.count))
        rank[order] = torch.arange(len(order), dtype=torch.float32)
        scores.append(rank)
    return scores


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Return Spearman's rank correlation of two lists of scores without ties."""
    ranks = torch.stack([scores.argsort().argsort().double() for scores in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


def forwards(config: MiniLlmConfig, blocks: int) -> str:
    """Return the number of forward passes that a score takes, or ``backward``."""
    if config.score == "taylor" or config.estimator == "backprop":
        return "backward"
    if config.score == "gates":
        return str(2 * PARTS * blocks * config.draws) if config.estimator == "spsa" else "2"
    return str(2 * config.draws + 1 if config.score == "fms" else int(config.score not in ("magnitude", "random")))


def main(
    model: Annotated[str, typer.Option(help="Dense model.")] = "builtin",
    calibration: Annotated[Optional[str], typer.Option(help="Text file; built-in modules if absent.")] = None,
    separator: Annotated[Optional[str], typer.Option(help="Divides the text into documents.")] = None,
    min_characters: Annotated[int, typer.Option(help="Pass over shorter documents.")] = 0,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
) -> None:
    """Print a table of scores: forward passes, and rank correlation with the true ones."""
    place: dict[str, Any] = {"text": calibration, "separator": separator} if calibration else {"builtin": "stdlib"}
    settings = Calibration(**place, min_characters=min_characters, samples=samples, length=length)
    source = open_source(model)
    context = make_context(source, pick_device("cpu"), 0)
    drawn = draw_samples(settings, source.tokenizer, context.context_length).tokens
    known = {**read_grid("structured")["axes"]["score"], **read_grid("estimators")["axes"]["score"]}
    known["random"] = {"score": "random"}
    configs = {label: MiniLlmConfig.model_validate(estimator) for label, estimator in known.items()}
    exact = [channel_scores(configs[label], source, context, drawn) for label in REFERENCES]
    table = tables.Table(["score", "forward passes", "Spearman, Taylor", "Spearman, gate Fisher"])
    for label, config in configs.items():
        scores = channel_scores(config, source, context, drawn)
        pairs = [[rank_correlation(a, b) for a, b in zip(scores, truth, strict=True)] for truth in exact]
        table.add("", label, forwards(config, len(scores)), *(f"{sum(each) / len(each):.2f}" for each in pairs))
    typer.echo(tables.markdown(table))


if __name__ == "__main__":
    script.run(main)
