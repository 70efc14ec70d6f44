"""An assembler for the programs by which the kernel judges system calls (classic BPF over `struct seccomp_data`)."""

import struct
from collections.abc import Mapping, Sequence

Instruction = tuple[int, int, int, int]  # Code, jumps when true and when false, constant.
Code = Instruction | list[Instruction]  # That ends with a verdict.

LOAD_WORD = 0x20
AND = 0x54
JUMP, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_IF_ANY_BIT = 0x05, 0x15, 0x35, 0x45
RETURN = 0x06

NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16

ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def load(offset: int) -> Instruction:
    """Load a word of the call's description."""
    return (LOAD_WORD, 0, 0, offset)


def argument(position: int) -> int:
    """Return the offset of the lower half of an argument; the kernel reads no more of an `int`."""
    return ARGUMENTS_OFFSET + 8 * position


def answer(verdict: int) -> Instruction:
    """End with a verdict."""
    return (RETURN, 0, 0, verdict)


def refuse(number: int) -> Instruction:
    """End with an error for the caller."""
    return answer(ERRNO | number)


def if_among(offset: int, values: Sequence[int], then: Code, otherwise: Code, mask: int = 0) -> list[Instruction]:
    """Compare a word, or the bits of it in a mask, with some values."""
    one, other = _listed(then), _listed(otherwise)
    masked = [(AND, 0, 0, mask)] if mask else []
    # To the code that follows the other one.
    compares = [(JUMP_EQUAL, len(values) - index - 1 + len(other), 0, value) for index, value in enumerate(values)]
    return [load(offset), *masked, *compares, *other, *one]


def _listed(code: Code) -> list[Instruction]:
    return code if isinstance(code, list) else [code]


def if_any_bit(offset: int, mask: int, then: Instruction, otherwise: Instruction) -> list[Instruction]:
    """Test bits of a word."""
    return [load(offset), (JUMP_IF_ANY_BIT, 1, 0, mask), otherwise, then]


Rule = tuple[Instruction, ...]


def search(rules: Mapping[int, Rule], default: Rule) -> list[Instruction]:
    """Return a program that runs the rule of the number that is loaded; numbers without a rule get the default."""
    starts: list[tuple[int, Rule]] = [(0, rules.get(0, default))]
    for number in sorted({0, *rules, *(number + 1 for number in rules)}):
        if (rule := rules.get(number, default)) != starts[-1][1]:
            starts.append((number, rule))
    return _tree(starts)


def _tree(starts: Sequence[tuple[int, Rule]]) -> list[Instruction]:
    if len(starts) == 1:
        return list(starts[0][1])
    middle = len(starts) // 2
    lower, upper = _tree(starts[:middle]), _tree(starts[middle:])
    return [(JUMP_AT_LEAST, 0, 1, starts[middle][0]), (JUMP, 0, 0, len(lower)), *lower, *upper]


def assemble(program: Sequence[Instruction]) -> bytes:
    """Return a program as the kernel takes it."""
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
