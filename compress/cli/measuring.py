"""Commands that measure."""

from __future__ import annotations

from typing import Annotated, Optional

import typer
from rich.table import Table

from compress.cli.common import (
    BitsOption,
    JsonOption,
    PromptFlag,
    PromptFrom,
    app,
    out,
    parse_widths,
    progress_bar,
    quiet_transformers,
    write_json,
)


@app.command(name="eval")
def evaluate(
    folder: Annotated[str, typer.Argument(help="Checkpoint, or a dense model.", metavar="DIR")],
    text: Annotated[str, typer.Option(help="Text file, or 'builtin' for held-out standard-library modules.")],
    bits: BitsOption = None,
    separator: Annotated[
        Optional[str],
        typer.Option(help="Divides the text into documents, each scored alone with BOS in front."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Score the first so many documents.", min=1)] = None,
    min_characters: Annotated[int, typer.Option(help="Pass over documents of this length or less.", min=0)] = 0,
    length: Annotated[
        Optional[int], typer.Option(help="Tokens in a window; the context, at most 2048, if absent.")
    ] = None,
    stride: Annotated[
        Optional[int], typer.Option(help="Tokens a window advances by; half its length if absent.")
    ] = None,
    truncate: Annotated[bool, typer.Option(help="Score only the first window of each document.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    prompt: PromptFlag = False,
    prompt_from: PromptFrom = None,
    target: JsonOption = None,
) -> None:
    """Measure perplexity and bits per byte of a text at one or several widths, in one load."""
    from compress.evals.text import Protocol, evaluate_text

    quiet_transformers()
    protocol = Protocol(separator, limit, min_characters, length, stride, truncate)
    with progress_bar() as report:
        result = evaluate_text(
            folder, text, parse_widths(bits), protocol, device=device, report=report, prompt=prompt_from or prompt
        )
    if write_json(result, target) and target == "-":
        return
    table = Table("bits", "loss (nats/token)", "perplexity", "bits per byte", "tokens")
    for width, score in result["bits"].items():
        figures = (f"{score['loss']:.5f}", f"{score['perplexity']:.4f}", f"{score['bits_per_byte']:.4f}")
        table.add_row(width, *figures, str(score["tokens"]))
    out.print(table)
