"""Commands that measure."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape

from compress.cli.common import (
    AdapterFlag,
    BitsOption,
    DeviceOption,
    JsonOption,
    PromptFlag,
    PromptFrom,
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
from compress.cli.options import TASKS, IncludeOption, ResultsOption, TasksOption, TextOptions, panel, with_text_options
from compress.errors import CompressError

_MORE = "Beyond accuracy"
_AGREEMENT = "Compare with the dense model on --text: KL, top-1 agreement, flips, calibration."
_EXACT = "Exact float32 sums, or tables and activations in 8 bits (GPU: tables, at 4 bits)."
_Threads = Annotated[Optional[int], typer.Option(help="CPU threads; on one, processor time is counted.", min=1)]
_FIGURES = ("loss", 5), ("perplexity", 4), ("bits_per_byte", 4)


@app.command(name="eval")
@with_text_options
def evaluate(
    folder: Annotated[str, typer.Argument(help="Checkpoint, or a dense model.", metavar="DIR")],
    text: TextOptions,
    tasks: TasksOption = None,
    bits: BitsOption = None,
    include: IncludeOption = None,
    fewshot: Annotated[Optional[int], panel(TASKS, "Examples in front; as the task says if absent.")] = None,
    batch: Annotated[Optional[int], panel(TASKS, "Rows in a batch; by the memory there is if absent.", min=1)] = None,
    output: Annotated[Optional[Path], panel(TASKS, "Write results_<width>.json in lm-eval's own schema here.")] = None,
    table: Annotated[Optional[Path], panel(TASKS, "Write one tidy table: .csv, or JSON lines.")] = None,
    agreement: Annotated[bool, panel(_MORE, _AGREEMENT)] = False,
    robustness: Annotated[bool, panel(_MORE, "What typing errors in --text cost.")] = False,
    reference: Annotated[Optional[str], panel(_MORE, "Dense model; the recipe's if absent.")] = None,
    dense: Annotated[bool, panel(_MORE, "Measure the dense model it was made from too.")] = False,
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

    if text.text is None and tasks is None:
        raise CompressError("nothing to measure: give --text FILE, --tasks NAMES, or both.")
    if text.text is None and (agreement or robustness):
        raise CompressError("--agreement and --robustness look at text: give --text FILE too.")
    refuse_unwritable(target, table)
    quiet_transformers()
    chosen, front = Tasks(parse_names(tasks), include, text.limit, fewshot), prompt_from or prompt
    suite = Suite(text.text, text.protocol(), chosen, front, agreement, robustness, dense, reference, batch, adapter)
    with progress_bar() as progress:
        result, rows = evaluate_all(folder, suite, parse_widths(bits), kept, device, progress)
    if table is not None:
        write_table(tidy(rows), table)
    if output is not None:
        write_lm_eval(rows, output)
    if write_json(result, target) and target == "-":
        return
    _print_evaluation(result, rows)


def _print_evaluation(result: dict[str, Any], rows: dict[str, Any]) -> None:
    """Print a table for each thing that was measured."""
    from compress.evals import tables

    if "bits" in result:
        table = tables.Table(["bits", "loss (nats/token)", "perplexity", "bits per byte", "tokens"])
        for width, score in result["bits"].items():
            figures = [tables.number(score[key], digits) for key, digits in _FIGURES]
            table.add("width", width, *figures, str(score["tokens"]))
        print_table(table)
    if rows:
        print_table(tables.task_table({(width, None): found for width, found in rows.items()}))
        if cut := sum(row["truncated"] for found in rows.values() for row in found.values()):
            err.print(f"{cut} requests were longer than the context and were cut on the left.")
    if "agreement" in result or "robustness" in result:
        print_table(tables.agreement(result.get("agreement", {}), result.get("robustness", {})))


@app.command()
def bench(
    folder: Annotated[
        Optional[str], typer.Argument(help="Checkpoint, or a dense model; or give --random.", metavar="DIR")
    ] = None,
    random: Annotated[
        Optional[str],
        typer.Option(
            help="Make a model of random weights and quantise it to 2 to 8 bits: llama-tiny, llama-1b or llama-8b."
        ),
    ] = None,
    bits: BitsOption = None,
    reference: Annotated[Optional[str], typer.Option(help="Dense model; the recipe's if absent.")] = None,
    prompt: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens decoded after it.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Turns of every candidate.", min=1)] = 7,
    loads: Annotated[int, typer.Option(help="Fresh processes per candidate.", min=1)] = 3,
    threads: _Threads = None,
    exact: Annotated[bool, typer.Option(help=_EXACT)] = True,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of activations and dense weights.")] = "float32",
    device: DeviceOption = "cpu",
    adapter: AdapterFlag = None,
    kept: ResultsOption = None,
    target: JsonOption = None,
) -> None:
    """Measure decoding, prefill, time to first token, switching, loading, memory and size, per width and dense, in turn."""
    import torch

    from compress.evals import tables
    from compress.evals.random_llama import write_packed_llama
    from compress.evals.speed import Load
    from compress.evals.speed import bench as measure
    from compress.evals.store import results_of

    refuse_unwritable(target)
    quiet_transformers()
    if (folder is None) == (random is None):
        raise CompressError("bench: give a model's folder or --random NAME, one of the two.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CompressError(f"--dtype {dtype}: give float32, bfloat16 or float16.")
    if threads is not None:
        torch.set_num_threads(threads)
    load, kind = Load(prompt, tokens, rounds, loads), getattr(torch, dtype)
    with progress_bar() as progress, TemporaryDirectory() as scratch:
        place = folder or str(write_packed_llama(Path(scratch), str(random), progress))
        store, widths = results_of(place, kept), parse_widths(bits)
        found = measure(place, widths, reference, load, kind, device, exact, store, progress, adapter)
    if write_json(found, target) and target == "-":
        return
    out.print(f"{escape(found['device'])}, {found['threads']} thread(s), {found['dtype']}; {escape(found['backend'])}")
    if found["dense"].startswith("not measured"):
        out.print(f"dense {escape(found['dense'])}")
    print_table(tables.speed(found))
