"""Pages of the site that are made when it is built: files from outside docs/, every command's help, every pass's settings.

MkDocs calls the functions whose names begin with ``on_`` (``mkdocs.yml`` names this file).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from compress.cli.common import app
from compress.passes import kinds, pass_class

ROOT = Path(__file__).parents[1]
INCLUDED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "quant/FORMAT.md": "format.md",
    "findings/README.md": "findings.md",
}
"""File in the repository -> page of the site; a file that is not there makes no page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, and take absent ones out of the navigation."""
    made = {page: (ROOT / name).read_text("utf-8") for name, page in INCLUDED.items() if (ROOT / name).exists()}
    made |= {"commands.md": "\n".join(_commands()), "passes.md": "\n".join(_passes())}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    config.nav = _present(config.nav, set(INCLUDED.values()) - set(made))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site; what is no page (a source file, say) stays as text without a link."""
    home = next((name for name, made in INCLUDED.items() if made == page.file.src_uri), f"docs/{page.file.src_uri}")

    def replace(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, anchor, name = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
        there = INCLUDED.get(found, found.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            return f"`{text}`" if "/" in text and "`" not in text else text
        return f"{mark}[{text}]({posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or '.')}{anchor}{name})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)", replace, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take Sphinx's roles, which docstrings use, away from the names they stand before."""
    return re.sub(r":(?:func|class|mod|meth|attr|data):<code>~?", "<code>", html)


def _present(nav: Any, absent: set[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _present(item, absent) for title, item in nav.items()}
    if isinstance(nav, list):
        kept = [item for item in nav if not (isinstance(item, dict) and any(page in absent for page in _pages(item)))]
        return [_present(item, absent) for item in kept]
    return nav


def _pages(item: dict[str, Any]) -> list[str]:
    return [page for page in item.values() if isinstance(page, str)]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [heads, ["---"] * len(heads), *cells]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _commands() -> Iterator[str]:
    yield from ("# Commands", "", "What `compress COMMAND --help` says.", "")
    group: Any = typer.main.get_command(app)
    context = group.context_class(group, info_name="compress")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.context_class(command, info_name=name, parent=context)
        yield from (f"## compress {name}", "", cleandoc(command.help or ""), "", "```")
        yield from (f"compress {name} {' '.join(command.collect_usage_pieces(inner))}", "```", "")
        rows = []
        for parameter in command.params:
            argument = parameter.param_type_name == "argument"
            given = [parameter.metavar or parameter.name] if argument else [*parameter.opts, *parameter.secondary_opts]
            flags = ", ".join(f"`{flag}`" for flag in given)
            shown = parameter.default not in (None, False, (), []) and not callable(parameter.default)
            default = "required" if parameter.required else f"`{parameter.default}`" if shown else ""
            rows.append([flags, default, parameter.help or ""])
        yield from _table(["option", "default", "meaning"], rows)


def _passes() -> Iterator[str]:
    yield from ("# Passes and their settings", "", "What `compress passes NAME` says.", "")
    for kind in kinds():
        config = pass_class(kind).Config
        yield from (f"## {kind}", "", cleandoc(config.__doc__ or "").replace("``", "`"), "")
        rows = []
        for key, field in config.model_fields.items():
            if key != "kind":
                default = repr(field.get_default(call_default_factory=True))
                rows.append(
                    [f"`{key}`", "required" if field.is_required() else f"`{default}`", field.description or ""]
                )
        yield from _table(["key", "default", "meaning"], rows)
