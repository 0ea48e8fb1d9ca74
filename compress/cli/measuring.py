"""Commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape
from rich.table import Table

from compress.cli.common import (
    AdapterFlag,
    BitsOption,
    DeviceOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    LimitOption,
    MinimumOption,
    PromptFlag,
    PromptFrom,
    ProtocolOption,
    ResultsOption,
    SeparatorOption,
    TasksOption,
    TextOption,
    TruncateOption,
    app,
    err,
    out,
    parse_names,
    parse_widths,
    print_table,
    progress_bar,
    quiet_transformers,
    refuse_unwritable,
    write_json,
)
from compress.errors import CompressError

_TASKS, _MORE = "Tasks (lm-eval)", "Beyond accuracy"


@app.command(name="eval")
def evaluate(
    folder: Annotated[str, typer.Argument(help="Checkpoint, or a dense model.", metavar="DIR")],
    text: TextOption = None,
    tasks: TasksOption = None,
    bits: BitsOption = None,
    protocol: ProtocolOption = None,
    separator: SeparatorOption = None,
    limit: LimitOption = None,
    min_characters: MinimumOption = 0,
    length: LengthOption = None,
    stride: Annotated[
        Optional[int],
        typer.Option(help="Tokens a window advances by; half its length if absent.", min=1, rich_help_panel="Text"),
    ] = None,
    truncate: TruncateOption = False,
    include: IncludeOption = None,
    fewshot: Annotated[
        Optional[int], typer.Option(help="Examples in front; as the task says if absent.", rich_help_panel=_TASKS)
    ] = None,
    batch: Annotated[
        Optional[int],
        typer.Option(help="Rows in a batch; by the memory there is if absent.", min=1, rich_help_panel=_TASKS),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(help="Write results_<width>.json in lm-eval's own schema here.", rich_help_panel=_TASKS),
    ] = None,
    table: Annotated[
        Optional[Path],
        typer.Option(help="Write one tidy table: .csv, or JSON lines.", rich_help_panel=_TASKS),
    ] = None,
    agreement: Annotated[
        bool,
        typer.Option(
            help="Compare with the dense model on --text: KL, top-1 agreement, flips, calibration.",
            rich_help_panel=_MORE,
        ),
    ] = False,
    robustness: Annotated[bool, typer.Option(help="What typing errors in --text cost.", rich_help_panel=_MORE)] = False,
    reference: Annotated[
        Optional[str], typer.Option(help="Dense model; the recipe's if absent.", rich_help_panel=_MORE)
    ] = None,
    dense: Annotated[
        bool, typer.Option(help="Measure the dense model it was made from too.", rich_help_panel=_MORE)
    ] = False,
    device: DeviceOption = "cpu",
    prompt: PromptFlag = False,
    prompt_from: PromptFrom = None,
    adapter: AdapterFlag = None,
    kept: ResultsOption = None,
    target: JsonOption = None,
) -> None:
    """Measure text, lm-eval tasks and more at one or several widths, in one load.

    What is measured is kept and not measured again: an interrupted evaluation continues.
    """
    from compress.evals.suite import Suite, evaluate_all
    from compress.evals.tasks import Tasks, tidy, write_lm_eval, write_table
    from compress.evals.text import protocol_of

    if text is None and tasks is None:
        raise CompressError("nothing to measure: give --text FILE, --tasks NAMES, or both.")
    if text is None and (agreement or robustness):
        raise CompressError("--agreement and --robustness look at text: give --text FILE too.")
    refuse_unwritable(target, table)
    quiet_transformers()
    cut = protocol_of(
        protocol, separator=separator, limit=limit, min_characters=min_characters, length=length, stride=stride,
        truncate=truncate,
    )  # fmt: skip
    chosen = Tasks(parse_names(tasks), include, limit, fewshot)
    suite = Suite(text, cut, chosen, prompt_from or prompt, agreement, robustness, dense, reference, batch, adapter)
    with progress_bar() as report:
        result, rows = evaluate_all(folder, suite, parse_widths(bits), kept, device, report)
    if table is not None:
        write_table(tidy(rows), table)
    if output is not None:
        write_lm_eval(rows, output)
    if write_json(result, target) and target == "-":
        return
    _print_evaluation(result, rows)


def _print_evaluation(result: dict[str, Any], rows: dict[str, Any]) -> None:
    """One table per thing that was measured."""
    from compress.evals import tables

    if "bits" in result:
        table = Table("bits", "loss (nats/token)", "perplexity", "bits per byte", "tokens")
        for width, score in result["bits"].items():
            figures = (f"{score['loss']:.5f}", f"{score['perplexity']:.4f}", f"{score['bits_per_byte']:.4f}")
            table.add_row(width, *figures, str(score["tokens"]))
        out.print(table)
    if rows:
        print_table(tables.task_table({(width, None): found for width, found in rows.items()}))
        if cut := sum(row["truncated"] for found in rows.values() for row in found.values()):
            err.print(f"{cut} requests were longer than the context and were cut on the left.")
    if "agreement" in result or "robustness" in result:
        print_table(tables.agreement(result.get("agreement", {}), result.get("robustness", {})))


@app.command()
def bench(
    folder: Annotated[str, typer.Argument(help="Checkpoint, or a dense model.", metavar="DIR")],
    bits: BitsOption = None,
    reference: Annotated[Optional[str], typer.Option(help="Dense model; the recipe's if absent.")] = None,
    prompt: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens decoded after it.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Turns of every candidate.", min=1)] = 7,
    loads: Annotated[int, typer.Option(help="Fresh processes per candidate.", min=1)] = 3,
    threads: Annotated[
        Optional[int], typer.Option(help="CPU threads; on one, processor time is counted.", min=1)
    ] = None,
    exact: Annotated[
        bool, typer.Option(help="Exact float32 sums, or tables and activations in 8 bits (GPU: tables, at 4 bits).")
    ] = True,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of activations and dense weights.")] = "float32",
    device: DeviceOption = "cpu",
    adapter: AdapterFlag = None,
    kept: ResultsOption = None,
    target: JsonOption = None,
) -> None:
    """Measure decoding, prefill, time to first token, loading, memory and size, per width and dense, in turn."""
    import torch

    from compress.evals import tables
    from compress.evals.bench import Load
    from compress.evals.bench import bench as measure
    from compress.evals.store import results_of

    refuse_unwritable(target)
    quiet_transformers()
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CompressError(f"--dtype {dtype}: give float32, bfloat16 or float16.")
    if threads is not None:
        torch.set_num_threads(threads)
    store = results_of(folder, kept)
    with progress_bar() as report:
        found = measure(
            folder, parse_widths(bits), reference, Load(prompt, tokens, rounds, loads), getattr(torch, dtype), device,
            exact, store, report, adapter,
        )  # fmt: skip
    if write_json(found, target) and target == "-":
        return
    out.print(f"{escape(found['device'])}, {found['threads']} thread(s), {found['dtype']}; {escape(found['backend'])}")
    if found["dense"].startswith("not measured"):
        out.print(f"dense {escape(found['dense'])}")
    print_table(tables.speed(found))
