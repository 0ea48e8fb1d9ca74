"""Make the page of a report from what is known of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from compress.evals import plots, tables
from compress.evals.gather import Facts
from compress.evals.page import Page, Picture, Section
from compress.evals.plots import Line, Point
from compress.evals.tables import Matrix, Table
from compress.hub import name_of

QUALITY = "Quality at every number of bits"
"""Title of the sections that a model card has too."""


def report_page(facts: Facts) -> Page:
    """Lay out everything that is known of a checkpoint."""
    sections = [
        *_quality(facts),
        *_tasks(facts),
        *_agreement(facts),
        *_caches(facts),
        *_speed(facts),
        *_errors(facts),
        *_shares(facts),
        *(Section(given.title, pictures=[_heat_map(*given)]) for given in facts.matrices),
        *_samples(facts),
        _made(facts),
    ]
    recipe = facts.manifest["recipe"]
    title = " → ".join(
        [Path(name_of(recipe["model"])).name, *(step["kind"].replace("_", " ") for step in recipe["passes"])]
    )
    return Page("Compression report", title, sections, [*_leads(facts)], [*facts.notes, *plots.why_not()])


def showcase(facts: Facts) -> str:
    """Return the number of bits that headlines are about: 4, or the nearest there is; ``dense`` where nothing is packed."""
    whole = [bits for bits in facts.all_bits if bits.isdigit()]
    return min(whole, key=lambda bits: (abs(int(bits) - 4), bits)) if whole else "dense"


def _leads(facts: Facts) -> Iterable[tuple[str, str, str]]:
    """Yield the four figures a reader wants first."""
    at = facts.inspected["bytes_at_bits"]
    if at:
        whole = f"{tables.megabytes(facts.inspected['bytes'])} of tensors in all"
        yield "One checkpoint", f"{min(map(int, at))} to {max(map(int, at))} bits", whole
    bits = showcase(facts)
    size, full = facts.bytes_at(bits), facts.dense_bytes
    share = f"{size / full:.2f} of the dense {tables.megabytes(full)}" if size and full else ""
    yield "Size" if bits == "dense" else f"Read at {tables.label(bits)}", tables.megabytes(size), share
    rows = facts.texts[0]["rows"] if facts.texts else {}
    here, dense = rows.get((bits, None)), rows.get(("dense", None))
    if here and dense and bits != "dense":
        perplexities = f"perplexity {here['perplexity']:.4g}, dense {dense['perplexity']:.4g}"
        yield f"Loss at {tables.label(bits)}", f"{tables.above(here['loss'], dense['loss']):+.2f} %", perplexities
    if facts.bench and bits in facts.bench["widths"]:
        figures = facts.bench["widths"][bits]
        ratio = figures.get("decode_versus_dense")
        speed = tables.plain(figures["decode_tokens_per_second"]["median"])
        yield f"Decoding at {tables.label(bits)}", f"{speed} tok/s", f"{ratio['median']:.2f} × dense" if ratio else ""


def _quality(facts: Facts) -> Iterable[Section]:
    for place, text in enumerate(facts.texts):
        lines = pareto_lines(facts, text)
        caption = (
            "Loss added to the dense model's, against the bytes of the tensors that loading at a number of bits reads from the files. "
            "Both axes are logarithmic; a point on the lower edge is at or below the dense model's loss. "
        )
        if any(line.control for line in lines):
            caption += "Dashed: controls, each point a checkpoint of its own; the solid line is one checkpoint."
        else:
            caption += "No controls were measured: `compress report --controls` makes and measures them."
        label = "Added loss against size, one point per number of bits" + f" (text {place + 1})" * bool(place)
        picture = Picture(label, partial(plots.pareto, lines), caption, file="" if place else "pareto.png")
        pictures = [picture] if sum(len(line.points) for line in lines) > 1 else []
        title = QUALITY + f": {_name_of(text)}" * bool(place)
        yield Section(title, quality_table(facts, text), protocol_words(text), pictures)


def quality_table(facts: Facts, text: Mapping[str, Any]) -> Table:
    """Set size and loss of the dense model, of stages and at all bits (with and without prompts) beside the controls' loss."""
    rows: Mapping[tuple[str, str | None], Mapping[str, float]] = text["rows"]
    dense = rows.get(("dense", None))
    controls = {
        f"control loss: {name}": {bits: loss for bits, _, loss in points}
        for name, points in control_points(facts, text).items()
    }
    heads = ["", "read", "× dense", "loss, nats", "vs dense", "perplexity", "bits per byte", *controls]
    table = Table(heads)

    def add(kind: str, name: str, size: int | None, metrics: Mapping[str, float], bits: str = "") -> None:
        share = f"{size / facts.dense_bytes:.2f}" if size and facts.dense_bytes else "–"
        change = "–" if dense is None or kind == "dense" else f"{tables.above(metrics['loss'], dense['loss']):+.2f} %"
        figures = [tables.number(metrics["perplexity"]), tables.number(metrics["bits_per_byte"])]
        sidecar = [tables.number(losses.get(bits)) if kind == "width" else "–" for losses in controls.values()]
        table.add(kind, name, tables.megabytes(size), share, tables.number(metrics["loss"]), change, *figures, *sidecar)

    if dense is not None:
        add("dense", "dense", facts.dense_bytes, dense)
    for row in _variants(facts, text, "stage"):
        for bits, metrics in row["widths"].items():
            name = row["label"] if bits == "dense" else f"{row['label']}, {tables.label(bits)}"
            add("stage", name, metrics["disk_bytes"], metrics)
    prompts = sorted({prompt for _, prompt in rows if prompt})
    for bits in dict.fromkeys(["dense", *facts.all_bits]):
        if (bits, None) in rows and bits != "dense":
            add("width", tables.label(bits), facts.bytes_at(bits), rows[bits, None], bits)
        for prompt in prompts:
            if (bits, prompt) in rows:
                add("prompt", tables.label(bits, prompt), facts.bytes_at(bits), rows[bits, prompt])
    return table.without_empty()


def _variants(facts: Facts, text: Mapping[str, Any], group: str) -> list[dict[str, Any]]:
    same = text["name"], text["settings"]["sha256"]
    rows = [row for row in facts.of("variant") if row["group"] == group]
    return [row for row in rows if (row["name"], row["settings"]["sha256"]) == same]


def control_points(facts: Facts, text: Mapping[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """Return label -> [(bits, bytes, loss)] of the controls that were measured on a text, smallest first."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    for row in _variants(facts, text, "control"):
        points = [(bits, metrics["disk_bytes"], metrics["loss"]) for bits, metrics in row["widths"].items()]
        found.setdefault(row["label"], []).extend(points)
    return {name: sorted(points, key=lambda point: point[1]) for name, points in found.items()}


def _name_of(text: Mapping[str, Any]) -> str:
    return "held-out modules of the standard library" if text["name"] == "builtin" else Path(text["name"]).name


def protocol_words(text: Mapping[str, Any]) -> str:
    """Say what was measured, and how, in a sentence or two."""
    settings, metrics = text["settings"], next(iter(text["rows"].values()))
    protocol = settings.get("protocol", {})
    how = f"windows of {protocol.get('length')} tokens"
    if protocol.get("disjoint"):
        how += " side by side"
    elif protocol.get("truncate"):
        how = f"the first {protocol.get('length')} tokens of each document"
    elif protocol.get("stride"):
        how += f", advancing by {protocol['stride']}"
    else:
        how += " that overlap by half"
    documents = f"; the first {protocol['limit']} documents" if protocol.get("limit") else ""
    if spelled := settings.get("special_tokens"):
        read = "such" if protocol.get("special_tokens") else "plain text"
        documents += f"; {spelled:,} special tokens that it spells are read as {read}"
    documents += f"; {settings['bos']} in front of each document" if settings.get("bos") else ""
    return (
        f"{_name_of(text)}: {metrics['tokens']:,} predicted tokens, {metrics['bytes']:,} bytes; {how}{documents}; "
        f"{settings.get('dtype', '')}. Every token is scored once; virtual tokens are never scored. "
        f"SHA\u2011256 {str(settings.get('sha256', ''))[:12]}…; the checkpoint was not calibrated on this text."
    )


def pareto_lines(facts: Facts, text: Mapping[str, Any]) -> list[Line]:
    """Return the checkpoint at all its bits, with and without prompts, and its controls; none without the dense model's loss."""
    rows = text["rows"]
    if ("dense", None) not in rows:
        return []
    dense = rows["dense", None]["loss"]

    def point(bits: str, size: float, loss: float) -> Point:
        tooltip = f"{tables.label(bits)}: {tables.megabytes(size)}, loss {tables.above(loss, dense):+.3f} %"
        return Point(size / 1e6, plots.added(loss, dense), bits, tooltip)

    lines = []
    for prompt in sorted({prompt for _, prompt in rows}, key=lambda prompt: prompt or ""):
        packed = [bits for bits in facts.all_bits if bits != "dense" and (bits, prompt) in rows]
        points = [point(bits, size, rows[bits, prompt]["loss"]) for bits in packed if (size := facts.bytes_at(bits))]
        if points:
            lines.append(Line(prompt or "this checkpoint", points))
    for name, measured in control_points(facts, text).items():
        lines.append(Line(f"control: {name}", [point(*one) for one in measured], control=True))
    return lines


def _tasks(facts: Facts) -> Iterable[Section]:
    if found := facts.tasks:
        items = {name: row["n"] for rows in found.values() for name, row in rows.items()}
        sizes = ", ".join(f"{name} {count} items" for name, count in items.items())
        builtin = any(name.startswith("builtin_") for name in items)
        chance = " The built-in tasks have four choices, so chance is 0.25." if builtin else ""
        note = (
            f"lm-eval, in process; {sizes}; ± is one standard error.{chance} “Answers changed” counts items whose chosen answer is "
            "not the dense model’s, right or wrong; calibration error (ece) is of the softmax over the choices."
        )
        yield Section("Tasks", tables.task_table(found), note)


def _agreement(facts: Facts) -> Iterable[Section]:
    alike, typos = ({row["width"]: row["metrics"] for row in facts.of(kind)} for kind in ("agreement", "robustness"))
    if alike or typos:
        note = (
            "Token by token over the same text. KL: mean Kullback-Leibler divergence from the dense model’s next-token "
            "distribution. Right ↔ wrong: share of tokens where just one of the two models’ likeliest token is right. Calibration "
            "error: of the likeliest token’s probability, in 15 bins. Typos: two inner letters swapped in 5 % of the words of four letters or more."
        )
        yield Section("How alike it is to the dense model", tables.agreement(alike, typos), note)


def _caches(facts: Facts) -> Iterable[Section]:
    """Yield what packing keys and values costs on the text of the report."""
    if not facts.texts:
        return
    text, found = facts.texts[0], dict[str, dict[str, Any]]()
    plain = {bits: metrics for (bits, prompt), metrics in text["rows"].items() if prompt is None}
    for row in facts.of("kv"):
        settings = {key: value for key, value in row["settings"].items() if key != "kv"}
        if settings == text["settings"] and row["prompt"] is None and row["width"] in plain:
            bits = row["settings"]["kv"]["bits"]
            label = ":".join(map(str, bits)) if isinstance(bits, list) else str(bits)
            found.setdefault(label, {})[row["width"]] = row["metrics"]
    if found:
        words = "Perplexity with the cache in the loop, a block of tokens after the other; bytes are those it holds in memory."
        yield Section("Cache of keys and values", tables.cached(found, plain), words)


def _speed(facts: Facts) -> Iterable[Section]:
    found = facts.bench
    if found is None:
        return
    load, threads = found["load"], found["threads"]
    clock = "processor time on one thread" if threads == 1 and "GPU" not in found["device"] else "wall time"
    note = (
        f"{found['device']}, {threads} thread{'s' * (threads != 1)}, {found['dtype']}, batch of one, prompt of {load['prompt']} "
        f"tokens, {load['tokens']} decoded, {load['rounds']} rounds with all candidates in turn; {clock}. "
        "± is half the distance between the quartiles. Loading and resident memory: fresh processes, memory above what it was before "
        f"loading. Backend: {found['backend']}."
    )
    if found["dense"].startswith("not measured"):
        note += f" The dense model was {found['dense']}."
    decoding = {bits: figures["decode_tokens_per_second"] for bits, figures in found["widths"].items()}
    rows = [(bits, figure["median"], figure["low"], figure["high"]) for bits, figure in decoding.items()]
    picture = Picture(
        "Tokens per second when decoding, by number of bits",
        partial(plots.bars, rows, tables.plain, decoding.get("dense", {}).get("median")),
        "Decoding, tokens per second; the whisker spans the quartiles, the dotted line is the dense model.",
    )
    yield Section("Speed and memory", tables.speed(found), note, [picture])


def _heat_map(label: str, matrix: Matrix, caption: str, by_column: bool = False, **options: Any) -> Picture:
    draw = partial(plots.heat_map, matrix, by_column=by_column, **options)
    return Picture(label, draw, caption, matrix.table())


def _errors(facts: Facts) -> Iterable[Section]:
    modules = facts.inspected["modules"]
    all_bits = [bits for bits in facts.all_bits if any(bits in module["errors"] for module in modules.values())]
    if not all_bits:
        return
    first = showcase(facts)
    pictures = []
    for bits in dict.fromkeys([all_bits[-1], first if first in all_bits else all_bits[0]]):
        errors = {name: module["errors"].get(bits, {}) for name, module in modules.items()}
        figures = {name: error.get("output", error.get("relative")) for name, error in errors.items()}
        matrix = tables.by_block({name: one for name, one in figures.items() if one is not None}, tables.short)
        pictures.append(_heat_map(f"Relative squared error at {bits} bits", matrix, f"{bits} bits", log=True))
    note = (
        "Relative squared error of each matrix (of its output on calibration text, where the pass measured that; else of its weights), "
        "as recorded when the checkpoint was made. Darker is more, on a logarithmic scale of its own in each panel."
    )
    yield Section("Where the error is", note=note, pictures=pictures)


def _shares(facts: Facts) -> Iterable[Section]:
    """Show what is zero and what is gone, block by block."""
    if found := facts.sparsity:
        caption = (
            f"Zeros in %, counted in the files: {found['zeros']:,} of {found['parameters']:,} weights in the blocks. "
            "A mask alone makes nothing faster; what it saves on disk is in the sizes above."
        )
        picture = _heat_map("Share of zeros in each matrix", tables.zeros(found), caption, limits=(0, 100))
        yield Section("Allocation per block", pictures=[picture])
    if kept := facts.kept:
        caption = "Weights that each matrix has left, in % of the dense model's matrix of that name: these are gone, not zero."
        matrix = tables.by_block({name: 100 * share for name, share in kept.items()}, "{:.0f}".format)
        picture = _heat_map("Share of weights left in each matrix", matrix, caption, limits=(0, 100))
        yield Section("Sizes per block", pictures=[picture])


def _samples(facts: Facts) -> Iterable[Section]:
    blocks = []
    for prompt in dict.fromkeys(sample["name"] for sample in facts.of("sample")):
        blocks.append(("", prompt))
        written: dict[str, list[str]] = {}  # the same words at several bits are shown once
        mine = [sample for sample in facts.of("sample") if sample["name"] == prompt]
        for sample in sorted(mine, key=lambda sample: facts.rank(sample["width"])):
            written.setdefault(sample["text"], []).append(sample["width"])
        blocks += [(", ".join(found) + " bits" * (found[-1] != "dense"), words) for words, found in written.items()]
    if blocks:
        note = (
            "The likeliest 48 tokens after the text in the box. One text proves nothing; it shows the kind of failure."
        )
        yield Section("Continuations", note=note, blocks=blocks)


def _given(value: Any) -> Any:
    """Return a recipe without the keys that say nothing."""
    if isinstance(value, Mapping):
        return {key: _given(item) for key, item in value.items() if item not in (None, [], {})}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _made(facts: Facts) -> Section:
    manifest = facts.manifest
    calibration = (manifest.get("calibration") or {}).items()
    known = {
        "Dense model": f"{name_of(manifest['recipe']['model'])} (weights' SHA-256 in the manifest)",
        "Calibration text": ", ".join(f"{key} {value}" for key, value in calibration if not isinstance(value, dict)),
        "Versions": ", ".join(f"{name} {value}" for name, value in manifest["versions"].items()),
        "Format": f"{manifest['format_version']}, compress {manifest['compress_version']}",
        "Files": f"{len(manifest['files'])}, {tables.megabytes(manifest['sizes']['files'])}",
        "Kept dense": ", ".join(dict.fromkeys(manifest["not_quantised"])),
    }
    table = Table(["", ""])
    for name, value in known.items():
        table.add("fact", name, value or "none")
    recipe = yaml.safe_dump(_given(manifest["recipe"]), sort_keys=False, allow_unicode=True, width=100)
    note = f"To check the files against their digests and logits: `compress verify {facts.folder}`."
    return Section("How it was made", table, note, blocks=[("", recipe)])
