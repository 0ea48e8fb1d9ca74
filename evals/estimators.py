"""What a group score knows of the loss, at what cost: ``python -m compress.evals.estimators OUT --help``.

Every score is set beside two true ones found by backpropagation on the same text (elementwise Taylor, and the Fisher
information of a gate on each group) by Spearman's rank correlation over each MLP's channels, and then used: the perplexity after
channels and heads have gone, before and after refitting. Forward passes are counted over the calibration text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration import draw_samples
from compress.evals import experiments, tables
from compress.evals.perplexity import context_length, score
from compress.evals.text import documents_of, windows
from compress.passes import Block
from compress.pipeline import make_context, open_source, pick_device
from compress.pruning.structured.gradients import whole_model_scores
from compress.pruning.structured.groups import last_linear
from compress.pruning.structured.mini_llm import MiniLlm, MiniLlmConfig
from compress.pruning.structured.scores import WHOLE_MODEL, BlockScores, removal_order
from compress.pruning.structured.sizes import Removals
from compress.recipe import Calibration
from compress.shapes import config_shape
from compress.streaming import Call, StreamedModel
from compress.structure import block_prefix, linears_of

PARTS = 2
"""Of a block, whose gates are perturbed apart."""
ESTIMATORS: dict[str, tuple[dict[str, Any], str]] = {
    "output error": ({"score": "output"}, "1"),
    "gates, residual gradient": ({"score": "gates"}, "2"),
    "gates, SPSA, 1 draw": ({"score": "gates", "estimator": "spsa", "draws": 1, "step": 0.01}, "gates 1"),
    "FMS, SPSA, 1 draw": ({"score": "fms", "draws": 1}, "2 + 1"),
    "FMS, SPSA, 10 draws": ({"score": "fms", "draws": 10}, "20 + 1"),
    "|W| |X|, no gradient": ({"score": "no_gradient"}, "1"),
    "|W| |X| |noise|": ({"score": "noise"}, "1"),
    "magnitude (L2)": ({"score": "magnitude"}, "0"),
    "random": ({"score": "random"}, "0"),
    "FMS, true gradient": ({"score": "fms", "estimator": "backprop"}, "backward"),
    "Taylor, backprop": ({"score": "taylor"}, "backward"),
    "gates, backprop (Fisher)": ({"score": "gates", "estimator": "backprop"}, "backward"),
    "gates, SPSA, 10 draws": ({"score": "gates", "estimator": "spsa", "draws": 10, "step": 0.01}, "gates 10"),
    "FMS, SPSA, 100 draws": ({"score": "fms", "draws": 100}, "200 + 1"),
}
"""Label -> settings of ``mini_llm``, forward passes."""
REFERENCES = ("Taylor, backprop", "gates, backprop (Fisher)")


class Bench:
    """A model in memory that is pruned again and again.

    Args:
        given: the command line's.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.source = open_source(given.model)
        self.device = pick_device("cpu")
        self.context = make_context(self.source, self.device, 0)
        calibration = Calibration(**experiments.calibration_of(given))
        self.samples = draw_samples(calibration, self.source.tokenizer, self.context.context_length).tokens
        length = context_length(StreamedModel(self.source.state, torch.device("meta")).model)
        protocol = experiments.protocol_of(given, length)
        documents, _ = documents_of(given.text, protocol)
        self.text = windows(documents, self.source.tokenizer, protocol)
        self.blocks = int(self.context.config.num_hidden_layers)

    def walk(self, findings: Mapping[str, Tensor], visit: Callable[[Block], None]) -> nn.Module:
        """Show every block in order, on the outputs of those before as they were left; returns the model."""
        streamed = StreamedModel(self.source.state, self.device)
        model = streamed.whole()
        with torch.no_grad():
            captured = [streamed.capture(tokens) for tokens in self.samples]
        hidden = [first for first, _ in captured]
        for index, module in enumerate(streamed.blocks):
            runs = [_call(streamed, h, calls[index]) for h, (_, calls) in zip(hidden, captured, strict=True)]
            name = block_prefix(self.context.structure, index)
            shape = config_shape(self.context.config)
            block = Block(index, name, module, linears_of(module, name), samples=runs, findings=findings, shape=shape)
            with torch.no_grad():
                visit(block)
                hidden = [run(module) for run in runs]
        return model

    def findings(self, config: MiniLlmConfig) -> dict[str, Tensor]:
        """What the whole model tells of all groups; nothing for scores of single blocks."""
        if config.score not in WHOLE_MODEL:
            return {}
        model = StreamedModel(self.source.state, self.device).whole()
        parts = Removals(config.sizes, self.context).parts
        return whole_model_scores(config.gradients, model, self.samples, self.context, parts, [], lambda *_: None)

    def channel_scores(self, config: MiniLlmConfig, findings: Mapping[str, Tensor]) -> list[Tensor]:
        """Scores of every MLP's channels on the dense model."""
        found: list[Tensor] = []

        def visit(block: Block) -> None:
            part = Removals(config.sizes, self.context).parts[block.index]["mlp"]
            scores = BlockScores(config.scores, block, self.context)
            if config.score != "output":
                found.append(scores.scores(part))
                return
            weight, moments = last_linear(block, part).weight, scores.moments(part)
            order, _ = removal_order(weight, moments, part.columns, part.classes, part.count - 1)
            rank = torch.full((part.count,), float(part.count))
            rank[order] = torch.arange(len(order), dtype=torch.float32)
            found.append(rank)

        self.walk(findings, visit)
        return found

    def perplexity(self, settings: Mapping[str, Any], findings: Mapping[str, Tensor]) -> float:
        """After pruning."""
        step = MiniLlm(MiniLlmConfig.model_validate(settings))

        def visit(block: Block) -> None:
            step.run_block(block, self.context)

        model: Any = self.walk(findings, visit)
        return score(model, self.text).perplexity


def _call(streamed: StreamedModel, hidden: Tensor, call: Call) -> Callable[[nn.Module], Tensor]:
    return lambda module: streamed.run(module, hidden, call)


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's, of two lists of scores without ties."""
    ranks = torch.stack([scores.argsort().argsort().double() for scores in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


def forwards(text: str, blocks: int) -> str:
    """The number of forward passes an estimator takes."""
    if text.startswith("gates "):
        return str(2 * PARTS * blocks * int(text.removeprefix("gates ")))
    return text if text == "backward" else str(sum(map(int, text.split(" + "))))


def main() -> None:
    """Fill the table and print it."""
    parser = experiments.arguments_of("estimators", __doc__, 64, 128)
    parser.add_argument("--ratio", type=float, default=0.2)
    given = parser.parse_args()
    bench, rows = Bench(given), experiments.rows_of(given)
    references: dict[str, list[Tensor]] = {}
    for label in REFERENCES:
        config = MiniLlmConfig.model_validate({"kind": "mini_llm", **ESTIMATORS[label][0]})
        references[label] = bench.channel_scores(config, bench.findings(config))

    def row(settings: Mapping[str, Any], passes: str) -> dict[str, Any]:
        config = MiniLlmConfig.model_validate(settings)
        findings = bench.findings(config)
        scores = bench.channel_scores(config, findings)
        found: dict[str, Any] = {"forwards": forwards(passes, bench.blocks)}
        for reference, exact in references.items():
            each = [rank_correlation(a, b) for a, b in zip(scores, exact, strict=True)]
            found[reference] = sum(each) / len(each)
        for name, compensate in (("cut", False), ("refitted", True)):
            found[name] = bench.perplexity({**settings, "compensate": compensate}, findings)
        return found

    for label, (settings, passes) in ESTIMATORS.items():
        full = {"kind": "mini_llm", "ratio": given.ratio, **settings}
        rows.get({"label": label, "ratio": given.ratio}, lambda full=full, passes=passes: row(full, passes))  # type: ignore[misc]
    table = markdown(rows.rows)
    (given.out / "table.md").write_text(table)
    print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Scores down."""
    heads = ["score", "forward passes", "Spearman, Taylor", "Spearman, gate Fisher", "cut", "refitted"]
    columns = (*REFERENCES, "cut", "refitted")
    found = [[row["label"], row["forwards"], *(f"{row[key]:.2f}" for key in columns)] for row in rows]
    return tables.markdown(tables.Table(heads, found)) + "\n"


if __name__ == "__main__":
    experiments.run(main)
