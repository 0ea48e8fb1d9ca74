"""Add the commands that measure, and those that bring measurements together."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape

from compress.cli.common import (
    TASKS,
    AdapterFlag,
    BitsOption,
    DeviceOption,
    Folder,
    IncludeOption,
    JsonOption,
    KVBitsList,
    KVGroupOption,
    KVResidualOption,
    PromptFlag,
    PromptFrom,
    ResultsOption,
    TasksOption,
    TextOptions,
    app,
    err,
    known,
    out,
    panel,
    parse_bits,
    parse_names,
    print_table,
    progress_bar,
    quiet_transformers,
    refuse_unwritable,
    with_text_options,
    write_json,
)
from compress.errors import CompressError

_MORE = "Beyond accuracy"
_AGREEMENT = "Compare with the dense model on --text: KL, top-1 agreement, flips, calibration."
_EXACT = "Exact float32 sums, or tables and activations in 8 bits (GPU: tables, at 4 bits)."
_Threads = Annotated[Optional[int], typer.Option(help="CPU threads; on one, processor time is counted.", min=1)]
_FIGURES = ("loss", 5), ("perplexity", 4), ("bits_per_byte", 4)


@app.command(name="eval")
@with_text_options
def evaluate(
    folder: Annotated[str, typer.Argument(help="Checkpoint, or a dense model.", metavar="DIR", callback=known)],
    text: TextOptions,
    tasks: TasksOption = None,
    bits: BitsOption = None,
    include: IncludeOption = None,
    fewshot: Annotated[Optional[int], panel(TASKS, "Examples in front; as the task says if absent.")] = None,
    batch: Annotated[Optional[int], panel(TASKS, "Rows in a batch; by the memory there is if absent.", min=1)] = None,
    output: Annotated[Optional[Path], panel(TASKS, "Write results_<bits>.json in lm-eval's own schema here.")] = None,
    table: Annotated[Optional[Path], panel(TASKS, "Write one tidy table: .csv, or JSON lines.")] = None,
    agreement: Annotated[bool, panel(_MORE, _AGREEMENT)] = False,
    robustness: Annotated[bool, panel(_MORE, "What typing errors in --text cost.")] = False,
    reference: Annotated[Optional[str], panel(_MORE, "Dense model; the recipe's if absent.")] = None,
    dense: Annotated[bool, panel(_MORE, "Measure the dense model it was made from too.")] = False,
    device: DeviceOption = "cpu",
    prompt: PromptFlag = False,
    prompt_from: PromptFrom = None,
    adapter: AdapterFlag = None,
    kv_bits: KVBitsList = None,
    kv_group: KVGroupOption = None,
    kv_residual: KVResidualOption = None,
    kept: ResultsOption = None,
    target: JsonOption = None,
) -> None:
    """Measure text, lm-eval tasks and more at one or several numbers of bits, in one load.

    What is measured is kept and not measured again: an interrupted evaluation continues.
    """
    if text.text is None and tasks is None:  # before torch is imported, which takes seconds
        raise CompressError("nothing to measure: give --text FILE, --tasks NAMES, or both.")
    if text.text is None and (agreement or robustness):
        raise CompressError("--agreement and --robustness look at text: give --text FILE too.")
    if text.text is None and kv_bits is not None:
        raise CompressError("--kv-bits is measured on text: give --text FILE too.")
    refuse_unwritable(target, table)
    from compress.evals.kv import kv_wanted
    from compress.evals.suite import Suite, evaluate_all
    from compress.evals.tasks import Tasks, tidy, write_lm_eval, write_table

    quiet_transformers()
    chosen, front = Tasks(parse_names(tasks), include, text.limit, fewshot), prompt_from or prompt
    kv = kv_wanted(kv_bits, kv_group, kv_residual)
    suite = Suite(
        text.text, text.protocol(), chosen, front, agreement, robustness, dense, reference, batch, adapter, kv
    )
    with progress_bar() as progress:
        result, rows = evaluate_all(folder, suite, parse_bits(bits), kept, device, progress)
    if table is not None:
        write_table(tidy(rows), table)
    if output is not None:
        write_lm_eval(rows, output)
    if write_json(result, target):
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
    if "kv" in result:
        print_table(tables.cached(result["kv"], result["bits"]))
    if rows:
        print_table(tables.task_table({(width, None): found for width, found in rows.items()}))
        if cut := sum(row["truncated"] for found in rows.values() for row in found.values()):
            err.print(f"{cut} requests were longer than the context and were cut on the left.")
    if "agreement" in result or "robustness" in result:
        print_table(tables.agreement(result.get("agreement", {}), result.get("robustness", {})))


_DRAFTS = "Drafts by the first planes"


@app.command()
def bench(
    folder: Annotated[
        Optional[str],
        typer.Argument(help="Checkpoint, or a dense model; or give --random.", metavar="DIR", callback=known),
    ] = None,
    random: Annotated[
        Optional[str],
        typer.Option(help="Quantise a model of random weights to 2 to 8 bits: llama-tiny, llama-1b or llama-8b."),
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
    gguf: Annotated[
        Optional[list[Path]],
        typer.Option(help="File of the same model to time in turn by llama.cpp's llama-bench; repeatable."),
    ] = None,
    kv_bits: KVBitsList = None,
    kv_group: KVGroupOption = None,
    kv_residual: KVResidualOption = None,
    kv_context: Annotated[int, panel("Cache of keys and values", "Tokens in the caches that are timed.", min=1)] = 4096,
    draft_bits: Annotated[Optional[str], panel(_DRAFTS, "Bits of drafts of the model's own, such as 3,4.")] = None,
    draft_text: Annotated[str, panel(_DRAFTS, "Text whose beginnings they continue, or 'builtin'.")] = "builtin",
    kept: ResultsOption = None,
    target: JsonOption = None,
) -> None:
    """Measure decoding, prefill, time to first token, switching, loading, memory and size, at all bits and dense, in turn."""
    _check_bench(folder, random, dtype, target)
    import torch

    from compress.evals import speed
    from compress.evals.drafts import beginnings
    from compress.evals.kv import kv_wanted, refuse_misfits
    from compress.evals.random_llama import write_packed_llama
    from compress.evals.store import results_of

    quiet_transformers()
    torch.set_num_threads(threads or torch.get_num_threads())
    load, kind = speed.Load(prompt, tokens, rounds, loads), getattr(torch, dtype)
    chosen, drafts, caches = parse_bits(bits), parse_bits(draft_bits), kv_wanted(kv_bits, kv_group, kv_residual)
    with progress_bar() as progress, TemporaryDirectory() as scratch:
        place = folder or str(write_packed_llama(Path(scratch), str(random), progress))
        refuse_misfits(place, caches)
        starts = beginnings(place, draft_text, rounds) if drafts else []
        store = results_of(place, kept)
        found = speed.bench(place, chosen, reference, load, kind, device, exact, store, progress, adapter, gguf or ())
        given: dict[str, Any] = {"dtype": kind, "exact": exact, "adapter": adapter}
        if caches.bits:
            found["kv"] = _bench_caches(place, caches, kv_context, {**given, "device_map": device}, progress)
        if drafts:
            found["drafts"] = _bench_drafts(place, chosen, drafts, starts, tokens, given, progress)
    if not write_json(found, target):
        _print_speed(found)


def _bench_caches(place: str, caches: Any, context: int, given: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Time decoding behind packed caches of keys and values."""
    from compress.evals.kv import decode_speed
    from compress.loading import load

    return {"context": context, "caches": decode_speed(load(place, **given), caches, context, progress=progress)}


def _bench_drafts(
    place: str, bits: Any, drafts: Any, starts: Any, tokens: int, given: dict[str, Any], progress: Any
) -> Any:
    """Time decoding at the most of some bits, all if None, with drafts by the model's own first planes."""
    from compress.evals.drafts import draft_speed
    from compress.loading import load

    model = load(place, **given, bits=max(bits) if bits else None)
    return draft_speed(model, starts, [*map(int, drafts)], tokens, progress)


def _check_bench(folder: Optional[str], random: Optional[str], dtype: str, target: Optional[str]) -> None:
    """Refuse what cannot be measured, before anything is read."""
    if (folder is None) == (random is None):
        raise CompressError("bench: give a model's folder or --random NAME, one of the two.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CompressError(f"--dtype {dtype}: give float32, bfloat16 or float16.")
    refuse_unwritable(target)


def _print_speed(found: dict[str, Any]) -> None:
    """Print what was timed, and on what."""
    from compress.evals import tables

    out.print(f"{escape(found['device'])}, {found['threads']} thread(s), {found['dtype']}; {escape(found['backend'])}")
    if found["dense"].startswith("not measured"):
        out.print(f"dense {escape(found['dense'])}")
    print_table(tables.speed(found))
    if "kv" in found:
        print_table(tables.cache_speed(found["kv"]))
    if "drafts" in found:
        print_table(tables.draft_speed(found["drafts"]))


_CONTROLS = "Make and measure stages and controls too: runs of their own."
_Samples = Annotated[Optional[list[str]], typer.Option("--sample", help="Text to continue at all bits; repeatable.")]


@app.command()
@with_text_options
def report(
    folder: Folder,
    text: TextOptions,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder; DIR/report if absent.")] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Measure what is missing, or only lay out.")] = True,
    tasks: TasksOption = None,
    include: IncludeOption = None,
    bits: BitsOption = None,
    controls: Annotated[bool, typer.Option("--controls", help=_CONTROLS)] = False,
    benchmark: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure speed and memory.")] = True,
    samples: _Samples = None,
    device: DeviceOption = "cpu",
    adapter: AdapterFlag = None,
    kv_bits: KVBitsList = None,
    kept: ResultsOption = None,
) -> None:
    """Write one page (HTML, Markdown, PNG): what was done, size, speed and quality at all bits, controls, errors, samples.

    Measures what is missing and keeps it in DIR/report/results.jsonl; stopped, the same command continues.
    """
    from compress.evals.gather import Wanted
    from compress.evals.kv import kv_wanted
    from compress.evals.report import report as write
    from compress.evals.speed import Load
    from compress.evals.tasks import Tasks

    quiet_transformers()
    chosen = Tasks(parse_names(tasks), include, text.limit) if tasks else None
    load = Load(rounds=5, loads=3) if benchmark else None
    prompts = tuple(samples or ())
    kv = kv_wanted(kv_bits, None, None)
    wanted = Wanted(text.text, text.protocol(), chosen, parse_bits(bits), controls, load, prompts, device, adapter, kv)
    with progress_bar() as progress:
        written, notes = write(folder, wanted if run else None, output, kept, progress)
    for path in written:
        out.print(escape(str(path)), soft_wrap=True)
    for note in notes:
        err.print(f"note: {escape(note)}", soft_wrap=True)


@app.command()
@with_text_options
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Checkpoints.", metavar="DIR...")],
    text: TextOptions,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="File: .html, .png, .svg or .pdf.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Put several checkpoints, at all their bits, into one table and one Pareto plot."""
    if len(folders) < 2:
        raise CompressError("compare: give two checkpoints or more.")
    if output is not None and output.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise CompressError(f"-o {output}: give a name that ends in .html, .png, .svg or .pdf.")
    refuse_unwritable(output)
    from compress.evals import compare as comparing
    from compress.evals import plots
    from compress.evals.page import html
    from compress.workspace import write_atomic

    quiet_transformers()
    with progress_bar() as progress:
        found = comparing.compare(folders, text.text, text.protocol(), device, progress)
    if output is not None:
        try:
            if output.suffix == ".html":
                write_atomic(output, html(found.page()))
            else:
                plots.save(found.figure(), output)
        except OSError as error:
            raise CompressError(f"-o {output}: {error.strerror}.") from error
    print_table(found.table())
