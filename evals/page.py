"""Write a page of sections as HTML (inline style and SVG, no scripts, nothing fetched from outside) or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment
from markupsafe import Markup, escape

from compress.evals import plots, tables
from compress.evals.tables import Table
from compress.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """Hold a figure of a section."""

    label: str  # what it shows, in a few words; its own on a page
    draw: Callable[[], Figure]  # called only where matplotlib is installed
    caption: str = ""
    table: Table | None = None  # the same figures, shown where it is not drawn; None where the section's table has them
    file: str = ""  # name of a file beside the Markdown, where it is drawn to


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
    """Hold all that a page shows: what ``kind`` of page it is, (name, figure, words below it) to see first, what is not on it."""

    kind: str
    title: str
    sections: Sequence[Section]
    leads: Sequence[tuple[str, str, str]] = ()
    notes: Sequence[str] = ()


def html(page: Page) -> str:
    """Write a page as one HTML file (``page.html``); without matplotlib, tables stand in for its figures."""
    look, template = (
        (files("compress.evals") / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "html")
    )
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters |= {
        "words": lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))),
        "spread": lambda cell: Markup(re.sub(r"( ± .*)", r"<small>\1</small>", str(escape(cell)))),
        "svg": lambda picture: Markup(plots.svg(picture.draw(), picture.label)),
        "zip": zip,
    }
    drawn = not plots.why_not()
    return environment.from_string(template).render(page=page, style=Markup(look), drawn=drawn, version=__version__)


def markdown(page: Page, drawn: Sequence[str] = ()) -> str:
    """Write a page in Markdown, for a README or a terminal; ``drawn`` names the pictures' files that lie beside it."""
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
