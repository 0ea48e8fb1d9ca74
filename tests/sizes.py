"""How large the library is, folder by folder, so that a change that makes it smaller can be seen.

``python tests/sizes.py`` prints files, lines, lines of code and tokens per line of code: packing lines shows in the last. With
``--against REVISION`` (``main``, say) it prints what the working tree has more or less of. ``tests/test_house.py`` holds the budgets.
"""

import argparse
import io
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "compress/cli", "compress/demo", "compress/vllm", "compress", "quant", "pruning", "prompts", "kernels", "evals/bench", "evals/experiments", "evals/grids",
    "evals", "tests",
)  # fmt: skip
"""A file belongs to the first that it lies in; what lies in none is ``other``."""
COUNTED = {tokenize.OP, tokenize.NAME, tokenize.NUMBER, tokenize.STRING}


@dataclass
class Size:
    """What some files take together; ``code`` lines are those with tokens, docstrings and comments left out."""

    files: int = 0
    lines: int = 0
    code: int = 0
    tokens: int = 0
    skips: int = 0  # of the formatter

    @property
    def density(self) -> float:
        """Tokens per line of code."""
        return self.tokens / self.code if self.code else 0.0

    def __add__(self, other: "Size") -> "Size":
        return Size(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Size") -> "Size":
        return Size(*(mine - its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def size_of(source: str) -> Size:
    """Measure one file."""
    kept, skips, start = [], 0, True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        skips += token.type == tokenize.COMMENT and token.string.startswith("# fmt: skip")
        if token.type in COUNTED and not (token.type == tokenize.STRING and start):  # a string as a statement
            kept.append(token)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = {line for token in kept for line in range(token.start[0], token.end[0] + 1)}
    return Size(1, len(source.splitlines()), len(lines), len(kept), skips)


def sources(revision: str | None) -> Iterator[tuple[str, str]]:
    """Read every Python file of the working tree, or of a revision: path and content."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    if revision is None:
        names = git("ls-files", "--cached", "--others", "--exclude-standard", "*.py").splitlines()
        yield from ((name, (ROOT / name).read_text("utf-8")) for name in names if (ROOT / name).is_file())
    else:
        names = git("ls-tree", "-r", "--name-only", revision).splitlines()
        yield from ((name, git("show", f"{revision}:{name}")) for name in names if name.endswith(".py"))


def measure(revision: str | None = None) -> dict[str, Size]:
    """Measure every folder of the working tree, or of a revision."""
    found = {folder: Size() for folder in (*FOLDERS, "other")}
    for name, source in sources(revision):
        folder = next((folder for folder in FOLDERS if name.startswith(f"{folder}/")), "other")
        found[folder] += size_of(source)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REVISION", help="print the difference to this revision")
    against = parser.parse_args().against
    now = measure()
    before = measure(against) if against else {}
    total = sum((size for folder, size in now.items() if folder != "tests"), Size())
    past = sum((size for folder, size in before.items() if folder != "tests"), Size())
    print(f"{'':18} files  lines   code tokens/line fmt: skip")
    for folder, size, old in [*((f, s, before.get(f, Size())) for f, s in now.items()), ("without tests", total, past)]:
        change, sign = (size - old, "+") if against else (size, "")
        density = size.density - old.density if against else size.density
        if any(astuple(change)):
            print(
                f"{folder:18} {change.files:{sign}5} {change.lines:{sign}6} {change.code:{sign}6} {density:{sign}11.1f} "
                f"{change.skips:{sign}9}"
            )


if __name__ == "__main__":
    main()
