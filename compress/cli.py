"""The ``compress`` command. Every error a user can put right is one line; tracebacks are for ``--traceback``."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compress.errors import CompressError

app = typer.Typer(
    help="Compress Hugging Face causal LMs after training: one checkpoint, every bit-width, measured cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Folder = Annotated[Path, typer.Argument(help="Checkpoint folder; a dense model works too.", metavar="DIR")]
BitsOption = Annotated[
    Optional[str], typer.Option(help="Widths, comma-separated: 3,4,8; 3.5 is a mean width. All there are if absent.")
]
JsonOption = Annotated[Optional[str], typer.Option("--json", help="Write one JSON object to this file, or '-'.")]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """Entry point: run the command, turn errors into one line and an exit code."""
    show = "--traceback" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    try:
        app(arguments)
    except KeyboardInterrupt:
        err.print("interrupted; run the same command again to continue.")
        sys.exit(130)
    except Exception as error:
        if show:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, CompressError)
        note = "" if known else f"unexpected {type(error).__name__} (add --traceback to see where): "
        err.print(f"[bold red]error:[/] {escape(note + text)}", soft_wrap=True)
        sys.exit(1)


def parse_widths(text: str | None) -> list[int | float] | None:
    """``3,4,8`` to numbers; one with a point is a mean width.

    Raises:
        CompressError: something else.
    """
    if text is None or text == "all":
        return None
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise CompressError(
            f"--bits {text!r}: give one width or several, comma-separated, for example 3,3.5,8."
        ) from None


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A report function for (what, done, total), drawn on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=escape(what), completed=done, total=total)

        yield report


def quiet_transformers() -> None:
    """Its own progress bars and advice would drown ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def write_json(result: Any, target: str | None) -> bool:
    """Write an object where ``--json`` says; False if it says nothing."""
    if target is None:
        return False
    text = json.dumps(result, indent=1)
    if target == "-":
        print(text)
    else:
        try:
            Path(target).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise CompressError(f"--json {target}: {error.strerror}.") from error
    return True


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see `compress schema` and `compress passes`.")],
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder to create.")] = None,
    assignments: Annotated[Optional[list[str]], typer.Option("--set", help="Override: passes.0.seed_bits=2")] = None,
    workspace: Annotated[
        Optional[Path],
        typer.Option(
            help="Keep finished units here, to share between recipes; OUTPUT.work, deleted at the end, if absent."
        ),
    ] = None,
) -> None:
    """Compress a model. Interrupted, the same command continues where it was."""
    from compress import pipeline

    quiet_transformers()
    with progress_bar() as report:
        target = pipeline.run(recipe, output, assignments or (), workspace, report)
    from compress.inspect import inspect as look

    found = look(target)
    out.print(f"{escape(str(target))}: {found['bytes'] / 1e6:.2f} MB of tensors" + _at_widths(found["bytes_at_bits"]))


def _at_widths(at: dict[str, int]) -> str:
    return "; read at " + ", ".join(f"{bits} bits: {size / 1e6:.2f} MB" for bits, size in at.items()) if at else ""


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    assignments: Annotated[Optional[list[str]], typer.Option("--set", help="Override: passes.0.seed_bits=2")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Tell, without reading a weight, what a run will need and how large the result will be."""
    from compress.plan import plan as foresee

    quiet_transformers()
    found = foresee(recipe, assignments or ())
    if as_json:
        print(json.dumps(found, indent=1))
        return
    out.print(f"{escape(found['model'])}: {found['blocks']} blocks, {found['dense_bytes'] / 1e6:.2f} MB of tensors")
    out.print(f"checkpoint: {found['checkpoint_bytes'] / 1e6:.2f} MB" + _at_widths(found["bytes_at_bits"]))
    for step in found["passes"]:
        memory, room = step["memory_bytes"] / 1e6, step["workspace_bytes"] / 1e6
        out.print(f"{step['kind']}: about {memory:.0f} MB of memory above the imports, {room:.0f} MB of workspace")


@app.command()
def inspect(
    folder: Folder,
    as_json: JsonFlag = False,
    modules: Annotated[bool, typer.Option(help="List every packed module.")] = True,
    sparsity: Annotated[
        Optional[bool],
        typer.Option(help="Count zeros per block and linear, which reads all weights; if absent, of pruned models."),
    ] = None,
    plot: Annotated[
        Optional[Path], typer.Option(help="Draw the sparsity of blocks and linears here (.svg, .png).")
    ] = None,
) -> None:
    """Show what is in a checkpoint: modules, bytes by width, errors, sparsity, where it came from."""
    from compress.inspect import inspect as look
    from compress.sparsity import draw
    from compress.sparsity import sparsity as count

    found = look(folder)
    if plot is not None or (found["pruned"] if sparsity is None else sparsity):
        quiet_transformers()
        found["sparsity"] = count(folder)
        if plot is not None:
            draw(found["sparsity"], plot)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    origin = found["manifest"]
    if origin:
        recipe = origin["recipe"]
        kinds = " → ".join(step["kind"] for step in recipe["passes"])
        out.print(f"{escape(recipe['model'])} → {kinds}, seed {recipe['seed']}, compress {origin['compress_version']}")
    out.print(
        f"{found['bytes'] / 1e6:.3f} MB of tensors in {len(found['files'])} files{_at_widths(found['bytes_at_bits'])}"
    )
    if modules and found["modules"]:
        out.print(_module_table(found))
    for line in _pruned_lines(found["modules"]):
        out.print(line)
    if modules and "sparsity" in found:
        out.print(_sparsity_table(found["sparsity"]))
    dense = sum(found["dense"].values())
    out.print(f"dense tensors: {len(found['dense'])}, {dense / 1e6:.3f} MB")
    for name, reason in found["not_quantised"].items():
        out.print(f"  {escape(name)}: {escape(reason)}")


def _pruned_lines(modules: dict[str, Any]) -> Iterator[str]:
    """How matrices with pruned weights are stored; nothing if the manifest knows of none."""
    pruned = {name: module["storage"] for name, module in modules.items() if "zeros" in module["storage"]}
    sparse = [storage["bytes"] for storage in pruned.values() if storage["form"] == "sparse"]
    if sparse:
        stored, instead = (sum(sizes[form] for sizes in sparse) / 1e6 for form in ("sparse", "dense"))
        yield f"stored sparse: {len(sparse)} matrices, {stored:.3f} MB instead of {instead:.3f} MB"
    for name, storage in pruned.items():
        if storage["form"] == "dense":
            share = storage["zeros"] / math.prod(modules[name]["shape"])
            sizes = f"{storage['bytes']['dense']} bytes, sparse {storage['bytes']['sparse']}"
            yield f"stored dense, as that is smaller: {escape(name)}, {share:.1%} zeros, {sizes}"


def _module_table(found: dict[str, Any]) -> Table:
    widths = list(found["bytes_at_bits"])
    prefix = os.path.commonpath([name.replace(".", "/") for name in found["modules"]]).replace("/", ".")
    title = f"relative squared error of each packed matrix below {prefix}, by width (of its output, where measured)"
    table = Table(title=title, box=SIMPLE)
    table.add_column("module", no_wrap=True)
    for column in ("shape", *widths):
        table.add_column(column, justify="right", no_wrap=True)
    for name, module in found["modules"].items():
        measured = {b: error.get("output", error["relative"]) for b, error in module["errors"].items()}
        errors = [f"{measured[b]:.0e}" if b in measured else "" for b in widths]
        rows, columns = module["shape"]
        table.add_row(name.removeprefix(prefix + "."), f"{rows}×{columns}", *errors)
    return table


def _sparsity_table(found: dict[str, Any]) -> Table:
    """Blocks down, their linears across, as shares of zeros."""
    inner = {
        block: {
            name.removeprefix(block + "."): v for name, v in found["linears"].items() if name.startswith(block + ".")
        }
        for block in found["blocks"]
    }
    columns = list(dict.fromkeys(name for linears in inner.values() for name in linears))
    title = f"{found['zeros']} of {found['parameters']} weights in the blocks are zero, {100 * found['sparsity']:.2f} %; each, in %"
    table = Table(title=title, box=SIMPLE)
    for column in ("block", "all", *(name.rpartition(".")[2].removesuffix("_proj") for name in columns)):
        table.add_column(column, justify="right", no_wrap=True)
    for block, linears in inner.items():
        shares = [f"{100 * linears[name]['sparsity']:.1f}" if name in linears else "" for name in columns]
        table.add_row(block.rpartition(".")[2], f"{100 * found['blocks'][block]['sparsity']:.1f}", *shares)
    return table


@app.command()
def verify(folder: Folder) -> None:
    """Check digests, shapes and versions, and that a fresh process computes the recorded logits."""
    from compress.manifest import verify as check

    for line in check(folder):
        out.print(f"[green]ok[/] {escape(line)}")


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
    target: JsonOption = None,
) -> None:
    """Measure perplexity and bits per byte of a text at one or several widths, in one load."""
    from compress.evals.text import Protocol, evaluate_text

    quiet_transformers()
    protocol = Protocol(separator, limit, min_characters, length, stride, truncate)
    with progress_bar() as report:
        result = evaluate_text(folder, text, parse_widths(bits), protocol, device=device, report=report)
    if write_json(result, target) and target == "-":
        return
    table = Table("bits", "loss (nats/token)", "perplexity", "bits per byte", "tokens")
    for width, score in result["bits"].items():
        figures = (f"{score['loss']:.5f}", f"{score['perplexity']:.4f}", f"{score['bits_per_byte']:.4f}")
        table.add_row(width, *figures, str(score["tokens"]))
    out.print(table)


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="Checkpoint, or a dense model.", metavar="DIR")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    bits: Annotated[
        Optional[str], typer.Option(help="Width, or a mean width such as 3.5; all that is stored if absent.")
    ] = None,
    memory: Annotated[
        Optional[str], typer.Option(help="Choose widths so that all tensors fit, for example 2GB.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
) -> None:
    """Continue a text at a width."""
    import torch
    from transformers import AutoTokenizer, TextStreamer

    from compress.loading import load

    quiet_transformers()
    widths = parse_widths(bits)
    if widths is not None and len(widths) > 1:
        raise CompressError(f"--bits {bits!r}: give one width to generate at.")
    model: Any = load(folder, bits=widths[0] if widths else None, memory=memory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        raise CompressError("the prompt has no tokens; give some text.")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=padding, **sampling)


@app.command()
def passes(kind: Annotated[Optional[str], typer.Argument(help="One pass in full.")] = None) -> None:
    """List the installed passes, or one with all its settings."""
    from compress.errors import did_you_mean
    from compress.passes import kinds, pass_class

    if kind is None:
        for name in kinds():
            summary = (pass_class(name).Config.__doc__ or "").strip().splitlines()[0]
            out.print(f"[bold]{name}[/]  {escape(summary)}")
        return
    if kind not in kinds():
        raise CompressError(f"there is no pass {kind!r}. {did_you_mean(kind, kinds())}")
    config = pass_class(kind).Config
    out.print(escape(cleandoc(config.__doc__ or "")))
    table = Table("key", "default", "meaning")
    for name, field in config.model_fields.items():
        if name != "kind":
            table.add_row(name, escape(str(field.get_default())), escape(field.description or ""))
    out.print(table)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, with every installed pass."""
    from compress.recipe import json_schema

    print(json.dumps(json_schema(), indent=1))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")] = Path("runs/demo"),
    controls: Annotated[bool, typer.Option(help="Also measure k-means and round-to-nearest at every width.")] = True,
) -> None:
    """Compress the built-in model, load it in a fresh process, measure every width beside its controls."""
    from compress.demo.main import demonstrate

    quiet_transformers()
    with progress_bar() as report:
        result = demonstrate(output, controls, report)
    out.print(result)


if __name__ == "__main__":
    main()
