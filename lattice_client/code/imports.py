"""Owns finding the modules that code imports. Rule: it reads bytecode, which exists for code without source as well."""

import dis
import warnings
from collections.abc import Iterator
from types import CodeType

IMPORT_NAME = dis.opmap["IMPORT_NAME"]
# Functions that import a module by name, such as `importlib.import_module("name")`.
IMPORTERS = frozenset({"import_module", "__import__", "resolve_name"})


def imports_of(code: CodeType, package: str = "") -> Iterator[str]:
    """Yield the top-level names of all modules that `code`, which lies in `package`, imports by name."""
    if IMPORT_NAME in code.co_code[::2]:
        found = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for level, step in zip(found, found[2:], strict=False):
            if step.opcode == IMPORT_NAME:
                name = package if level.argval else step.argval
                yield name.partition(".")[0]
    names = {constant for constant in code.co_consts if isinstance(constant, str)}
    if IMPORTERS & {*code.co_names, *code.co_freevars}:
        for name in names:
            if name.replace(".", "_").isidentifier() and not name.startswith("."):
                yield name.partition(".")[0]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from imports_of(constant, package)


def imports_in(source: bytes, package: str) -> tuple[str, ...]:
    """Return the same for source text; empty when it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = compile(source, "<source>", "exec", dont_inherit=True)
        return tuple(dict.fromkeys(imports_of(code, package)))
    except (SyntaxError, ValueError, RecursionError):
        return ()
