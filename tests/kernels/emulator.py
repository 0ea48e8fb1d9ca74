"""Runs the few PTX instructions that the kernels' assembly uses, for many lanes at once, on numpy.

Registers hold uint32 (float registers: the bits of a float32; 16-bit registers: of a float16). Shared and global memory are arrays
of bytes. An instruction that is not here is a KeyError.
"""

import re

import numpy as np

FULL = np.uint32(0xFFFFFFFF)


def as_float(bits):
    return bits.astype(np.uint32).view(np.float32)


def as_bits(values):
    return values.astype(np.float32).view(np.uint32)


def pair(bits):
    """A word as two float16 numbers, in float64."""
    return np.ascontiguousarray(bits.astype(np.uint32)).view(np.float16).reshape(-1, 2).astype(np.float64)


def from_pair(values):
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(np.float16)).view(np.uint32).reshape(-1)


def bfloat16(values):
    """float32 to the 16 bits of the nearest bfloat16, ties to even."""
    bits = as_bits(values).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)


def bfloat16_pair(a, b, c):
    """The products of two pairs and a third pair added, rounded once."""
    halves = []
    for shift in (0, 16):
        x, y, z = (as_float(word >> np.uint32(shift) << np.uint32(16)).astype(np.float64) for word in (a, b, c))
        halves.append(bfloat16(x * y + z))  # a product of two has 16 bits, so float32 holds it
    return halves[1] << np.uint32(16) | halves[0]


def prmt(a, b, selector):
    """Byte i of the result is the one of the eight that nibble i names; bit 3 of a nibble replicates its sign."""
    together = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros_like(a)
    for place in range(4):
        nibble = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = ((together >> (np.uint64(8) * (nibble & 7).astype(np.uint64))) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 0x80, np.uint32(255), np.uint32(0))
        result |= np.where(nibble & 8, sign, byte) << np.uint32(8 * place)
    return result


def lop3(a, b, c, table):
    """Bit by bit, the entry of the table that the three bits choose."""
    result = np.zeros_like(a)
    for index in range(8):
        if (int(table[0]) >> index) & 1:
            terms = [source if (index >> shift) & 1 else ~source for source, shift in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


OPERATIONS = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: (a << b) & FULL,
    "shr.u32": lambda a, b: a >> b,
    "bfe.u32": lambda a, start, length: (a >> start) & ((np.uint32(1) << length) - np.uint32(1)),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "mul.rn.f16x2": lambda a, b: from_pair(pair(a) * pair(b)),
    "fma.rn.f16x2": lambda a, b, c: from_pair(pair(a) * pair(b) + pair(c)),  # exact in float64, rounded once
    "fma.rn.bf16x2": lambda a, b, c: bfloat16_pair(a, b, c),
    "cvt.f32.f16": lambda a: as_bits(a.astype(np.uint16).view(np.float16)),
    "cvt.rn.f16x2.f32": lambda high, low: from_pair(np.stack([as_float(low), as_float(high)], 1)),
    "cvt.rn.bf16x2.f32": lambda high, low: bfloat16(as_float(high)) << np.uint32(16) | bfloat16(as_float(low)),
    "add.f32": lambda a, b: as_bits(as_float(a) + as_float(b)),
    "mul.f32": lambda a, b: as_bits(as_float(a) * as_float(b)),
    "fma.rn.f32": lambda a, b, c: as_bits(as_float(a).astype(np.float64) * as_float(b) + as_float(c)),
}


class Machine:
    """Lanes that run one piece of assembly together.

    Attributes:
        shared: uint8 [size], of all lanes.
        memory: uint8 [size], read and written by global loads and stores; addresses are places in it.
    """

    def __init__(self, shared=None, memory=None):
        self.shared, self.memory = shared, memory

    def run(self, assembly, inputs):
        """Values of the outputs, uint32 [lanes] each, for inputs of uint32 [lanes]."""
        lanes, outputs = len(inputs[0]), assembly.constraints.count("=")
        registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
        registers["compress_table"] = np.zeros(lanes, np.uint32)
        assert len(inputs) + outputs == len(assembly.constraints.split(","))
        for line in assembly.text.replace("{\n", "\n").replace("\n}", "\n").splitlines():
            if line.strip() and not line.startswith("."):
                self._step(line.strip().rstrip(";"), registers, lanes)
        return [registers[f"${i}"] for i in range(outputs)]

    def _step(self, line, registers, lanes):
        name, rest = line.split(None, 1)
        tokens = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        if name.startswith(("ld.", "st.")):
            return self._access(name, tokens, registers)
        if name == "mov.b32" and tokens[0].startswith("{"):
            low, high = tokens[0].strip("{}").split(", ")
            value = registers[tokens[1]]
            registers[low], registers[high] = value & np.uint32(0xFFFF), value >> np.uint32(16)
            return None
        values = [self._value(token, registers, lanes) for token in tokens[1:]]
        with np.errstate(over="ignore"):
            registers[tokens[0]] = OPERATIONS[name](*values).astype(np.uint32)
        return None

    @staticmethod
    def _value(token, registers, lanes):
        return registers[token] if token in registers else np.full(lanes, int(token, 0), np.uint32)

    def _access(self, name, tokens, registers):
        """Loads and stores of one or four words."""
        kind, space = name.split(".")[:2]
        memory = self.shared if space == "shared" else self.memory
        place, other = (tokens[0], tokens[1]) if kind == "st" else (tokens[1], tokens[0])
        base, _, offset = place.strip("[]").partition("+")
        names = other.strip("{}").split(", ")
        for index, register in enumerate(names):
            address = registers[base].astype(np.int64) + int(offset or 0) + 4 * index
            words = address[:, None] + np.arange(4)
            assert (address % (4 * len(names)) == 4 * index).all(), "not aligned"
            if kind == "ld":
                registers[register] = np.ascontiguousarray(memory[words]).view(np.uint32).reshape(-1)
            else:
                memory[words] = np.ascontiguousarray(registers[register]).view(np.uint8).reshape(-1, 4)
