"""Run a decoded kernel on CPU memory, and return what the interpreter saw."""

import ctypes
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx import library
from tests.ptx.decode import Program

REPORT_BYTES = 1 << 18


class Fault(enum.IntEnum):
    """What can be wrong with a launch; as in emulator/program.h."""

    OUT_OF_BOUNDS = 0
    MISALIGNED = 1
    RACE_IN_BLOCK = 2
    RACE_IN_WARP = 3
    RACE_OF_BLOCKS = 4
    UNWRITTEN_SHARED = 5
    CONSTANT_WRITTEN = 6
    DIVERGENT_BARRIER = 7
    BARRIER_AFTER_EXIT = 8
    ABSENT_LANE = 9
    DEADLOCK = 10
    TRAPPED = 11
    TOO_LONG = 12
    UNSUPPORTED = 13


@dataclass(frozen=True)
class Finding:
    """A fault, and where it was.

    Attributes:
        fault: what is wrong.
        at: the instruction, with file and line of the source.
        other: the access that it was not ordered with, or "-".
        count: how often.
        example: the first time.
    """

    fault: Fault
    at: str
    other: str
    count: int
    example: str

    def __str__(self) -> str:
        other = "" if self.other == "-" else f", with {self.other}"
        return f"{self.fault.name}, {self.count} times: {self.at}{other} ({self.example})"


@dataclass(frozen=True)
class Launch:
    """The arguments of a launch.

    Attributes:
        grid: blocks in x, y, z.
        block: threads in x, y, z.
        parameters: the bytes of the kernel's parameters.
        shared_bytes: of dynamic shared memory.
        cooperative: whether all blocks run at the same time.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes
    shared_bytes: int = 0
    cooperative: bool = False


@dataclass(frozen=True)
class Schedule:
    """How blocks and warps take turns, and how long.

    Attributes:
        seed: of the random choices.
        resident: blocks that run at the same time, where the grid is not cooperative.
        quantum: a warp runs up to so many instructions at a time.
        limit: a launch of more instructions of warps is a fault.
    """

    seed: int = 0
    resident: int = 3
    quantum: int = 40
    limit: int = 4_000_000_000


@dataclass(frozen=True)
class Outcome:
    """What a launch did.

    Attributes:
        findings: what was wrong.
        counts: [instructions, 3] uint64: requests to global memory, the sectors of 32 bytes that
            they touched, and the fewest that hold as many distinct bytes.
        executed: instructions of warps.
    """

    findings: list[Finding]
    counts: np.ndarray
    executed: int


class Job(ctypes.Structure):
    """As in emulator/program.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("code", "constants", "parameters", "ranges", "counts")
        ),
        *((name, ctypes.c_uint64) for name in ("limit", "executed")),
        *((name, ctypes.c_int32) for name in ("code_size", "constant_count")),
        *((name, ctypes.c_int32) for name in ("registers", "range_count")),
        *((name, ctypes.c_int32 * 3) for name in ("grid", "block")),
        *((name, ctypes.c_int32) for name in ("shared_bytes", "local_bytes", "parameter_bytes")),
        *(
            (name, ctypes.c_int32)
            for name in ("cooperative", "resident", "quantum", "seed", "unused")
        ),
    ]


def merged(ranges: Iterable[tuple[int, int]]) -> np.ndarray:
    """Return ranges sorted, and those that overlap as one; neighbours stay apart."""
    result: list[list[int]] = []
    for begin, end in sorted(ranges):
        if result and begin < result[-1][1]:
            result[-1][1] = max(result[-1][1], end)
        elif end > begin:
            result.append([begin, end])
    return np.array(result, dtype=np.uint64).reshape(-1, 2)


def run(
    program: Program,
    launch: Launch,
    memory: Iterable[tuple[int, int]],
    schedule: Schedule = Schedule(),
) -> Outcome:
    """Run a launch.

    Args:
        program: the kernel.
        launch: its arguments.
        memory: begin and end of what it may access.
        schedule: in which order its warps run.
    """
    own = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in program.kept]
    ranges = merged([*memory, *own])
    counts = np.zeros((len(program.code), 3), np.uint64)
    parameters = ctypes.create_string_buffer(launch.parameters, program.parameter_bytes + 16)
    shared = program.shared_bytes
    if launch.shared_bytes:
        shared = -(-shared // 16) * 16 + launch.shared_bytes
    three = ctypes.c_int32 * 3
    job = Job(
        code=program.code.ctypes.data,
        constants=program.constants.ctypes.data,
        parameters=ctypes.addressof(parameters),
        ranges=ranges.ctypes.data,
        counts=counts.ctypes.data,
        limit=schedule.limit,
        code_size=len(program.code),
        constant_count=len(program.constants),
        registers=program.registers,
        range_count=len(ranges),
        grid=three(*launch.grid),
        block=three(*launch.block),
        shared_bytes=shared,
        local_bytes=program.local_bytes,
        parameter_bytes=program.parameter_bytes,
        cooperative=launch.cooperative,
        resident=schedule.resident,
        quantum=schedule.quantum,
        seed=schedule.seed,
    )
    reports = ctypes.create_string_buffer(REPORT_BYTES)
    library.load().ptx_run(ctypes.byref(job), reports, REPORT_BYTES)
    return Outcome(findings(program, reports.value.decode()), counts, job.executed)


def findings(program: Program, text: str) -> list[Finding]:
    """Return the findings that the interpreter wrote."""
    result = []
    for line in text.splitlines():
        fault, at, other, count, example = line.split("\t")
        places: Sequence[str] = [program.describe(int(at)), program.describe(int(other))]
        result.append(Finding(Fault(int(fault)), *places, int(count), example))
    return result
