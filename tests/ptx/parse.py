"""Split the text of a PTX module into its kernels, their parameters and statements."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DECLARED_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]\s*;")
DECLARED_LOCAL = re.compile(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]\s*;")
DECLARED_GLOBAL = re.compile(
    r"\.(?:global|const)\s+\.align\s+\d+\s+\.b(8|16|32|64)\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\}"
)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
PARAMETER_ARRAY = re.compile(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]")
PARAMETER = re.compile(r"\.param\s+\.[bsuf](\d+)\b.*?([\w$]+)$")
SOURCE_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.MULTILINE)


@dataclass(frozen=True)
class Array:
    """A named piece of shared or local memory.

    Attributes:
        name: its symbol.
        align: what its address is a multiple of.
        size: in bytes; None where the launch decides.
    """

    name: str
    align: int
    size: int | None


@dataclass(frozen=True)
class Kernel:
    """A kernel as it stands in a module.

    Attributes:
        name: its symbol.
        parameters: its parameters, in order.
        body: its statements, without comments.
        threads: of a block, where the kernel says; else None.
    """

    name: str
    parameters: list[Array]
    body: str
    threads: int | None


@dataclass
class Module:
    """What a PTX file holds."""

    target: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    shared: list[Array] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # number → name


@dataclass(frozen=True)
class Statement:
    """A step of the walk through a body.

    Attributes:
        kind: "open", "close", "label", "place" (file and line) or "code".
        text: the label, the file's number, or the instruction or declaration.
        line: of a place.
    """

    kind: str
    text: str = ""
    line: int = 0


def parse(text: str) -> Module:
    """Return the module that a text holds."""
    files = {n: Path(name or folder).name for n, folder, name in SOURCE_FILE.findall(text)}
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    target = re.search(r"\.target\s+(\w+)", code)
    assert target is not None, "this is no PTX module"
    module = Module(target[1], files=files)
    outside = code
    for entry in ENTRY.finditer(code):
        body = code[entry.end() : end_of_scope(code, entry.end())]
        outside = outside.replace(body, "")
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
        module.kernels[entry[1]] = Kernel(
            entry[1],
            [parameter(p.strip()) for p in entry[2].split(",") if p.strip()],
            body,
            int(threads[1]) if threads else None,
        )
    module.shared = arrays(DECLARED_SHARED, outside)
    for bits, name, values in DECLARED_GLOBAL.findall(outside):
        numbers = [int(value, 0) % (1 << int(bits)) for value in values.split(",")]
        module.constants[name] = np.array(numbers, dtype=f"u{int(bits) // 8}")
    return module


def arrays(declared: re.Pattern[str], text: str) -> list[Array]:
    """Return the arrays that a text declares."""
    return [
        Array(name, int(align), int(size) if size else None)
        for align, name, size in declared.findall(text)
    ]


def parameter(text: str) -> Array:
    """Return a parameter of a kernel."""
    if found := PARAMETER_ARRAY.search(text):
        return Array(found[2], int(found[1]), int(found[3]))
    found = PARAMETER.match(text)
    assert found is not None, f"unknown parameter {text}"
    return Array(found[2], int(found[1]) // 8, int(found[1]) // 8)


def end_of_scope(code: str, begin: int) -> int:
    """Return where the brace is closed that was opened before `begin`."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(code, begin):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError("a scope is not closed")


TOKEN = re.compile(
    r"""\s*(?:
        (?P<open>\{) | (?P<close>\}) | (?P<empty>;)
      | \.loc\s+(?P<place>\d+)\s+(?P<line>\d+)[^\n]*
      | (?P<label>[$\w.]+):(?!:)
      | (?P<code>[^;]+);
    )""",
    re.VERBOSE,
)


def statements(body: str) -> Iterator[Statement]:
    """Yield the statements of a body."""
    end = len(body.rstrip())
    at = 0
    while at < end:
        token = TOKEN.match(body, at)
        if token is None:
            raise ValueError(f"no statement: {body[at : at + 60]!r}")
        at = token.end()
        kind = token.lastgroup if token["place"] is None else "place"
        if kind != "empty":
            line = int(token["line"]) if kind == "place" else 0
            yield Statement(str(kind), token[str(kind)].strip(), line)
