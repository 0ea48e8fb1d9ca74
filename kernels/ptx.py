"""Inline PTX that turns 32 packed codes of one row into weights, and multiplies them: plain text, made by plain Python.

One piece of assembly serves the 32 columns that one word of every plane covers. Tables of at most 16 entries live in
registers, split into their low and their high bytes: ``prmt`` picks four bytes of eight by the four nibbles of its
selector, so four weights cost two look-ups (four with 16 entries), and one more ``prmt`` per pair puts the bytes together. Larger
tables live in shared memory, where lane r reads column r of the table and no two lanes meet in a bank.

Everything here is text: tests/kernels has an emulator that runs it, and ``python tests/kernels/static.py`` compiles it and
counts the machine instructions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Form = Literal["half", "single", "bfloat16"]
"""How activations come and products are added: float16 pairs in float16 chains of four; the same in float32; bfloat16
pairs in float32."""

Entries = Literal[8, 16, 32]
"""Bits of what one look-up gives: of a weight, to be converted or not, or of two neighbouring weights (:data:`PAIRED`)."""

REGISTER_BITS = 4  # of the largest table that is held in registers
PAIRED = 4  # bits whose table may also lie in shared memory, with an entry for every two codes
SHARED_ROWS = 32  # rows of one table in shared memory, one to a bank
SHARED_STRIDE = 4 * SHARED_ROWS  # bytes from one entry to the next
TABLE = "compress_table"  # the array's name in the assembly
_SELECT, _MASK_OR = 0xE4, 0xEC  # lop3 of (a, b, c): (a & c) | (b & ~c), and (a & c) | b


@dataclass(frozen=True)
class Assembly:
    """Hold what ``tl.inline_asm_elementwise`` takes."""

    text: str  # the instructions; ``$i`` are outputs, then inputs
    constraints: str  # one letter per operand


class _Writer:
    """Collect instructions and name registers."""

    def __init__(self, outputs: int) -> None:
        self.lines: list[str] = []
        self.words, self.floats, self.halves = 0, 0, 0
        self.operands = outputs

    def input(self) -> str:
        """Name the next input operand."""
        self.operands += 1
        return f"${self.operands - 1}"

    def inputs(self, count: int) -> list[str]:
        """Name the next so many input operands."""
        return [self.input() for _ in range(count)]

    def word(self, operation: str, *sources: str | int) -> str:
        """Write an operation with a 32-bit result."""
        self.words += 1
        return self._write(f"w{self.words - 1}", operation, sources)

    def float(self, operation: str, *sources: str | int) -> str:
        """Write an operation with a float32 result."""
        self.floats += 1
        return self._write(f"f{self.floats - 1}", operation, sources)

    def _write(self, register: str, operation: str, sources: tuple[str | int, ...]) -> str:
        given = ", ".join(source if isinstance(source, str) else f"0x{source:x}" for source in sources)
        self.lines.append(f"{operation} {register}, {given};")
        return register

    def shift(self, register: str, right: int) -> str:
        """Shift right, or left if negative."""
        if right == 0:
            return register
        return self.word("shr.u32", register, right) if right > 0 else self.word("shl.b32", register, -right)

    def select(self, a: str, b: str, mask: int) -> str:
        """Take the bits of ``a`` where the mask is one, of ``b`` elsewhere."""
        return self.word("lop3.b32", a, b, mask, _SELECT)

    def both(self, pair: str) -> tuple[str, str]:
        """Split a word into two float16 registers."""
        self.halves += 2
        names = f"h{self.halves - 2}", f"h{self.halves - 1}"
        self.lines.append(f"mov.b32 {{{names[0]}, {names[1]}}}, {pair};")
        return names

    def finish(self, results: list[str], kind: str, inputs: str) -> Assembly:
        """Move results to the outputs and close the block."""
        moves = [f"mov.b32 ${place}, {result};" for place, result in enumerate(results)]
        declared = [
            f".reg .{kind_} {prefix}<{count}>;"
            for kind_, prefix, count in (("b32", "w", self.words), ("f32", "f", self.floats), ("b16", "h", self.halves))
            if count
        ]
        text = "\n".join(["{", *declared, *self.lines, *moves, "}"])
        return Assembly(text, ",".join([f"={kind}"] * len(results) + [inputs]))


def _crumbs(w: _Writer, low: str, high: str | None) -> tuple[str, str]:
    """Turn two planes into two words of 2-bit fields: field f of word j has column bit 4 * (f // 2) + 2 * (f % 2) + j."""
    if high is None:
        return w.word("and.b32", low, 0x55555555), w.word("and.b32", w.shift(low, 1), 0x55555555)
    return w.select(low, w.shift(high, -1), 0x55555555), w.select(w.shift(low, 1), high, 0x55555555)


def _nibbles(w: _Writer, planes: list[str], crumbs: list[str]) -> list[str]:
    """Turn up to four planes, the first two perhaps as crumbs already, into four words of eight nibbles.

    Nibble i of word j belongs to column 8 j + i; plane t becomes its bit t.
    """
    if len(planes) == 1 and not crumbs:
        return [w.word("and.b32", w.shift(planes[0], j), 0x11111111) for j in range(4)]
    low = crumbs or list(_crumbs(w, planes[0], planes[1]))
    rest = planes if crumbs else planes[2:]
    if not rest:
        return [w.word("and.b32", w.shift(low[j % 2], 2 * (j // 2)), 0x33333333) for j in range(4)]
    high = _crumbs(w, rest[0], rest[1] if len(rest) > 1 else None)
    words = [
        (w.select(a, w.shift(b, -2), 0x33333333), w.select(w.shift(a, 2), b, 0x33333333))
        for a, b in zip(low, high, strict=True)
    ]
    return [words[0][0], words[1][0], words[0][1], words[1][1]]


def _first_nibbles(w: _Writer, head: int, codes: list[str], planes: int) -> list[str]:
    """Make nibble words of the first so many planes."""
    if head == 4:
        return codes[:4]
    if head == 2:
        return _nibbles(w, codes[2:planes], codes[:2])
    return _nibbles(w, codes[:planes], [])


def _four_bytes(w: _Writer, table: list[str], selector: str, chooser: str | None) -> str:
    """Look up four bytes of a table of up to 16, by the low four nibbles of a selector word."""
    found = w.word("prmt.b32", table[0], table[1 % len(table)], selector)
    if chooser is None:
        return found
    # the other eight entries, and one of the two byte by byte
    return w.word("prmt.b32", found, w.word("prmt.b32", table[2], table[3], selector), chooser)


def _pairs_of_eight(w: _Writer, entries: Entries, tables: list[str], selector: str, chooser: str | None) -> list[str]:
    """Make four words of two 16-bit weights each, for the eight nibbles of a selector word."""
    size = len(tables) // 2 if entries == 16 else len(tables) - 2
    pairs = []
    for part in range(2):
        if part:
            selector = w.shift(selector, 16)
            chooser = chooser and w.shift(chooser, 16)
        low = _four_bytes(w, tables[:size], selector, chooser)
        if entries == 16:
            high = _four_bytes(w, tables[size:], selector, chooser)
            pairs += [w.word("prmt.b32", low, high, order) for order in (0x5140, 0x7362)]
        else:  # float16 with the high byte 0x64 is 1024 more than its low byte
            wide = [w.word("prmt.b32", low, 0x64646464, order) for order in (0x4140, 0x4342)]
            pairs += [w.word("fma.rn.f16x2", pair, *tables[size:]) for pair in wide]
    return pairs


def _register_weights(
    w: _Writer, bits: int, head: int, entries: Entries, codes: list[str], tables: list[str]
) -> list[str]:
    """Make 16 words of two 16-bit weights, in the order of the columns, from tables in registers."""
    if bits < 4:
        nibbles = _first_nibbles(w, head, codes, bits)
        return [pair for word in nibbles for pair in _pairs_of_eight(w, entries, tables, word, None)]
    pairs = []
    identity = w.word("mov.b32", 0x32103210)
    nibbles = _first_nibbles(w, head, codes, 4 if head == 4 else 3)
    for j, word in enumerate(nibbles):
        top = w.shift(word, 1) if head == 4 else w.shift(codes[3], j - 2)
        chooser = w.word("lop3.b32", top, identity, 0x44444444, _MASK_OR)
        selector = w.word("and.b32", word, 0x77777777) if head == 4 else word
        pairs += _pairs_of_eight(w, entries, tables, selector, chooser)
    return pairs


def _shared_weights(w: _Writer, bits: int, head: int, codes: list[str], row: str) -> list[str]:
    """Make 32 float32 weights, in the order of the columns, from a table in shared memory whose column begins at ``row``."""
    first = _first_nibbles(w, head, codes, 4)
    second = _nibbles(w, codes[4:bits], [])
    weights = []
    for a, b in zip(first, second, strict=True):
        even = w.select(a, w.shift(b, -4), 0x0F0F0F0F)  # bytes of columns 0, 2, 4, 6
        odd = w.select(w.shift(a, 4), b, 0x0F0F0F0F)
        for byte in range(4):
            for word in (even, odd):
                code = w.word("bfe.u32", word, 8 * byte, 8)
                address = w.word("mad.lo.u32", code, SHARED_STRIDE, row)
                weights.append(w.float("ld.shared.f32", f"[{address}]"))
    return weights


def _paired_weights(w: _Writer, head: int, codes: list[str], row: str) -> list[str]:
    """Make 16 words of two 16-bit weights, by two neighbouring nibbles at a time from a table in shared memory.

    One load for two weights, with its address: no register holds a table, and nothing is put together.
    """
    pairs = []
    for word in _first_nibbles(w, head, codes, 4):
        for byte in range(4):
            address = w.word("mad.lo.u32", w.word("bfe.u32", word, 8 * byte, 8), SHARED_STRIDE, row)
            pairs.append(w.word("ld.shared.b32", f"[{address}]"))
    return pairs


def table_words(bits: int, entries: Entries) -> int:
    """Count the inputs of the assembly that say what codes mean."""
    if bits > REGISTER_BITS:
        return 1
    return {8: (1 << bits) // 4 + 2, 16: (1 << bits) // 2, 32: 1}[entries]


def _singles(w: _Writer, pairs: list[str], form: Form) -> list[str]:
    """Turn words of two 16-bit numbers into float32 registers."""
    singles = []
    for pair in pairs:
        if form == "bfloat16":
            low, high = w.word("shl.b32", pair, 16), w.word("and.b32", pair, 0xFFFF0000)
            singles += [w.float("mov.b32", low), w.float("mov.b32", high)]
        else:
            singles += [w.float("cvt.f32.f16", half) for half in w.both(pair)]
    return singles


def _dot_halves(w: _Writer, pairs: list[str], x: list[str]) -> str:
    """Add up 32 products: chains of four in float16, two to a word; their sums in float32."""
    parts = []
    for start in range(0, 16, 4):
        total = w.word("mul.rn.f16x2", pairs[start], x[start])
        for place in range(start + 1, start + 4):
            total = w.word("fma.rn.f16x2", pairs[place], x[place], total)
        parts += [w.float("cvt.f32.f16", half) for half in w.both(total)]
    while len(parts) > 1:
        parts = [w.float("add.f32", a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _dot_singles(w: _Writer, weights: list[str], x: list[str]) -> str:
    """Add up 32 products in float32, in four chains."""
    chains = []
    for start in range(4):
        total = w.float("mul.f32", weights[start], x[start])
        for place in range(start + 4, 32, 4):
            total = w.float("fma.rn.f32", weights[place], x[place], total)
        chains.append(total)
    return w.float("add.f32", w.float("add.f32", *chains[:2]), w.float("add.f32", *chains[2:]))


@cache
def product(bits: int, head: int, rows: int, form: Form, entries: Entries = 16) -> Assembly:
    """Multiply 32 weights of 2 to 8 ``bits`` with 32 activations of each of so many rows, to float32 sums.

    Inputs: ``bits`` words of codes, the first ``head`` planes together; the tables (low bytes, then high bytes, four to a
    word; with ``entries`` of 8 bits those bytes, then the factor and the summand that make 1024 + entry a weight, twice each)
    or, above 4 bits and for pairs, the address of the row's column in shared memory; 16 words of activations, two to a word,
    for every row.
    """
    w = _Writer(rows)
    codes, tables = w.inputs(bits), w.inputs(table_words(bits, entries))
    x = [w.inputs(16) for _ in range(rows)]
    if bits <= REGISTER_BITS:
        if entries == 32:
            pairs = _paired_weights(w, head, codes, tables[0])
        else:
            pairs = _register_weights(w, bits, head, entries, codes, tables)
        if form == "half":
            sums = [_dot_halves(w, pairs, row) for row in x]
        else:
            weights = _singles(w, pairs, "single")
            sums = [_dot_singles(w, weights, _singles(w, row, form)) for row in x]
    else:
        weights = _shared_weights(w, bits, head, codes, tables[0])
        sums = [_dot_singles(w, weights, _singles(w, row, form)) for row in x]
    return w.finish(sums, "f", ",".join(["r"] * (w.operands - rows)))


@cache
def weights(
    bits: int, head: int, kind: Literal["fp16", "bf16"], entries: Entries = 16, final: bool = False
) -> Assembly:
    """Look 32 weights up: 16 words of two each, in the order of the columns.

    Inputs as for :func:`product` without the activations; tables in registers hold entries of that kind already, and those with
    entries of 8 bits give float16. With ``final`` one more input, a number of their kind twice, multiplies all of them.
    """
    w = _Writer(16)
    codes, tables = w.inputs(bits), w.inputs(table_words(bits, entries))
    if bits <= REGISTER_BITS:
        pairs = _register_weights(w, bits, head, entries, codes, tables)
    else:
        singles = _shared_weights(w, bits, head, codes, tables[0])
        name = f"cvt.rn.{'f16x2' if kind == 'fp16' else 'bf16x2'}.f32"
        pairs = [w.word(name, high, low) for low, high in zip(singles[::2], singles[1::2], strict=True)]
    if final:
        factor = w.input()
        if kind == "fp16":
            pairs = [w.word("mul.rn.f16x2", pair, factor) for pair in pairs]
        else:  # what there is before sm_90 in place of a multiplication: with -0 added
            nothing = w.word("mov.b32", 0x80008000)
            pairs = [w.word("fma.rn.bf16x2", pair, factor, nothing) for pair in pairs]
    return w.finish(pairs, "r", ",".join(["r"] * (w.operands - 16)))


@cache
def activations() -> Assembly:
    """Load 32 consecutive 16-bit activations as 16 words. Input: the address of the first, a multiple of 16 bytes."""
    loads = [
        f"ld.global.nc.v4.b32 {{${4 * i}, ${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}}}, [$16+{16 * i}];" for i in range(4)
    ]
    return Assembly("\n".join(loads), ",".join(["=r"] * 16 + ["l"]))


@cache
def stored(bits: int, head: int, kind: Literal["fp16", "bf16"], entries: Entries = 16) -> Assembly:
    """Look 32 weights up as :func:`weights` does, final, and write them to an address, a multiple of 16 bytes, the last input.

    The output means nothing.
    """
    made = weights(bits, head, kind, entries, entries == 8)
    inputs = made.constraints.split(",")[16:]
    text = re.sub(r"\$(\d+)", lambda found: f"o{n}" if (n := int(found[1])) < 16 else f"${n - 15}", made.text)
    address = f"${len(inputs) + 1}"
    writes = [
        f"st.global.v4.b32 [{address}+{16 * i}], {{o{4 * i}, o{4 * i + 1}, o{4 * i + 2}, o{4 * i + 3}}};"
        for i in range(4)
    ]
    lines = ["{", ".reg .b32 o<16>;", text, *writes, "mov.b32 $0, 0;", "}"]
    return Assembly("\n".join(lines), ",".join(["=r", *inputs, "l"]))


@cache
def reserve(bits: int, tiles: int = 1, entries: Entries = 16) -> Assembly:
    """Make tables of so many tiles in shared memory; give their address. Input: anything (the instruction needs one)."""
    size = 2 ** (2 * bits if entries == 32 else bits)
    text = f".shared .align 128 .b8 {TABLE}[{tiles * size * SHARED_STRIDE}];\nmov.u32 $0, {TABLE};"
    return Assembly(text, "=r,r")


@cache
def put() -> Assembly:
    """Store one float32 entry at an address in shared memory. The output means nothing."""
    return Assembly("st.shared.f32 [$1], $2;\nmov.b32 $0, 0;", "=r,r,f")
