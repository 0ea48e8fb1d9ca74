"""Gather what a report needs: measure what is missing, then lay out everything that is known of a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import compress
from compress.errors import CompressError
from compress.evals import cloze, speed
from compress.evals.agreement import dense_model_of
from compress.evals.controls import measure_variants
from compress.evals.evaluate import BUILTIN, OpenModel, Protocol, documents_of, window_length
from compress.evals.kv import KVWanted
from compress.evals.store import FOLDER, Results, dense_identity, identity, prompt_key
from compress.evals.suite import Suite, evaluate_all
from compress.evals.tables import Matrix, transfer
from compress.evals.tasks import Tasks
from compress.inspect import inspect, sparsity
from compress.loading import load_tokenizer
from compress.manifest import read_manifest
from compress.passes import Progress
from compress.sidecars import Choice, stored_prompts
from compress.tokens import prompt_tokens, token_ids
from compress.weights import Checkpoint, TensorInfo


@dataclass(frozen=True)
class Wanted:
    """Say what a report is to have."""

    text: str | None = None  # file, or builtin; if None, builtin for a checkpoint of the built-in model, else none
    protocol: Protocol = field(default_factory=Protocol)
    tasks: Tasks | None = None  # if None, the built-in tasks for a checkpoint of the built-in model
    bits: Sequence[int | float] | None = None  # all there are if None
    controls: bool = False  # make and measure stages and controls
    load: speed.Load | None = field(default_factory=speed.Load)  # None for no benchmark
    prompts: tuple[str, ...] = ()  # to continue at all bits; the beginning of the text if empty
    device: str = "cpu"
    adapter: Choice = None  # as for :func:`compress.load`
    kv: KVWanted = field(default_factory=KVWanted)  # packed caches to measure the text with too


@dataclass(frozen=True)
class Facts:
    """Hold everything that is known of a checkpoint, from its files and its results."""

    folder: Path
    inspected: dict[str, Any]
    manifest: dict[str, Any]
    original: Mapping[str, TensorInfo]  # the dense model's tensors; empty if it is not there
    all_bits: list[str]  # most bits first, with mean numbers that were measured; "dense" where nothing is packed
    rows: list[dict[str, Any]]  # of the store, of the checkpoint and of its dense model
    bench: dict[str, Any] | None  # the latest result
    sparsity: dict[str, Any] | None  # None where nothing is pruned
    matrices: list[Given]
    notes: Sequence[str] = ()  # what is not in it, and why

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the measurements of a kind, oldest first."""
        return [row for row in self.rows if row["kind"] == kind]

    def rank(self, bits: str) -> int:
        """Return where a number of bits comes in tables: the dense model, the checkpoint's, anything else."""
        return ["dense", *self.all_bits, bits].index(bits)

    @property
    def texts(self) -> list[dict[str, Any]]:
        """Return one per text and protocol, the fullest first: ``{"name", "settings", "rows": {(bits, prompt): metrics}}``."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.of("text"):
            settings = {key: value for key, value in row["settings"].items() if key not in ("prompt", "adapter")}
            empty = {"name": row["name"], "settings": settings, "rows": {}}
            text = found.setdefault(row["name"] + json.dumps(settings, sort_keys=True), empty)
            text["rows"][row["width"], row["prompt"]] = row["metrics"]
        return sorted(found.values(), key=lambda text: -len(text["rows"]))

    @property
    def tasks(self) -> dict[tuple[str, str | None], dict[str, dict[str, Any]]]:
        """Return (bits, prompt) -> name of a task -> row, the dense model first."""
        found: dict[tuple[str, str | None], dict[str, dict[str, Any]]] = {}
        for row in sorted(self.of("task"), key=lambda row: (self.rank(row["width"]), row["prompt"] or "")):
            found.setdefault((row["width"], row["prompt"]), {})[row["name"]] = row
        return found

    @property
    def kept(self) -> dict[str, float]:
        """Return matrix -> share of the weights of the dense model's matrix of that name; empty where all shapes are the same."""
        ours = {name: item.shape for name, item in Checkpoint(self.folder).info().items() if len(item.shape) == 2}
        ours |= {f"{name}.weight": tuple(module["shape"]) for name, module in self.inspected["modules"].items()}
        sizes = {name: math.prod(shape) for name, shape in ours.items() if name in self.original}
        shares = {name: size / math.prod(self.original[name].shape) for name, size in sizes.items()}
        if all(share == 1 for share in shares.values()):
            return {}
        return {name.removesuffix(".weight"): share for name, share in shares.items()}

    @property
    def dense_bytes(self) -> int | None:
        """Return the bytes of the dense model's tensors; None if it is not there."""
        return sum(item.nbytes for item in self.original.values()) or None

    def bytes_at(self, bits: str) -> int | None:
        """Return the bytes of the tensors that loading at a number of bits reads."""
        if bits == "dense":
            return self.dense_bytes
        at = self.inspected["bytes_at_bits"]
        if bits in at or not at:
            return at.get(bits, self.inspected["bytes"])  # type: ignore[no-any-return]
        # A mean number has the bytes between its neighbours, by its own definition.
        share, low = math.modf(float(bits))
        below, above = (at.get(str(int(low) + more)) for more in (0, 1))
        return None if below is None else round(below + share * ((above or below) - below))


def measure_missing(folder: Path, wanted: Wanted, store: Results, progress: Progress | None = None) -> list[str]:
    """Measure what a report wants and the store does not have; return what could not be measured, one sentence each."""
    notes: list[str] = []
    builtin = (read_manifest(folder) or {}).get("recipe", {}).get("model") == BUILTIN
    text = wanted.text or (BUILTIN if builtin else None)
    tasks = wanted.tasks or Tasks(tuple(cloze.MAKERS) if builtin else ())
    dense = None
    try:
        dense = dense_model_of(str(folder))
    except CompressError as error:
        notes.append(f"The dense model was not measured: {error}")
    if builtin and wanted.tasks is None and find_spec("lm_eval") is None:
        notes.append("Tasks were not measured: lm-eval is not installed (pip install 'compress-llm[eval]').")
        tasks = Tasks()
    protocol, prompted = wanted.protocol, bool(stored_prompts(folder))
    if prompted:  # with and without, on the same windows: there must be room for the prompt
        length = window_length(compress.load(folder, prompt=True, adapter=False))
        protocol = replace(protocol, length=min(length, protocol.length or length))
    plain = Suite(text, protocol, tasks, dense=dense is not None, adapter=wanted.adapter, kv=wanted.kv)
    alike = replace(plain, agreement=bool(dense and text), robustness=bool(text))
    for suite in (alike, replace(plain, prompt=True)) if prompted else (alike,):
        if text or tasks.names:
            evaluate_all(str(folder), suite, wanted.bits, store, wanted.device, progress)
    if text is None:
        notes.append("No text was measured: give --text FILE.")
    elif wanted.controls:
        whole = [int(bits) for bits in inspect(folder)["bytes_at_bits"]]
        measure_variants(folder, text, protocol, whole, store, wanted.device, progress)
    common: dict[str, Any] = {"device": wanted.device, "store": store}
    if wanted.load is not None and not _benched(folder, wanted.load, store, wanted.adapter):
        speed.bench(str(folder), wanted.bits, load=wanted.load, progress=progress, adapter=wanted.adapter, **common)
    prompts = wanted.prompts or ((_beginning(folder, text, wanted.protocol),) if text else ())
    if prompts:
        if dense is not None:
            _continue(OpenModel(dense, adapter=False, progress=progress, **common), prompts)
        _continue(OpenModel(str(folder), wanted.bits, adapter=wanted.adapter, progress=progress, **common), prompts)
    return notes


def _benched(folder: Path, load: speed.Load, store: Results, adapter: Choice) -> bool:
    key = (identity(folder), asdict(load), prompt_key(folder, False, {}, adapter)[0])
    return any((row["model"], row["settings"]["load"], row["prompt"]) == key for row in store.rows("bench"))


def _beginning(folder: Path, source: str, protocol: Protocol) -> str:
    """Return the first 24 tokens of the first document as text, up to the end of a word."""
    tokenizer = load_tokenizer(folder)
    document = documents_of(source, protocol)[0][0]
    text = str(tokenizer.decode(token_ids(tokenizer, document[:2000])[:24]))
    return text.rpartition(" ")[0] or text


def _continue(at: OpenModel, prompts: Sequence[str]) -> None:
    """Continue prompts greedily at every number of bits of a model."""
    network: Any = at.model  # generate is not typed
    for prompt in prompts:
        tokens = torch.tensor([prompt_tokens(at.tokenizer, prompt)], device=at.model.device)

        def work(label: str, tokens: Tensor = tokens) -> dict[str, Any]:
            if watch := at.watch(f"continuing at {label}"):
                watch(0, 1)
            mask = torch.ones_like(tokens)
            made = network.generate(tokens, attention_mask=mask, max_new_tokens=48, do_sample=False)
            tail = at.tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)
            return {"metrics": {}, "text": str(tail)}

        at.measure(at.key("sample", prompt, {"tokens": 48}), work)


def collect(folder: Path, store: Results, notes: Sequence[str] = (), adapter: Choice = None) -> Facts:
    """Lay out what is known; measures nothing. Texts and tasks come with every adapter, the rest with the one that is named."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise CompressError(f"{folder}: has no compression.json; a report is about a checkpoint that compress wrote.")
    inspected, own = inspect(folder), identity(folder)
    dense, name = dense_identity(manifest), prompt_key(folder, False, {}, adapter)[0]
    rows = [
        row
        for row in store.rows()
        if row["model"] in (own, dense)
        and (row["kind"] in ("text", "task", "variant") or row["prompt"] == (name if row["model"] == own else None))
    ]
    benches = [row for row in rows if row["kind"] == "bench" and row["model"] == own]
    measured = {row["width"] for row in rows if row["kind"] in ("text", "task") and "." in row["width"]}
    all_bits = sorted({*inspected["bytes_at_bits"], *measured}, key=float, reverse=True) or ["dense"]
    try:
        original = Checkpoint(Path(dense_model_of(str(folder)))).info()
    except CompressError:
        original = {}
    zeros = sparsity(folder) if inspected["pruned"] else None
    latest = benches[-1]["result"] if benches else None
    matrices = read_matrices(folder / FOLDER)
    return Facts(folder, inspected, manifest, original, all_bits, rows, latest, zeros, matrices, notes)


class Given(NamedTuple):
    """Hold a matrix that another measurement left for the report."""

    title: str
    matrix: Matrix
    caption: str = "Darker is more."
    by_column: bool = False


def read_matrices(folder: Path) -> list[Given]:
    """Read the matrices that other measurements left in ``report/*.json``, such as how prompts transfer.

    A file holds one object, or a list of them: those of :func:`_given`, or rows of ``prompt``, ``model``, ``text`` and
    ``perplexity``, as ``python -m compress.evals.transfer`` writes them, which make one matrix per text. Others are somebody else's.
    """
    found: list[Given] = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CompressError(f"{path}: is not JSON ({error}).") from error
        items = [item for item in (content if isinstance(content, list) else [content]) if isinstance(item, dict)]
        transfers = [item for item in items if item.keys() >= {"prompt", "model", "text", "perplexity"}]
        for text in dict.fromkeys(row["text"] for row in transfers):
            found.append(_transfer([row for row in transfers if row["text"] == text]))
        for item in items:
            if item.keys() >= {"title", "rows", "columns", "values"}:
                found.append(_given(item, path))
    return found


def _transfer(rows: Sequence[Mapping[str, Any]]) -> Given:
    """Arrange how prompts do on one text."""
    prompts, models = ([*dict.fromkeys(row[name] for row in rows)] for name in ("prompt", "model"))
    text = rows[0]["text"]
    caption = "Perplexity of text tokens, the prompt of the row before the model of the column; darker is worse, within a column."
    matrix = transfer(rows, prompts, models, text, "perplexity")
    return Given(f"Transfer of soft prompts, {text}", matrix, caption, by_column=True)


def _given(item: Mapping[str, Any], path: Path) -> Given:
    """Read names and ``values`` (rows of numbers or null); axes, caption and ``by_column`` are optional."""
    rows, columns = ([*map(str, item[axis])] for axis in ("rows", "columns"))
    if [len(row) for row in item["values"]] != [len(columns)] * len(rows):
        raise CompressError(f"{path}: {item['title']}: values are not {len(rows)} rows of {len(columns)}.")
    down, across = (str(item.get(f"{axis}_axis", "")) for axis in ("row", "column"))
    matrix = Matrix(rows, columns, item["values"], down=down, across=across)
    return Given(str(item["title"]), matrix, str(item.get("caption", "Darker is more.")), bool(item.get("by_column")))
