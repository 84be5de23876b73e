"""Build the interpreter by g++, once, and load it."""

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "ptx"  # ignored by git
# No fused products but those that a program asks for; the processor has the instruction for these.
FLAGS = ("-std=c++17", "-O2", "-mfma", "-mf16c", "-ffp-contract=off", "-fno-strict-aliasing")


def why_unavailable() -> str | None:
    """Return why there is no emulator here, or None."""
    if shutil.which("g++") is None:
        return "there is no g++ to build the emulator of PTX"
    about = Path("/proc/cpuinfo")
    if not about.exists() or " fma " not in about.read_text():
        return "the emulator of PTX needs Linux on an x86-64 processor with fused multiply-add"
    return None


def built(name: str, sources: list[Path], build: Callable[[Path], None]) -> Path:
    """Return a file of the cache that is made of sources; under xdist one process makes it.

    Args:
        name: of the file.
        sources: what it depends on.
        build: writes the file to a path.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = CACHE / digest
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / name
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            incomplete = folder / f"{name}.new"
            build(incomplete)
            incomplete.rename(made)
    return made


def compile_shared(target: Path, sources: list[Path], *flags: str) -> None:
    """Compile C++ sources into a shared library."""
    command = ["g++", *FLAGS, "-shared", "-fPIC", *flags, "-o", target, *sources]
    subprocess.run([str(word) for word in command], check=True)


@functools.cache
def load() -> ctypes.CDLL:
    """Return the interpreter."""
    sources = sorted((HERE / "emulator").glob("*.cpp"))
    headers = sorted((HERE / "emulator").glob("*.h"))
    path = built("emulator.so", sources + headers, lambda to: compile_shared(to, sources))
    library = ctypes.CDLL(str(path))
    library.ptx_is_supported.argtypes = [ctypes.c_void_p]
    library.ptx_run.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    return library
