"""What a report needs: measure what is missing, then lay out everything that is known of a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import compress
from compress.errors import CompressError
from compress.evals import bench, cloze
from compress.evals.agreement import dense_model_of
from compress.evals.store import FOLDER, Key, Results, dense_identity, identity, prompt_key
from compress.evals.suite import Suite, evaluate_all
from compress.evals.tasks import Tasks
from compress.evals.text import BUILTIN, Protocol, documents_of, widths_to_measure, window_length
from compress.evals.variants import measure_variants
from compress.inspect import inspect
from compress.loading import load_tokenizer
from compress.passes import Report
from compress.sidecars import Choice, stored_prompts
from compress.sparsity import sparsity
from compress.weights import Checkpoint, TensorInfo, read_manifest


@dataclass(frozen=True)
class Wanted:
    """What a report is to have.

    Attributes:
        text: file, or ``builtin``; None takes ``builtin`` for a checkpoint of the built-in model, else none.
        protocol: how it is cut.
        tasks: for lm-eval; None takes the built-in tasks for a checkpoint of the built-in model.
        bits: widths; all there are if None.
        controls: whether stages and controls are made and measured.
        load: for the benchmark; None for no benchmark.
        prompts: to continue at every width; the beginning of the text if empty.
        device: to measure on.
        adapter: as for :func:`compress.load`.
    """

    text: str | None = None
    protocol: Protocol = field(default_factory=Protocol)
    tasks: Tasks | None = None
    bits: Sequence[int | float] | None = None
    controls: bool = False
    load: bench.Load | None = field(default_factory=bench.Load)
    prompts: tuple[str, ...] = ()
    device: str = "cpu"
    adapter: Choice = None


@dataclass
class Facts:
    """Everything that is known of a checkpoint, from its files and its results.

    Attributes:
        folder: the checkpoint.
        inspected: :func:`compress.inspect.inspect`.
        manifest: whole.
        dense_bytes: of the dense model's tensors in its files; None if it is not there.
        widths: ``["8", …]``, largest first, with mean widths that were measured; ``["dense"]`` where nothing is packed.
        texts: one per text and protocol: ``{"name", "settings", "rows": {(width, prompt): metrics}}``, the fullest first.
        tasks: name -> (width, prompt) -> row.
        agreement: width -> metrics; of the first text.
        robustness: the same.
        variants: rows of stages and controls.
        bench: the latest result, or None.
        samples: ``[{"prompt", "width", "text"}]``.
        sparsity: :func:`compress.sparsity.sparsity`, or None where nothing is pruned.
        kept: linear -> share of the dense model's weights that its smaller shape has; empty where all shapes are the same.
        matrices: from ``report/*.json``: ``{"title", "rows", "columns", "values", …}``.
        notes: what is not in it, and why.
    """

    folder: Path
    inspected: dict[str, Any]
    manifest: dict[str, Any]
    dense_bytes: int | None
    widths: list[str]
    texts: list[dict[str, Any]]
    tasks: dict[str, dict[tuple[str, str | None], dict[str, Any]]]
    agreement: dict[str, dict[str, float]]
    robustness: dict[str, dict[str, float]]
    variants: list[dict[str, Any]]
    bench: dict[str, Any] | None
    samples: list[dict[str, str]]
    sparsity: dict[str, Any] | None
    kept: dict[str, float]
    matrices: list[dict[str, Any]]
    notes: list[str]

    def bytes_at(self, width: str) -> int | None:
        """Bytes of the tensors that loading at a width reads."""
        if width == "dense":
            return self.dense_bytes
        at = self.inspected["bytes_at_bits"]
        if width in at or not at:
            return at.get(width, self.inspected["bytes"])  # type: ignore[no-any-return]
        low = str(int(float(width)))  # a mean width has the bytes between its neighbours, by its own definition
        share = float(width) - int(float(width))
        return round(at[low] + share * (at.get(str(int(low) + 1), at[low]) - at[low])) if low in at else None


def measure_missing(folder: Path, wanted: Wanted, store: Results, report: Report) -> list[str]:
    """Measure what a report wants and the store does not have.

    Returns:
        What could not be measured, one sentence each.

    Raises:
        CompressError: what was asked for by name can not be had.
    """
    notes: list[str] = []
    builtin = (read_manifest(folder) or {}).get("recipe", {}).get("model") == BUILTIN
    text = wanted.text or (BUILTIN if builtin else None)
    tasks = wanted.tasks or Tasks(tuple(cloze.MAKERS) if builtin else ())
    dense = True
    try:
        dense_model_of(str(folder))
    except CompressError as error:
        dense = False
        notes.append(f"The dense model was not measured: {error}")
    if builtin and wanted.tasks is None and not _has_lm_eval():
        notes.append("Tasks were not measured: lm-eval is not installed (pip install 'compress-llm[eval]').")
        tasks = Tasks(())
    protocol, prompted = wanted.protocol, bool(stored_prompts(folder))
    if prompted:  # with and without, on the same windows: there must be room for the prompt
        length = window_length(compress.load(folder, prompt=True, adapter=False), None)
        protocol = replace(protocol, length=min(length, protocol.length or length))
    plain = Suite(text, protocol, tasks, dense=dense, adapter=wanted.adapter)
    suites = [replace(plain, agreement=dense and bool(text), robustness=bool(text))]
    for suite in [*suites, replace(plain, prompt=True)] if prompted else suites:
        if text or tasks.names:
            evaluate_all(str(folder), suite, wanted.bits, store.path, wanted.device, report, store)
    if text is None:
        notes.append("No text was measured: give --text FILE.")
    elif wanted.controls:
        whole = [int(width) for width in inspect(folder)["bytes_at_bits"]]
        measure_variants(folder, text, protocol, whole, store, wanted.device, report)
    if wanted.load is not None and not _benched(folder, wanted.load, store, wanted.adapter):
        bench.bench(
            str(folder),
            wanted.bits,
            load=wanted.load,
            device=wanted.device,
            store=store,
            report=report,
            adapter=wanted.adapter,
        )
    prompts = wanted.prompts or ((_beginning(folder, text, wanted.protocol),) if text else ())
    _continue(folder, prompts, wanted, store, report)
    return notes


def _has_lm_eval() -> bool:
    from importlib.util import find_spec

    return find_spec("lm_eval") is not None


def _benched(folder: Path, load: bench.Load, store: Results, adapter: Choice) -> bool:
    key = (identity(folder), asdict(load), prompt_key(folder, False, {}, adapter)[0])
    return any((row["model"], row["settings"]["load"], row["prompt"]) == key for row in store.rows("bench"))


def _beginning(folder: Path, source: str, protocol: Protocol, tokens: int = 24) -> str:
    """The first tokens of the first document as text, up to the end of a word."""
    tokenizer = load_tokenizer(folder)
    document = documents_of(source, protocol)[0][0]
    text = str(tokenizer.decode(tokenizer(document[:2000], add_special_tokens=False)["input_ids"][:tokens]))
    return text.rpartition(" ")[0] or text


def _continue(folder: Path, prompts: Sequence[str], wanted: Wanted, store: Results, report: Report) -> None:
    """Greedy continuations of the prompts, at every width and dense."""
    places = [str(folder)]
    try:
        places.insert(0, dense_model_of(str(folder)))
    except CompressError:
        pass
    for place in places if prompts else []:
        model: Any = None
        origin = identity(place)
        dense = place != str(folder)
        adapter = False if dense else wanted.adapter
        unusual, common = prompt_key(place, False, {"tokens": 48}, adapter)
        model = compress.load(place, dtype=torch.float32, device_map=wanted.device, adapter=adapter)
        tokenizer = load_tokenizer(place)
        for width in widths_to_measure(
            model, None if dense else [w for w in wanted.bits or () if isinstance(w, int)] or None
        ):
            if width is not None:
                compress.set_bits(model, int(width))
            for number, prompt in enumerate(prompts, 1):
                key = Key("sample", prompt, origin, "dense" if width is None else str(width), unusual, common)
                report(f"continuing at {key.width}", number, len(prompts))
                if store.find(key) is None:
                    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
                    made = model.generate(
                        **inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id
                    )
                    tail = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                    store.add(key, {}, text=str(tail))


def collect(folder: Path, store: Results, notes: Sequence[str] = (), adapter: Choice = None) -> Facts:
    """Lay out what is known; measures nothing. Texts and tasks come with every adapter, the rest with the one that is named.

    Raises:
        CompressError: no checkpoint, or a matrix file that is not one.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CompressError(f"{folder}: has no compression.json; a report is about a checkpoint that compress wrote.")
    inspected = inspect(folder)
    own, dense = identity(folder), dense_identity(manifest)
    places = {own: None, dense: "dense"}
    mine = [row for row in store.rows() if row["model"] in places]
    name = prompt_key(folder, False, {}, adapter)[0]
    chosen = [row for row in mine if row["prompt"] == name or (row["model"] == dense and row["prompt"] is None)]
    texts: dict[str, dict[str, Any]] = {}
    for row in mine:
        if row["kind"] == "text":
            settings = {key: value for key, value in row["settings"].items() if key not in ("prompt", "adapter")}
            group = texts.setdefault(
                row["name"] + json.dumps(settings, sort_keys=True),
                {"name": row["name"], "settings": settings, "rows": {}},
            )
            group["rows"][row["width"], row["prompt"]] = row["metrics"]
    tasks: dict[str, dict[tuple[str, str | None], dict[str, Any]]] = {}
    for row in mine:
        if row["kind"] == "task":
            tasks.setdefault(row["name"], {})[row["width"], row["prompt"]] = row
    benches = [row for row in chosen if row["kind"] == "bench" and row["model"] == own]
    measured = {row["width"] for row in mine if row["kind"] in ("text", "task") and "." in row["width"]}
    widths = sorted({*inspected["bytes_at_bits"], *measured}, key=float, reverse=True) or ["dense"]
    try:
        original = Checkpoint(Path(dense_model_of(str(folder)))).info()
    except CompressError:
        original = {}
    return Facts(
        folder=folder, inspected=inspected, manifest=manifest, widths=widths,
        dense_bytes=sum(item.nbytes for item in original.values()) or None, kept=_kept(folder, inspected, original),
        texts=sorted(texts.values(), key=lambda text: -len(text["rows"])), tasks=tasks,
        agreement={row["width"]: row["metrics"] for row in chosen if row["kind"] == "agreement"},
        robustness={row["width"]: row["metrics"] for row in chosen if row["kind"] == "robustness"},
        variants=[row for row in mine if row["kind"] == "variant"],
        bench=benches[-1]["result"] if benches else None,
        samples=[{"prompt": row["name"], "width": row["width"], "text": row["text"]} for row in chosen if row["kind"] == "sample"],
        sparsity=sparsity(folder) if inspected["pruned"] else None,
        matrices=read_matrices(folder / FOLDER), notes=list(notes),
    )  # fmt: skip


def _kept(folder: Path, inspected: Mapping[str, Any], original: Mapping[str, TensorInfo]) -> dict[str, float]:
    """Size of every matrix of a block beside the dense model's matrix of the same name."""
    ours = {name: item.shape for name, item in Checkpoint(folder).info().items() if len(item.shape) == 2}
    ours |= {f"{name}.weight": tuple(module["shape"]) for name, module in inspected["modules"].items()}
    shares = {
        name.removesuffix(".weight"): math.prod(shape) / math.prod(original[name].shape)
        for name, shape in ours.items()
        if name in original
    }
    return shares if any(share != 1 for share in shares.values()) else {}


_TRANSFER = {"prompt", "model", "text", "perplexity"}


def _transfers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One matrix per text: prompts down, models across."""
    matrices = []
    for text in dict.fromkeys(row["text"] for row in rows):
        mine = {(row["prompt"], row["model"]): row["perplexity"] for row in rows if row["text"] == text}
        prompts, models = ([*dict.fromkeys(key[place] for key in mine)] for place in (0, 1))
        matrices.append({
            "title": f"Transfer of soft prompts, {text}", "rows": prompts, "columns": models,
            "values": [[mine.get((prompt, model)) for model in models] for prompt in prompts],
            "row_axis": "prompt learned at", "column_axis": "evaluated at",
            "caption": "Perplexity of text tokens, the prompt of the row before the model of the column; darker is worse.",
        })  # fmt: skip
    return matrices


def read_matrices(folder: Path) -> list[dict[str, Any]]:
    """Matrices that other measurements left in ``report/*.json``, such as how prompts transfer.

    A file holds one object, or a list of them: ``title``, ``rows``, ``columns`` (names), ``values`` (rows of numbers or
    null); optional ``row_axis``, ``column_axis`` and ``caption``. Rows of ``prompt``, ``model``, ``text`` and ``perplexity``, as
    ``python -m compress.evals.transfer`` writes them, make one matrix per text. Other objects are somebody else's.

    Raises:
        CompressError: a matrix whose shape is not that of its names.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CompressError(f"{path}: is not JSON ({error}).") from error
        items = content if isinstance(content, list) else [content]
        found += _transfers([item for item in items if isinstance(item, dict) and item.keys() >= _TRANSFER])
        for item in items:
            if not isinstance(item, dict) or not {"title", "rows", "columns", "values"} <= item.keys():
                continue
            shape = [len(item["columns"])] * len(item["rows"])
            if [len(row) for row in item["values"]] != shape:
                raise CompressError(
                    f"{path}: {item['title']}: values are not {len(item['rows'])} rows of {len(item['columns'])}."
                )
            found.append(item)
    return found
