"""Add the commands that make checkpoints and tell what is in them."""

import ctypes
import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from compress.cli.common import Folder, JsonFlag, app, out, progress_bar, quiet_transformers
from compress.errors import CompressError, did_you_mean
from compress.hub import name_of

_WORKSPACE = "Keep finished units here, to share between recipes; OUTPUT.work, deleted at the end, if absent."
_REVISION = "Branch, tag or commit of a model on the hub, in place of the recipe's."
_TOKEN = "Access token for the hub; the one you are logged in with if absent. It is written nowhere."
RevisionOption = Annotated[Optional[str], typer.Option(help=_REVISION)]
TokenOption = Annotated[Optional[str], typer.Option(help=_TOKEN)]
Assignments = Annotated[Optional[list[str]], typer.Option("--set", help="Override: passes.0.seed_bits=2")]


_MMAP_THRESHOLD = -3  # glibc's name for it, M_MMAP_THRESHOLD
_LARGE = 1 << 20


def give_back_large_arrays() -> None:
    """Have glibc return the memory of arrays of 1 MB or more when they are freed, unless the environment says what is to be.

    By itself it comes to keep those of up to 32 MB in its heaps, where a training's leave holes: half as much again at the peak.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(OSError, AttributeError, TypeError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see `compress schema` and `compress passes`.")],
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder to create.")] = None,
    assignments: Assignments = None,
    workspace: Annotated[Optional[Path], typer.Option(help=_WORKSPACE)] = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
) -> None:
    """Compress a model. Interrupted, the same command continues where it was."""
    give_back_large_arrays()
    from compress.recipe import load_recipe

    settings = load_recipe(recipe, assignments or ()).opened(revision, token)  # before torch, which takes seconds
    from accelerate import PartialState

    from compress import pipeline
    from compress.inspect import inspect as look

    quiet_transformers()
    with progress_bar() as progress:
        target = pipeline.run(settings, output, workspace=workspace, progress=progress)
    if not PartialState().is_main_process:
        return
    found = look(target)
    out.print(f"{escape(str(target))}: {found['bytes'] / 1e6:.2f} MB of tensors" + _at_bits(found["bytes_at_bits"]))


def _at_bits(at: dict[str, int]) -> str:
    return "; read at " + ", ".join(f"{bits} bits: {size / 1e6:.2f} MB" for bits, size in at.items()) if at else ""


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    assignments: Assignments = None,
    as_json: JsonFlag = False,
    seconds: Annotated[
        bool,
        typer.Option("--time", help="Also foresee the processor time, by doing a little of the work on one block."),
    ] = False,
    revision: RevisionOption = None,
    token: TokenOption = None,
) -> None:
    """Tell, without reading a weight (but for --time), what a run will need and how large the result will be."""
    from compress.recipe import load_recipe

    settings = load_recipe(recipe, assignments or ()).opened(revision, token)  # before torch, which takes seconds
    from compress.plan import plan as foresee

    quiet_transformers()
    found = foresee(settings, seconds=seconds)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    out.print(f"{escape(found['model'])}: {found['blocks']} blocks, {found['dense_bytes'] / 1e6:.2f} MB of tensors")
    if found["parameters_after"] != found["parameters"]:
        gone = 1 - found["parameters_after"] / found["parameters"]
        out.print(f"parameters: {found['parameters']}, {found['parameters_after']} after pruning ({gone:.1%} fewer)")
    out.print(f"checkpoint: {found['checkpoint_bytes'] / 1e6:.2f} MB" + _at_bits(found["bytes_at_bits"]))
    for step in found["passes"]:
        memory, room = step["memory_bytes"] / 1e6, step["workspace_bytes"] / 1e6
        out.print(
            f"{step['kind']}: about {memory:.0f} MB of memory above the imports, {room:.0f} MB of workspace"
            + _time(step)
            + (f"; up to {step['processes']} processes can share it" if step["processes"] > 1 else "")
        )
    out.print(f"at most about {found['peak_memory_bytes'] / 1e6:.0f} MB of memory above the imports in each process")
    for warning in found["warnings"]:
        out.print(f"[bold yellow]does not fit:[/] {escape(warning)}")


def _degrees(folder: Path) -> list[int]:
    """Return the degrees of tensor parallelism that vLLM can serve a folder at; none where it cannot serve it."""
    from compress.config import read_settings
    from compress.vllm.settings import legal_degrees, unserved

    config, stored = json.loads((folder / "config.json").read_text(encoding="utf-8")), read_settings(folder)
    served = stored is None or unserved(stored, config.get("model_type", "")) is None
    return legal_degrees(config, stored.shapes().values() if stored else ()) if served else []


def _time(step: dict[str, Any]) -> str:
    if "processor_seconds" not in step:
        return ""
    seconds = step["processor_seconds"]
    return ", time not foreseen" if seconds is None else f", {seconds / 60:.1f} minutes of processor time"


@app.command()
def inspect(
    folder: Folder,
    as_json: JsonFlag = False,
    modules: Annotated[bool, typer.Option(help="List every packed module.")] = True,
    sparsity: Annotated[
        Optional[bool],
        typer.Option(help="Count zeros per block and linear, which reads all weights; if absent, of pruned models."),
    ] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw the sparsity of blocks and linears (.svg, .png).")] = None,
    structure: Annotated[
        bool,
        typer.Option(
            "--structure", help="Show what would be packed of a dense model, and what not; config.json is enough."
        ),
    ] = False,
) -> None:
    """Show what is in a checkpoint: modules, bytes by bits, errors, sparsity, where it came from."""
    if structure:
        _show_structure(str(folder), as_json)
        return
    from compress.inspect import inspect as look
    from compress.inspect import sparsity as count

    found = look(folder)
    found["tensor_parallel"] = _degrees(folder)
    if plot is not None or (found["pruned"] if sparsity is None else sparsity):
        quiet_transformers()
        found["sparsity"] = count(folder)
        if plot is not None:
            from compress.evals import plots, tables

            plots.save(plots.heat_map(tables.zeros(found["sparsity"]), limits=(0, 100)), plot)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show_checkpoint(found, modules)


def _show_checkpoint(found: dict[str, Any], modules: bool) -> None:
    """Print what :func:`compress.inspect.inspect` found, every packed module if wanted."""
    origin = found["manifest"]
    if origin:
        recipe = origin["recipe"]
        steps = " → ".join([name_of(recipe["model"]), *(step["kind"] for step in recipe["passes"])])
        out.print(f"{escape(steps)}, seed {recipe['seed']}, compress {origin['compress_version']}")
    out.print(
        f"{found['bytes'] / 1e6:.3f} MB of tensors in {len(found['files'])} files{_at_bits(found['bytes_at_bits'])}"
    )
    if found["divergence_at_bits"]:
        foreseen = ", ".join(f"{value:.2g} at {bits} bits" for bits, value in found["divergence_at_bits"].items())
        out.print(f"divergence from the dense model, estimated on calibration text, nats per token: {foreseen}")
    if modules and found["modules"]:
        out.print(_module_table(found))
    if found["modules"]:
        degrees = ", ".join(map(str, found["tensor_parallel"]))
        out.print(f"degrees of tensor parallelism in vLLM: {degrees or 'none, it cannot serve this'}")
    for line in _pruned_lines(found["modules"]):
        out.print(line)
    for name, sizes in found["blocks"].items():
        heads = f"{sizes['heads']} heads, {sizes['key_value_heads']} of keys and values"
        out.print(f"{escape(name)}: {heads}, {sizes['channels']} channels")
    if modules and "sparsity" in found:
        out.print(_sparsity_table(found["sparsity"]))
    for bits, prompt in found["prompts"].items():
        out.print(f"soft prompt for {bits}: {prompt['tokens']} virtual tokens, {prompt['numbers']} numbers")
    if "adapter" in found:
        rank, numbers = found["adapter"]["rank"], found["adapter"]["numbers"]
        out.print(f"adapter of rank {rank}, {numbers} numbers: in use unless left off, not by plain from_pretrained")
    dense = sum(found["dense"].values())
    out.print(f"dense tensors: {len(found['dense'])}, {dense / 1e6:.3f} MB")
    for name, reason in found["not_quantised"].items():
        out.print(f"  {escape(name)}: {escape(reason)}")


def _show_structure(model: str, as_json: bool) -> None:
    from compress.outline import lines, outline

    quiet_transformers()
    found = outline(model)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for line in lines(found):
        out.print(escape(line), soft_wrap=True)


def _pruned_lines(modules: dict[str, Any]) -> Iterator[str]:
    """Tell how matrices with pruned weights are stored; nothing if the manifest knows of none."""
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
    all_bits = list(found["bytes_at_bits"])
    prefix = os.path.commonpath([name.replace(".", "/") for name in found["modules"]]).replace("/", ".")
    title = f"relative squared error of each packed matrix below {prefix}, by bits (of its output, where measured)"
    table = Table(title=title, box=SIMPLE)
    table.add_column("module", no_wrap=True)
    for column in ("shape", *all_bits):
        table.add_column(column, justify="right", no_wrap=True)
    for name, module in found["modules"].items():
        measured = {b: error.get("output", error["relative"]) for b, error in module["errors"].items()}
        errors = [f"{measured[b]:.0e}" if b in measured else "" for b in all_bits]
        rows, columns = module["shape"]
        table.add_row(name.removeprefix(prefix + "."), f"{rows}×{columns}", *errors)
    return table


def _sparsity_table(found: dict[str, Any]) -> Table:
    """Lay out shares of zeros: blocks down, their linears across."""
    shares = {name: f"{100 * linear['sparsity']:.1f}" for name, linear in found["linears"].items()}
    columns = list(
        dict.fromkeys(n.removeprefix(b + ".") for b in found["blocks"] for n in shares if n.startswith(b + "."))
    )
    title = f"{found['zeros']} of {found['parameters']} weights in the blocks are zero, {100 * found['sparsity']:.2f} %; each, in %"
    table = Table(title=title, box=SIMPLE)
    for column in ("block", "all", *(name.rpartition(".")[2].removesuffix("_proj") for name in columns)):
        table.add_column(column, justify="right", no_wrap=True)
    for block, whole in found["blocks"].items():
        cells = [shares.get(f"{block}.{name}", "") for name in columns]
        table.add_row(block.rpartition(".")[2], f"{100 * whole['sparsity']:.1f}", *cells)
    return table


@app.command()
def verify(folder: Folder) -> None:
    """Check digests, shapes and versions, and that a fresh process computes the recorded logits."""
    from compress.manifest import verify as check

    for line in check(folder):
        out.print(f"[green]ok[/] {escape(line)}")


@app.command()
def push(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is seen by its owner alone.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to upload to; main if absent.")] = None,
    token: Annotated[
        Optional[str], typer.Option(help="Access token; the one you are logged in with if absent.")
    ] = None,
) -> None:
    """Upload a checkpoint, with its model card, to the Hugging Face hub."""
    from compress.publish import push as upload

    out.print(escape(upload(folder, name, private, revision, token)))


@app.command()
def passes(kind: Annotated[Optional[str], typer.Argument(help="One pass in full.")] = None) -> None:
    """List the installed passes, or one with all its settings."""
    from compress.settings import config_class, kinds

    if kind is None:
        for name in kinds():
            summary = (config_class(name).__doc__ or "").strip().splitlines()[0]
            out.print(f"[bold]{name}[/]  {escape(summary)}")
        return
    if kind not in kinds():
        raise CompressError(f"there is no pass {kind!r}. {did_you_mean(kind, kinds())}")
    config = config_class(kind)
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
    controls: Annotated[bool, typer.Option(help="Also measure k-means and round-to-nearest at all bits.")] = True,
) -> None:
    """Compress the built-in model, load it in a fresh process, measure all bits beside their controls."""
    from compress.demo.main import demonstrate

    quiet_transformers()
    with progress_bar() as progress:
        result = demonstrate(output, controls, progress)
    out.print(result)
