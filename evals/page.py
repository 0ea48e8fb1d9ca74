"""Write a page of sections as HTML (inline style and SVG, no scripts, nothing fetched from outside) or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from compress.evals import plots, tables
from compress.evals.tables import Table
from compress.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """Hold a figure of a section.

    Attributes:
        label: what it shows, in a few words; its own on a page.
        draw: draws it; called only where matplotlib is installed.
        caption: below it.
        table: the same figures, shown where it is not drawn; None where the section's table has them.
        file: name of a file beside the Markdown, where it is drawn to; "" for none.
    """

    label: str
    draw: Callable[[], Figure]
    caption: str = ""
    table: Table | None = None
    file: str = ""


@dataclass(frozen=True)
class Section:
    """Hold a heading and what is under it, in this order; words between backticks are code; ``blocks`` are (label, text)."""

    title: str
    table: Table | None = None
    note: str = ""
    pictures: Sequence[Picture] = ()
    blocks: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """Hold all that a page shows.

    Attributes:
        kind: what sort of page, above the title.
        title: of the page.
        sections: in order.
        leads: figures to see first, (name, figure, words below it).
        notes: what is not on the page, and why.
    """

    kind: str
    title: str
    sections: Sequence[Section]
    leads: Sequence[tuple[str, str, str]] = ()
    notes: Sequence[str] = ()


def html(page: Page) -> str:
    """Write a page as one HTML file; without matplotlib, tables stand in for its figures."""
    drawn = not plots.why_not()
    style = files("compress.evals").joinpath("page.css").read_text(encoding="utf-8")
    leads = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, value, small in page.leads
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(page.title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style>\n</head>\n'
        f'<body><main>\n<header><p class="kicker">{escape(page.kind)}</p><h1>{escape(page.title)}</h1>'
        + (f'<dl class="lead">{leads}</dl>' if leads else "")
        + "</header>\n"
        + "".join(f'<p class="note">{_words(note)}</p>\n' for note in page.notes)
        + "".join(_html_section(section, drawn) for section in page.sections)
        + f"<footer>Written by compress {__version__}. Every figure is a measurement kept in "
        "<code>report/results.jsonl</code>.</footer>\n</main></body>\n</html>\n"
    )


def _html_section(section: Section, drawn: bool) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.table:
        parts.append(_html_table(section.table))
    if section.note:
        parts.append(f'<p class="note">{_words(section.note)}</p>')
    figures = [_html_picture(picture, drawn) for picture in section.pictures if drawn or picture.table]
    parts += ['<div class="panels">', *figures, "</div>"] if drawn and len(figures) > 1 else figures
    for label, text in section.blocks:
        shown = f"<pre>{escape(text)}</pre>"
        parts.append(f'<div class="sample"><div class="label">{escape(label)}</div>{shown}</div>' if label else shown)
    return f"<section>{''.join(parts)}</section>\n"


def _html_picture(picture: Picture, drawn: bool) -> str:
    figure = plots.svg(picture.draw(), picture.label) if drawn else _html_table(picture.table or Table([]))
    return f"<figure>{figure}<figcaption>{_words(picture.caption)}</figcaption></figure>"


def _html_table(table: Table) -> str:
    """Write a table whose rows bear their kind; ± and what follows it is smaller."""
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = ""
    for kind, cells in zip(table.kinds, table.rows, strict=True):
        rows += f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    rows = re.sub(r"( ± [^<]*)</td>", r"<small>\1</small></td>", rows)
    head = f"<thead><tr>{heads}</tr></thead>" if any(table.heads) else ""
    return f'<div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>'


def _words(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def markdown(page: Page, drawn: Sequence[str] = ()) -> str:
    """Write a page in Markdown, for a README or a terminal.

    Args:
        page: what to show.
        drawn: names of the pictures' files that lie beside it.
    """
    parts = [f"# {page.title}", *page.notes]
    if page.leads:
        parts.append(
            "\n".join(f"* {name}: **{value}**" + f" ({small})" * bool(small) for name, value, small in page.leads)
        )
    for section in page.sections:
        parts += [f"## {section.title}", tables.markdown(section.table) if section.table else "", section.note]
        for one in section.pictures:
            if one.file in drawn:
                parts += [f"![{one.label}]({one.file})", one.caption]
            elif one.table:
                parts += [one.caption, tables.markdown(one.table)]
        for label, text in section.blocks:
            parts += [label and f"{label}:", f"```\n{text.rstrip()}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"
