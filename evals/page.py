"""The report as one HTML page: inline style and SVG, no scripts, nothing fetched from outside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from compress.evals import svg, tables
from compress.evals.gather import Facts
from compress.evals.tables import Table
from compress.version import __version__

_FLOOR = 1e-5  # relative added loss below which a point sits on the lower edge of the plot


def page(facts: Facts) -> str:
    """The whole page."""
    sections = [
        _quality(facts), _tasks(facts), _agreement(facts), _speed(facts), _errors(facts), _zeros(facts), _sizes(facts),
        *(_matrix(item) for item in facts.matrices), _samples(facts), _made(facts),
    ]  # fmt: skip
    return document(f"{title(facts)} · compress report", _head(facts) + "".join(sections))


def document(name: str, body: str) -> str:
    """A page around a body."""
    style = files("compress.evals").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(name)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style>\n</head>\n'
        f"<body><main>\n{body}\n<footer>Written by compress {__version__}. Every figure is a measurement kept in "
        "<code>report/results.jsonl</code>.</footer>\n</main></body>\n</html>\n"
    )


def title(facts: Facts) -> str:
    """Model and passes."""
    recipe = facts.manifest["recipe"]
    steps = " → ".join(step["kind"].replace("_", " ") for step in recipe["passes"])
    return f"{Path(recipe['model']).name} → {steps}" if steps else Path(recipe["model"]).name


def _head(facts: Facts) -> str:
    return (
        f'<header><p class="kicker">Compression report</p><h1>{escape(title(facts))}</h1>'
        f'<dl class="lead">{"".join(_leads(facts))}</dl></header>'
        + "".join(f'<p class="note">{escape(note)}</p>' for note in facts.notes)
    )


def _lead(name: str, value: str, small: str = "") -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"


def _leads(facts: Facts) -> Iterable[str]:
    """The four figures a reader wants first, at the width nearest to 4."""
    at = facts.inspected["bytes_at_bits"]
    if at:
        yield _lead("One checkpoint", f"{min(map(int, at))} to {max(map(int, at))} bits", tables.megabytes(facts.inspected["bytes"]) + " of tensors in all")  # fmt: skip
    width = showcase(facts)
    size = facts.bytes_at(width)
    share = f"{size / facts.dense_bytes:.2f} of the dense {tables.megabytes(facts.dense_bytes)}" if size and facts.dense_bytes else ""  # fmt: skip
    yield _lead(f"Read at {tables.label(width)}" if width != "dense" else "Size", tables.megabytes(size), share)
    if facts.texts:
        rows = facts.texts[0]["rows"]
        here, dense = rows.get((width, None)), rows.get(("dense", None))
        if here and dense and width != "dense":
            change = 100 * (here["loss"] / dense["loss"] - 1)
            perplexities = f"perplexity {here['perplexity']:.4g}, dense {dense['perplexity']:.4g}"
            yield _lead(f"Loss at {tables.label(width)}", f"{change:+.2f} %", perplexities)
    if facts.bench and width in facts.bench["widths"]:
        figures = facts.bench["widths"][width]
        ratio = figures.get("decode_versus_dense")
        small = f"{ratio['median']:.2f} × dense" if ratio else ""
        speed = tables.plain(figures["decode_tokens_per_second"]["median"])
        yield _lead(f"Decoding at {tables.label(width)}", f"{speed} tok/s", small)


def showcase(facts: Facts) -> str:
    """The width that headlines are about: 4, or the nearest there is."""
    whole = [width for width in facts.widths if width.isdigit()]
    return min(whole, key=lambda width: (abs(int(width) - 4), width)) if whole else "dense"


def section(name: str, *parts: str) -> str:
    """A heading and what is under it; nothing if there is nothing."""
    return f"<section><h2>{escape(name)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def html_table(table: Table) -> str:
    """A table whose rows bear their kind; ± and what follows it is smaller."""
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = ""
    for kind, cells in zip(table.kinds, table.rows, strict=True):
        shown = "".join(f"<td>{_small_spread(escape(cell))}</td>" for cell in cells)
        rows += f'<tr class="{kind}">{shown}</tr>'
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _small_spread(cell: str) -> str:
    return re.sub(r"( ± .*)$", r"<small>\1</small>", cell)


def figure(picture: str, caption: str) -> str:
    """A plot and the words below it."""
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _quality(facts: Facts) -> str:
    parts: list[str] = []
    for text in facts.texts:
        parts += [f'<p class="note">{protocol_words(text)}</p>', html_table(tables.quality(facts, text))]
        lines = pareto_lines(facts, text)
        if sum(len(line.points) for line in lines) > 1 and ("dense", None) in text["rows"]:
            caption = (
                "Loss added to the dense model's, against the bytes of the tensors that loading at a width reads from the files. "
                "Both axes are logarithmic; a point on the lower edge is at or below the dense model's loss."
            )
            if not any(line.control for line in lines):
                caption += (
                    " No controls were measured: <code>compress report --controls</code> makes and measures them."
                )
            else:
                caption += " Dashed: controls, each point a checkpoint of its own; the solid line is one checkpoint."
            parts.append(figure(pareto(lines), caption))
    return section("Quality at every width", *parts)


def protocol_words(text: Mapping[str, Any]) -> str:
    """What was measured, and how, in a sentence."""
    settings, metrics = text["settings"], next(iter(text["rows"].values()))
    protocol = settings.get("protocol", {})
    name = "held-out modules of the standard library" if text["name"] == "builtin" else Path(text["name"]).name
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
    return (
        f"{escape(name)}: {metrics['tokens']:,} predicted tokens, {metrics['bytes']:,} bytes; {how}{documents}; "
        f"{escape(str(settings.get('dtype', '')))}. Every token is scored once; virtual tokens are never scored. "
        f"SHA\u2011256 {escape(str(settings.get('sha256', ''))[:12])}…; the checkpoint was not calibrated on this text."
    )


def added(loss: float, dense: float) -> float:
    """Loss above the dense model's, as a share of it, at least the floor of the plot."""
    return max(loss / dense - 1, _FLOOR)


def pareto_lines(facts: Facts, text: Mapping[str, Any]) -> list[svg.Line]:
    """The checkpoint's widths, with and without prompts, and its controls."""
    rows = text["rows"]
    dense = rows.get(("dense", None))
    if dense is None:
        return []
    lines = []
    for prompt in sorted({prompt for _, prompt in rows}, key=lambda prompt: prompt or ""):
        points = [
            _point(width, facts.bytes_at(width), rows[width, prompt]["loss"], dense["loss"])
            for width in facts.widths
            if (width, prompt) in rows and width != "dense" and facts.bytes_at(width)
        ]
        if points:
            lines.append(svg.Line(prompt or "this checkpoint", points))
    for name, found in tables.control_points(facts, text).items():
        points = [_point(width, size, loss, dense["loss"]) for width, size, loss in found]
        lines.append(svg.Line(f"control: {name}", points, control=True))
    return lines


def _point(width: str, size: float | None, loss: float, dense: float) -> svg.Point:
    share = added(loss, dense)
    words = f"{tables.label(width)}: {tables.megabytes(size)}, loss {100 * (loss / dense - 1):+.3f} %"
    return svg.Point((size or 0) / 1e6, 100 * share, width, words)


def pareto(lines: Sequence[svg.Line], name: str = "loss above the dense model's, %") -> str:
    """Size across, added loss up."""
    x = svg.axis("MB read", [point.x for line in lines for point in line.points], True)
    y = svg.axis(name, [point.y for line in lines for point in line.points], True)
    return svg.scatter(lines, x, y, "Added loss against size, one point per width")


def _tasks(facts: Facts) -> str:
    if not facts.tasks:
        return ""
    sizes = ", ".join(f"{escape(name)} {next(iter(rows.values()))['n']} items" for name, rows in facts.tasks.items())
    chance = " The built-in tasks have four choices, so chance is 0.25." if any(n.startswith("builtin_") for n in facts.tasks) else ""  # fmt: skip
    note = (
        f"lm-eval, in process; {sizes}; ± is one standard error.{chance} “Answers changed” counts items whose chosen answer is not the "
        "dense model’s, right or wrong; calibration error (ece) is of the softmax over the choices."
    )
    return section("Tasks", html_table(tables.tasks(facts)), f'<p class="note">{note}</p>')


def _agreement(facts: Facts) -> str:
    if not facts.agreement and not facts.robustness:
        return ""
    note = (
        "Token by token over the same text. KL: mean Kullback-Leibler divergence from the dense model’s next-token "
        "distribution. Right ↔ wrong: share of tokens where just one of the two models’ likeliest token is right. Calibration "
        "error: of the likeliest token’s probability, in 15 bins. Typos: two inner letters swapped in 5 % of the words of four letters or more."
    )
    return section(
        "How alike it is to the dense model",
        html_table(tables.agreement(facts.agreement, facts.robustness)),
        f'<p class="note">{note}</p>',
    )


def _speed(facts: Facts) -> str:
    found = facts.bench
    if found is None:
        return ""
    load = found["load"]
    clock = "processor time on one thread" if found["threads"] == 1 and "GPU" not in found["device"] else "wall time"
    note = (
        f"{escape(found['device'])}, {found['threads']} thread{'s' if found['threads'] != 1 else ''}, {found['dtype']}, batch of one, "
        f"prompt of {load['prompt']} tokens, {load['tokens']} decoded, {load['rounds']} rounds with all candidates in turn; {clock}. "
        "± is half the distance between the quartiles. Loading and resident memory: fresh processes, memory above what it was before "
        f"loading. Backend: {escape(found['backend'])}."
    )
    if found["dense"].startswith("not measured"):
        note += f" The dense model was {escape(found['dense'])}."
    rows = [
        (width, *(figures["decode_tokens_per_second"][name] for name in ("median", "low", "high")))
        for width, figures in found["widths"].items()
    ]
    base = found["widths"].get("dense", {}).get("decode_tokens_per_second", {}).get("median")
    picture = svg.bars(rows, "Tokens per second when decoding, by width", tables.plain, base)
    caption = "Decoding, tokens per second; the whisker spans the quartiles, the dotted line is the dense model."
    return section(
        "Speed and memory", html_table(tables.speed(found)), f'<p class="note">{note}</p>', figure(picture, caption)
    )


def _grid(values: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Module names to (linear kinds, blocks, matrix): the first number in a name is its block."""
    parts = {name: re.match(r"(.*?)(\d+)\.(.*)", name) for name in values}
    inside = {name: found for name, found in parts.items() if found}
    blocks = sorted({int(found[2]) for found in inside.values()})
    kinds = list(dict.fromkeys(found[3] for found in inside.values()))
    places = {(found[3], int(found[2])): values[name] for name, found in inside.items()}
    matrix = [[places.get((kind, block)) for block in blocks] for kind in kinds]
    return tables.names_of(kinds), [str(block) for block in blocks], matrix


def _errors(facts: Facts) -> str:
    modules = facts.inspected["modules"]
    widths = [width for width in facts.widths if any(width in module["errors"] for module in modules.values())]
    if not widths:
        return ""
    first = showcase(facts)
    picked = [width for width in dict.fromkeys([widths[-1], first if first in widths else widths[0]]) if width]
    panels = []
    for width in picked:
        errors = {
            name: module["errors"][width].get("output", module["errors"][width].get("relative"))
            for name, module in modules.items()
            if width in module["errors"]
        }
        kinds, blocks, matrix = _grid({name: value for name, value in errors.items() if value is not None})
        picture = svg.heat_map(
            matrix, kinds, blocks, f"Relative squared error at {width} bits", log=True, form=_short, axes=("", "block")
        )
        panels.append(figure(picture, f"<b>{width} bits</b>"))
    note = (
        "Relative squared error of each matrix (of its output on calibration text, where the pass measured that; else of its weights), "
        "as recorded when the checkpoint was made. Darker is more, on a logarithmic scale of its own in each panel."
    )
    return section("Where the error is", f'<div class="panels">{"".join(panels)}</div>', f'<p class="note">{note}</p>')


def _short(value: float) -> str:
    """Two figures, short enough for a cell: 0.012, 3e-5."""
    text = f"{value:.1e}" if value < 1e-2 else f"{value:.2g}"
    return text.replace("e-0", "e-").replace(".0e", "e")


def _zeros(facts: Facts) -> str:
    if facts.sparsity is None:
        return ""
    shares = {name: 100 * counted["sparsity"] for name, counted in facts.sparsity["linears"].items()}
    kinds, blocks, matrix = _grid(shares)
    whole = [100 * counted["sparsity"] for counted in facts.sparsity["blocks"].values()]
    form: Callable[[float], str] = lambda value: f"{value:.0f}"  # noqa: E731
    picture = svg.heat_map(
        [*matrix, [*whole]],
        [*kinds, "all"],
        blocks,
        "Share of zeros in each matrix",
        form=form,
        axes=("", "block"),
        limits=(0, 100),
    )
    caption = (
        f"Zeros in %, counted in the files: {facts.sparsity['zeros']:,} of {facts.sparsity['parameters']:,} weights in the blocks. "
        "A mask alone makes nothing faster; what it saves on disk is in the sizes above."
    )
    return section("Allocation per block", figure(picture, caption))


def _sizes(facts: Facts) -> str:
    if not facts.kept:
        return ""
    kinds, blocks, matrix = _grid({name: 100 * share for name, share in facts.kept.items()})
    form: Callable[[float], str] = lambda value: f"{value:.0f}"  # noqa: E731
    picture = svg.heat_map(
        matrix, kinds, blocks, "Share of weights left in each matrix", form=form, axes=("", "block"), limits=(0, 100)
    )
    caption = (
        "Weights that each matrix has left, in % of the dense model's matrix of that name: these are gone, not zero."
    )
    return section("Sizes per block", figure(picture, caption))


def _matrix(item: Mapping[str, Any]) -> str:
    axes = (str(item.get("row_axis", "")), str(item.get("column_axis", "")))
    picture = svg.heat_map(
        item["values"], [*map(str, item["rows"])], [*map(str, item["columns"])], item["title"],
        form=lambda value: f"{value:.4g}", axes=axes,
    )  # fmt: skip
    return section(str(item["title"]), figure(picture, escape(str(item.get("caption", "Darker is more.")))))


def _samples(facts: Facts) -> str:
    parts = []
    order = ["dense", *facts.widths]
    for prompt in dict.fromkeys(sample["prompt"] for sample in facts.samples):
        mine = [sample for sample in facts.samples if sample["prompt"] == prompt]
        parts.append(f"<pre>{escape(prompt)}</pre>")
        written: dict[str, list[str]] = {}  # the same words at several widths are shown once
        for sample in sorted(mine, key=lambda s: order.index(s["width"]) if s["width"] in order else 99):
            written.setdefault(sample["text"], []).append(sample["width"])
        for words, widths in written.items():
            label = ", ".join(widths) + (" bits" if widths[-1] != "dense" else "")
            parts.append(f'<div class="sample"><div class="label">{label}</div><pre>{escape(words)}</pre></div>')
    note = '<p class="note">The likeliest 48 tokens after the text in the grey box. One text proves nothing; it shows the kind of failure.</p>'
    return section("Continuations", *parts, note) if parts else ""


def given(value: Any) -> Any:
    """A recipe without the keys that say nothing."""
    if isinstance(value, Mapping):
        return {key: given(item) for key, item in value.items() if item not in (None, [], {})}
    return [given(item) for item in value] if isinstance(value, list) else value


def _made(facts: Facts) -> str:
    manifest = facts.manifest
    recipe = given(manifest["recipe"])
    calibration = manifest.get("calibration") or {}
    facts_list = {
        "Dense model": f"{manifest['recipe']['model']} (weights' SHA-256 in the manifest)",
        "Calibration text": ", ".join(f"{key} {value}" for key, value in calibration.items() if not isinstance(value, dict)) or "none",
        "Versions": ", ".join(f"{name} {value}" for name, value in manifest["versions"].items()),
        "Format": f"{manifest['format_version']}, compress {manifest['compress_version']}",
        "Files": f"{len(manifest['files'])}, {tables.megabytes(manifest['sizes']['files'])}",
        "Kept dense": ", ".join(dict.fromkeys(manifest["not_quantised"])) or "nothing",
    }  # fmt: skip
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts_list.items())
    written = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    return section(
        "How it was made", f'<dl class="facts">{rows}</dl>', f"<pre>{escape(written)}</pre>",
        f'<p class="note">To check the files against their digests and logits: <code>compress verify {escape(str(facts.folder))}</code>.</p>',
    )  # fmt: skip
