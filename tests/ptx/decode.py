"""Decode a kernel's PTX into the program that the interpreter runs.

Every operand becomes the number of a register; what is known beforehand (numbers, addresses of
parameters and of shared memory, thread indices) is in registers that are set at the start. An
opcode, a modifier or a type that has no meaning here raises `UnknownInstructionError`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx import library
from tests.ptx.parse import DECLARED_LOCAL, DECLARED_SHARED, Array, Kernel, Module, arrays
from tests.ptx.parse import statements as statements_of

INSTRUCTION = np.dtype(
    [
        ("operation", "i4"),
        ("type", "i4"),
        ("second", "i4"),
        ("flags", "i4"),
        ("guard", "i4"),
        ("unless", "i4"),
        ("results", "i4"),
        ("sources", "i4"),
        ("result", "i4", 8),
        ("source", "i4", 8),
        ("immediate", "i8"),
        ("target", "i4"),
        ("padding", "i4"),
    ]
)
CONSTANT = np.dtype([("register", "i4"), ("kind", "i4"), ("value", "u8")])
VALUE, SPECIAL, LOCAL_ADDRESS, PARAMETER_ADDRESS = range(4)

# As in emulator/program.h.
SPECIALS = (
    *(f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("laneid", "warpid", "envreg1", "envreg2"),
)
SPACES = {"global": 0, "shared": 1, "local": 2, "param": 3, "generic": 4}
GENERIC = SPACES["generic"]
CARRY_IN, CARRY_OUT, SUBTRACT, HIGH_HALF = 1, 2, 4, 8
RIGHT, CLAMP, ALIGNED, TRANSPOSED, FLUSH = 1, 2, 1, 1, 1
CONSTANT_MEMORY, ACQUIRE, RELEASE = 1, 2, 4
ROUNDINGS = {"rn": 0, "rni": 1, "rzi": 2, "rmi": 3, "rpi": 4}
COMPARISONS = {
    name: number
    for number, names in enumerate(
        (
            *(("eq",), ("ne",), ("lt", "lo"), ("le", "ls"), ("gt", "hi"), ("ge", "hs")),
            *(("equ",), ("neu",), ("ltu",), ("leu",), ("gtu",), ("geu",), ("num",), ("nan",)),
        )
    )
    for name in names
}
COMBINATIONS = {"and": 0, "or": 1, "xor": 2}
NEGATED = 256
SHUFFLES = {"up": 0, "down": 1, "bfly": 2, "idx": 3}
REDUCTIONS = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5}

TYPES = {
    **{f"{kind}{bits}": f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
    **{name: name for name in ("f16", "bf16", "f32", "f64", "pred", "f16x2", "bf16x2", "f32x2")},
}
# Opcodes whose operands are results and sources in this order, and the modifiers they may have.
PLAIN: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (name.upper(), ()) for name in ("div", "sqrt", "rem", "min", "max", "neg")},
    **{name: (name.upper(), ()) for name in ("and", "or", "xor", "not", "shl", "shr", "selp")},
    **{name: (name.upper(), ()) for name in ("bfe", "bfi", "clz", "popc", "prmt")},
    **{name: (name.upper(), ("rn",)) for name in ("fma", "div", "sqrt")},
    "cvta": ("MOV", ("to", "global", "param", "local")),
}


class UnknownInstructionError(ValueError):
    """An instruction that the emulator does not have."""


@dataclass
class Program:
    """A kernel, ready to run.

    Attributes:
        kernel: what it was made of.
        code: array of INSTRUCTION.
        constants: array of CONSTANT.
        registers: how many there are.
        shared_bytes: that the kernel declares; the launch's come after them.
        local_bytes: of a thread.
        layout: offset and size of each parameter.
        places: of each instruction, file and line of its source.
        texts: of each instruction.
        kept: arrays whose addresses are among the constants.
    """

    kernel: Kernel
    code: np.ndarray
    constants: np.ndarray
    registers: int
    shared_bytes: int
    local_bytes: int
    layout: list[tuple[int, int]]
    places: list[str]
    texts: list[str]
    kept: list[np.ndarray]

    @property
    def parameter_bytes(self) -> int:
        return sum(self.layout[-1]) if self.layout else 0

    def describe(self, at: int) -> str:
        """Return where an instruction comes from, and its text."""
        return f"{self.places[at]}: {self.texts[at]}" if 0 <= at < len(self.texts) else "-"


@dataclass
class Line:
    """An instruction as it is written.

    Attributes:
        opcode: as written, for messages.
        name: up to the first dot.
        modifiers: between the others, without the types.
        types: as numbers.
        operands: as written.
        guard: the register of its predicate, or -1.
        unless: whether that is negated.
    """

    opcode: str
    name: str
    modifiers: list[str]
    types: list[int]
    operands: list[str]
    guard: int
    unless: bool

    def allow(self, *modifiers: str) -> None:
        """Check that there is no modifier but these."""
        if unknown := set(self.modifiers) - set(modifiers):
            raise UnknownInstructionError(f"{self.opcode}: .{unknown.pop()} is not emulated")

    def one_of(self, names: dict[str, int]) -> int:
        """Return the number of the modifier that is among these."""
        (found,) = [names[m] for m in self.modifiers if m in names]
        return found

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass
class Memory:
    """Places of named arrays in one memory."""

    places: dict[str, int] = field(default_factory=dict)
    end: int = 0

    def add(self, array: Array) -> None:
        self.end = -(-self.end // array.align) * array.align
        self.places[array.name] = self.end
        self.end += array.size or 0


class Decoder:
    """The state of decoding one kernel."""

    def __init__(self, module: Module, kernel: Kernel) -> None:
        self.module, self.kernel = module, kernel
        self.code: list[dict[str, object]] = []
        self.texts: list[str] = []
        self.places: list[str] = []
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        self.registers = 1  # the first is the carry
        self.scopes: list[dict[str, int]] = [{}]
        self.constants: dict[tuple[int, int], int] = {}
        self.parameters, self.shared, self.local = Memory(), Memory(), Memory()
        for array in kernel.parameters:
            self.parameters.add(array)
        for array in arrays(DECLARED_LOCAL, kernel.body):
            self.local.add(array)
        own = [
            a for a in module.shared if re.search(rf"(?<![\w$]){re.escape(a.name)}\b", kernel.body)
        ]
        # What the launch allocates comes last.
        for array in sorted(
            [*own, *arrays(DECLARED_SHARED, kernel.body)], key=lambda a: not a.size
        ):
            self.shared.add(array)

    def program(self) -> Program:
        """Return the decoded kernel."""
        place = "?"
        for statement in statements_of(self.kernel.body):
            if statement.kind == "open":
                self.scopes.append({})
            elif statement.kind == "close":
                self.scopes.pop()
            elif statement.kind == "label":
                self.labels[statement.text] = len(self.code)
            elif statement.kind == "place":
                place = f"{self.module.files.get(statement.text, '?')}:{statement.line}"
            else:
                self.statement(" ".join(statement.text.split()))
                self.places += [place] * (len(self.code) - len(self.places))
        self.texts.append("end")
        self.emit("EXIT", Line("ret", "ret", [], [], [], -1, False))
        self.places.append(place)
        for at, label in self.jumps:
            self.code[at]["target"] = self.labels[label]
        return Program(
            kernel=self.kernel,
            code=self.code_array(),
            constants=np.array(
                [(register, kind, value) for (kind, value), register in self.constants.items()],
                dtype=CONSTANT,
            ),
            registers=self.registers,
            shared_bytes=self.shared.end,
            local_bytes=-(-self.local.end // 16) * 16,
            layout=[(self.parameters.places[a.name], a.size or 0) for a in self.kernel.parameters],
            places=self.places,
            texts=self.texts,
            kept=list(self.module.constants.values()),
        )

    def code_array(self) -> np.ndarray:
        code = np.zeros(len(self.code), INSTRUCTION)
        code["result"] = code["source"] = -1
        for instruction, values in zip(code, self.code, strict=True):
            for name, value in values.items():
                if isinstance(value, list):
                    instruction[name][: len(value)] = value
                else:
                    instruction[name] = value
        supported = library.load().ptx_is_supported
        for at in range(len(code)):
            if not supported(code[at:].ctypes.data):
                raise UnknownInstructionError(f"{self.texts[at]} is not emulated")
        return code

    # Operands.

    def new_register(self) -> int:
        self.registers += 1
        return self.registers - 1

    def constant(self, kind: int, value: int) -> int:
        key = (kind, value % (1 << 64))
        if key not in self.constants:
            self.constants[key] = self.new_register()
        return self.constants[key]

    def register(self, text: str) -> int:
        """Return the register of an operand; -1 for a result that is not wanted."""
        text = text.strip()
        if text == "_":
            return -1
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text.startswith("%"):
            if text[1:] in SPECIALS:
                return self.constant(SPECIAL, SPECIALS.index(text[1:]))
            return self.scopes[0].setdefault(text, self.new_register())
        return self.constant(*self.value(text))

    def value(self, text: str) -> tuple[int, int]:
        """Return the kind and the value of a constant operand."""
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]{8,16}", text):
            return VALUE, int(text[2:], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return VALUE, int(text.rstrip("U"), 0)
        if text in ("true", "false"):
            return VALUE, int(text == "true")
        symbol = re.fullmatch(r"([$\w]+)(?:\+(-?\d+))?", text)
        if symbol is None:
            raise UnknownInstructionError(f"operand {text}")
        offset = int(symbol[2] or 0)
        for kind, memory in (
            (VALUE, self.shared),
            (LOCAL_ADDRESS, self.local),
            (PARAMETER_ADDRESS, self.parameters),
        ):
            if symbol[1] in memory.places:
                return kind, memory.places[symbol[1]] + offset
        if symbol[1] in self.module.constants:
            return VALUE, self.module.constants[symbol[1]].ctypes.data + offset
        raise UnknownInstructionError(f"operand {text}")

    def all_registers(self, operands: list[str]) -> list[int]:
        return [self.register(operand) for operand in operands]

    def vector(self, operand: str) -> list[int]:
        """Return the registers of an operand that may be a vector in braces."""
        return self.all_registers(operand.strip("{} ").split(","))

    def address(self, operand: str) -> tuple[int, int]:
        """Return the register and the offset of an address in brackets."""
        inner = operand.strip("[] ").replace(" ", "")
        found = re.fullmatch(r"(.+?)(?:\+(-?(?:0x)?[0-9a-fA-F]+))?", inner)
        assert found is not None
        return self.register(found[1]), int(found[2], 0) if found[2] else 0

    # Statements.

    def statement(self, text: str) -> None:
        if text.startswith("."):
            self.declare(text)
            return
        guarded = re.match(r"@(!?)([%\w]+) (.*)", text)
        guard, unless, rest = -1, False, text
        if guarded:
            guard, unless, rest = self.register(guarded[2]), bool(guarded[1]), guarded[3]
        opcode, _, operands = rest.partition(" ")
        name, *modifiers = opcode.replace("::", "_").split(".")
        types = [library.load().ptx_type(TYPES[m].encode()) for m in modifiers if m in TYPES]
        line = Line(
            opcode,
            name,
            [m for m in modifiers if m not in TYPES],
            types,
            split(operands),
            guard,
            unless,
        )
        before = len(self.code)
        if name in PLAIN:
            self.plain(line)
        elif (handler := HANDLERS.get(name)) is not None:
            handler(self, line)
        else:
            raise UnknownInstructionError(f"{opcode} is not emulated")
        self.texts += [text] * (len(self.code) - before)

    def declare(self, text: str) -> None:
        """Declare the registers of an inner scope; those of the kernel are made when first used."""
        declared = re.match(r"\.reg \.\w+ (.*)", text)
        if declared is None or len(self.scopes) == 1:
            return
        for name in declared[1].split(","):
            several = re.fullmatch(r"(.+)<(\d+)>", name.strip())
            names = (
                [f"{several[1]}{n}" for n in range(int(several[2]))] if several else [name.strip()]
            )
            self.scopes[-1].update({n: self.new_register() for n in names})

    def emit(
        self,
        operation: str,
        line: Line,
        results: list[int] | None = None,
        sources: list[int] | None = None,
        **fields: int,
    ) -> None:
        """Add an instruction; `fields` are other members of INSTRUCTION."""
        number = library.load().ptx_operation(operation.encode())
        assert number >= 0, operation
        results, sources = results or [], sources or []
        self.code.append(
            {
                "operation": number,
                "type": line.types[0] if line.types else 0,
                "guard": line.guard,
                "unless": line.unless,
                "results": len(results),
                "sources": len(sources),
                "result": results,
                "source": sources,
                **fields,
            }
        )

    def plain(self, line: Line) -> None:
        operation, modifiers = PLAIN[line.name]
        line.allow(*modifiers)
        first, *rest = line.operands
        self.emit(operation, line, [self.register(first)], self.all_registers(rest))


def split(operands: str) -> list[str]:
    """Split operands at the commas that are not inside of braces or brackets."""
    return [o.strip() for o in re.split(r",(?![^{\[(]*[}\])])", operands) if o.strip()]


def mov(decoder: Decoder, line: Line) -> None:
    line.allow()
    to, source = line.operands
    operation = "UNPACK" if to.startswith("{") else "PACK" if source.startswith("{") else "MOV"
    decoder.emit(operation, line, decoder.vector(to), decoder.vector(source))


def add(decoder: Decoder, line: Line) -> None:
    line.allow("rn", "cc")
    subtract = line.name.startswith("sub")
    to, *rest = line.operands
    results, sources = [decoder.register(to)], decoder.all_registers(rest)
    if line.has("cc") or line.name.endswith("c"):
        flags = (
            CARRY_IN * line.name.endswith("c") | CARRY_OUT * line.has("cc") | SUBTRACT * subtract
        )
        decoder.emit("ADD_CARRY", line, results, sources, flags=flags)
    elif len(line.types) == 2 and not subtract:
        decoder.emit("ADD_MIXED", line, results, sources, second=line.types[1])
    else:
        decoder.emit("SUB" if subtract else "ADD", line, results, sources)


def multiply(decoder: Decoder, line: Line) -> None:
    line.allow("rn", "lo", "hi", "wide", "cc")
    to, *rest = line.operands
    results, sources = [decoder.register(to)], decoder.all_registers(rest)
    if line.name == "madc" or line.has("cc"):
        flags = CARRY_IN * (line.name == "madc") | CARRY_OUT * line.has("cc")
        flags |= HIGH_HALF * line.has("hi")
        decoder.emit("MAD_CARRY", line, results, sources, flags=flags)
        return
    if line.name == "mad" and line.has("hi"):
        raise UnknownInstructionError(f"{line.opcode} is not emulated")
    suffix = "_WIDE" if line.has("wide") else "_HI" if line.has("hi") else ""
    decoder.emit(line.name.upper() + suffix, line, results, sources)


def absolute(decoder: Decoder, line: Line) -> None:
    line.allow("ftz")
    to, source = map(decoder.vector, line.operands)
    decoder.emit("ABS", line, to, source, flags=FLUSH * line.has("ftz"))


def reciprocal(decoder: Decoder, line: Line) -> None:
    line.allow("rn", "approx", "ftz")
    operation = "RCP_HIGH" if line.has("approx") else "RCP"
    decoder.emit(operation, line, *map(decoder.vector, line.operands))


def funnel(decoder: Decoder, line: Line) -> None:
    line.allow("l", "r", "clamp", "wrap")
    to, *rest = line.operands
    flags = RIGHT * line.has("r") | CLAMP * line.has("clamp")
    decoder.emit("FUNNEL", line, [decoder.register(to)], decoder.all_registers(rest), flags=flags)


def compare(decoder: Decoder, line: Line) -> None:
    line.allow(*COMPARISONS, *COMBINATIONS)
    to, *rest = line.operands
    sources, immediate = decoder.all_registers(rest[:2]), 0
    if len(rest) == 3:
        immediate = line.one_of(COMBINATIONS) | NEGATED * rest[2].startswith("!")
        sources.append(decoder.register(rest[2].lstrip("!")))
    decoder.emit(
        "SETP",
        line,
        decoder.all_registers(to.split("|")),
        sources,
        flags=COMPARISONS[line.modifiers[0]],
        immediate=immediate,
    )


def convert(decoder: Decoder, line: Line) -> None:
    line.allow(*ROUNDINGS)
    to, *rest = line.operands
    results, sources = [decoder.register(to)], decoder.all_registers(rest)
    if len(sources) == 2:
        decoder.emit("CVT_PAIR", line, results, sources)
        return
    flags = line.one_of(ROUNDINGS) if line.modifiers else 0
    decoder.emit("CVT", line, results, sources, flags=flags, second=line.types[1])


ORDERS = ("relaxed", "acquire", "release", "acq_rel", "weak", "volatile")
SCOPES = ("cta", "gpu", "sys")
CACHES = ("L1_evict_first", "L1_evict_last", "L1_evict_normal", "L1_no_allocate")


def space_of(line: Line) -> int:
    """Return the number of the space that an access names."""
    return next((SPACES[m] for m in line.modifiers if m in SPACES), GENERIC)


def load(decoder: Decoder, line: Line) -> None:
    line.allow("global", "shared", "local", "param", "nc", "v2", "v4", *ORDERS, *SCOPES, *CACHES)
    address, offset = decoder.address(line.operands[1])
    flags = CONSTANT_MEMORY * line.has("nc") | ACQUIRE * line.has("acquire")
    results = decoder.vector(line.operands[0])
    fields = {"second": space_of(line), "flags": flags, "immediate": offset}
    decoder.emit("LD", line, results, [address], **fields)


def store(decoder: Decoder, line: Line) -> None:
    line.allow("global", "shared", "local", "v2", "v4", *ORDERS, *SCOPES)
    address, offset = decoder.address(line.operands[0])
    sources = [address, *decoder.vector(line.operands[1])]
    fields = {"second": space_of(line), "flags": RELEASE * line.has("release"), "immediate": offset}
    decoder.emit("ST", line, [], sources, **fields)


def atomic(decoder: Decoder, line: Line) -> None:
    line.allow("global", "add", *ORDERS, *SCOPES)
    operands = line.operands if line.name == "atom" else ["_", *line.operands]
    to, place, added = operands
    address, offset = decoder.address(place)
    both = line.has("acq_rel")
    flags = ACQUIRE * (both or line.has("acquire")) | RELEASE * (both or line.has("release"))
    fields = {"second": space_of(line), "flags": flags, "immediate": offset}
    decoder.emit(
        "ATOM_ADD", line, [decoder.register(to)], [address, decoder.register(added)], **fields
    )


def matrices(decoder: Decoder, line: Line) -> None:
    line.allow("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared_cta")
    loads = line.name == "ldmatrix"
    address, offset = decoder.address(line.operands[1 if loads else 0])
    registers = decoder.vector(line.operands[0 if loads else 1])
    decoder.emit(
        line.name.upper(),
        line,
        registers if loads else [],
        [address] if loads else [address, *registers],
        flags=TRANSPOSED * line.has("trans"),
        immediate=offset,
    )


def branch(decoder: Decoder, line: Line) -> None:
    line.allow("uni")
    decoder.jumps.append((len(decoder.code), line.operands[0]))
    decoder.emit("BRA", line)


def leave(decoder: Decoder, line: Line) -> None:
    line.allow("uni")
    decoder.emit("EXIT", line)


def barrier(decoder: Decoder, line: Line) -> None:
    line.allow("warp", "sync", "cta", "aligned")
    if line.has("warp"):
        decoder.emit("WARP_BAR", line, [], decoder.all_registers(line.operands))
        return
    if len(line.operands) != 1:
        raise UnknownInstructionError(f"{line.opcode} of a part of the block is not emulated")
    aligned = line.name == "bar" or line.has("aligned")
    decoder.emit("BAR", line, flags=ALIGNED * aligned)


def shuffle(decoder: Decoder, line: Line) -> None:
    line.allow("sync", *SHUFFLES)
    to, *rest = line.operands
    results = decoder.all_registers(to.split("|"))
    sources = decoder.all_registers(rest)
    decoder.emit("SHFL", line, results, sources, flags=line.one_of(SHUFFLES))


def reduce(decoder: Decoder, line: Line) -> None:
    line.allow("sync", *REDUCTIONS)
    to, *rest = line.operands
    flags = line.one_of(REDUCTIONS)
    decoder.emit("REDUX", line, [decoder.register(to)], decoder.all_registers(rest), flags=flags)


def nothing(decoder: Decoder, line: Line) -> None:
    decoder.emit({"trap": "TRAP", "fence": "FENCE", "membar": "FENCE"}.get(line.name, "NOP"), line)


HANDLERS: dict[str, Callable[[Decoder, Line], None]] = {
    "mov": mov,
    **dict.fromkeys(("add", "sub", "addc", "subc"), add),
    **dict.fromkeys(("mul", "mad", "madc"), multiply),
    "abs": absolute,
    "rcp": reciprocal,
    "shf": funnel,
    "setp": compare,
    "cvt": convert,
    "ld": load,
    "st": store,
    **dict.fromkeys(("atom", "red"), atomic),
    **dict.fromkeys(("ldmatrix", "stmatrix"), matrices),
    "bra": branch,
    **dict.fromkeys(("ret", "exit"), leave),
    **dict.fromkeys(("bar", "barrier"), barrier),
    "shfl": shuffle,
    "redux": reduce,
    **dict.fromkeys(("trap", "fence", "membar", "pragma", "nop"), nothing),
}


def decode(module: Module, name: str | None = None) -> Program:
    """Return a kernel of a module as a program; without a name its only one."""
    if name is None:
        (name,) = module.kernels
    return Decoder(module, module.kernels[name]).program()
