"""Building the CUDA C++ kernels: errors where something is missing, and what the module is like.

No test needs a GPU. Stand-ins take the place of nvcc, or a test that needs it is skipped.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.building import Machine, program, run, sdist
from tests.helpers.project import ROOT, copy_of_the_project

SUFFIXES = (".cu", ".cuh", ".cpp", ".h")
MODULE = importlib.util.find_spec("gcond_kernels._cuda")


def sources_in(project: Path) -> list[str]:
    """Return what there is to compile, such as csrc/cuda/combine.cu."""
    files = (path for path in project.rglob("*") if path.suffix in SUFFIXES)
    return sorted(str(path.relative_to(project)) for path in files)


SOURCES = [f"csrc/{name}" for name in sources_in(ROOT / "csrc")]

needs_nvcc = pytest.mark.skipif(
    not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")), reason="there is no nvcc"
)
needs_module = pytest.mark.skipif(MODULE is None, reason="the CUDA C++ kernels are not built")


def built_for() -> list[str]:
    """Return the architectures of the module, such as sm_90."""
    from gcond_kernels import _cuda

    return re.findall(r"sm_\w+", _cuda.ARCHITECTURES)


# Errors where it cannot be done.

STAND_INS = {
    "nvcc": 'test "$*" = --list-gpu-arch && echo compute_80 compute_90 compute_100',
    "g++": "exit 1",
    "ninja": "echo FAILED: resolve.cu.o; exit 1",
}


class CudaMachine(Machine):
    """A machine to build the CUDA C++ kernels on."""

    def build(self, **variables: str) -> subprocess.CompletedProcess:
        wanted = {"GCOND_BUILD_CPU": "0", "GCOND_BUILD_CUDA": "1"}
        return self.run("setup.py", "build_ext", **(wanted | variables))

    def build_file(self) -> str:
        (file,) = self.source.glob("build/cuda/*/build.ninja")
        return file.read_text()


@pytest.fixture
def machine(tmp_path):
    return CudaMachine(tmp_path, STAND_INS)


@pytest.mark.parametrize(
    ("lost", "variables", "message"),
    [
        ("", {"GCOND_BUILD_CUDA": "yes"}, "GCOND_BUILD_CUDA must be 1 or 0, not 'yes'"),
        ("", {"CUDA_HOME": "/nowhere"}, "there is no nvcc in /nowhere/bin (CUDA_HOME)"),
        ("nvcc", {}, "there is no nvcc on PATH, and CUDA_HOME is not set"),
        ("", {"GCOND_CUDA_ARCHS": "90;999"}, "nvcc does not know sm_999: set GCOND_CUDA_ARCHS to"),
        ("", {"GCOND_CUDA_ARCHS": "90;75"}, "is no list of architectures from 80 on"),
        ("", {"GCOND_CUDA_ARCHS": "90a"}, "GCOND_CUDA_ARCHS='90a' is no list of"),
        ("", {"GCOND_CUDA_ARCHS": "hopper"}, "GCOND_CUDA_ARCHS='hopper' is no list of"),
        ("", {"GCOND_CUDA_ARCHS": "9.0"}, "GCOND_CUDA_ARCHS='9.0' is no list of"),
        ("g++", {}, "there is no C++ compiler 'g++': install g++"),
        ("", {"CXX": "no-such-compiler"}, "there is no C++ compiler 'no-such-compiler'"),
        ("ninja", {}, "ninja is not installed: pip install ninja"),
        ("pybind11", {}, "pybind11 is not installed: pip install pybind11"),
        ("", {}, "their compilation failed"),
    ],
)
def test_a_build_that_misses_something_ends_with_a_message(machine, lost, variables, message):
    machine.lose(lost)
    result = machine.build(**variables)
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stdout
    assert "fetch" not in result.stdout  # setuptools is not asked to install anything
    assert not list(machine.source.rglob("*.so"))


def test_an_nvcc_that_does_not_run(machine):
    program(machine.programs / "nvcc", "exit 3")
    assert f"{machine.programs}/nvcc does not run" in machine.build().stdout


def test_pip_shows_the_message_and_no_traceback(machine):
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--target", "installed")
    result = machine.run(
        "-m", "pip", "install", *options, ".", GCOND_BUILD_CUDA="1", CUDA_HOME="/nowhere"
    )
    assert result.returncode == 1
    assert "kernels, but there is no nvcc in /nowhere/bin" in result.stdout
    assert "Traceback" not in result.stdout
    assert not (machine.source / "installed").exists()


def test_an_isolated_cuda_build_requires_ninja_and_another_does_not(machine):
    code = "from setuptools import build_meta as m; print(*m.get_requires_for_build_{}())"
    for kind in ("wheel", "editable"):
        required = machine.run("-c", code.format(kind), GCOND_BUILD_CUDA="1").stdout.splitlines()[
            -1
        ]
        assert re.fullmatch(r"ninja>=\S+", required)
        assert "ninja" not in machine.run("-c", code.format(kind)).stdout


def test_the_build_file_names_nvcc_and_the_architectures(machine, tmp_path):
    machine.build()
    assert f"command = {machine.programs}/nvcc " in machine.build_file()
    for target in ("80,code=sm_80", "90,code=sm_90", "100,code=sm_100", "100,code=compute_100"):
        assert f"arch=compute_{target}" in machine.build_file()
    home = tmp_path / "cuda $home"
    program(home / "bin" / "nvcc", STAND_INS["nvcc"])
    machine.build(CUDA_HOME=str(home), GCOND_CUDA_ARCHS="90", CXX="g++")
    assert f"command = '{tmp_path}/cuda $$home/bin/nvcc' -ccbin g++ " in machine.build_file()
    assert re.findall(r",code=(\w+)", machine.build_file()) == ["sm_90", "compute_90"]


# A wheel that is built as a user builds one.


@pytest.mark.slow
@needs_nvcc
def test_an_error_of_the_compiler_is_shown(tmp_path):
    source = copy_of_the_project(tmp_path / "source")
    for name in SOURCES:
        (source / name).write_text("#error this does not compile\n")
    environment = os.environ | {"GCOND_BUILD_CPU": "0", "GCOND_BUILD_CUDA": "1"}
    command = ("-m", "build", "--wheel", "--outdir", tmp_path / "made", source)
    result = run(sys.executable, *command, env=environment)
    assert result.returncode == 1
    assert "#error this does not compile" in result.stdout
    assert "their compilation failed" in result.stdout
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())


@pytest.mark.slow
def test_the_sdist_has_every_source_once(tmp_path):
    unpacked = sdist(tmp_path)
    assert sources_in(unpacked) == SOURCES
    assert {Path(name).suffix for name in SOURCES} == set(SUFFIXES)


@pytest.fixture(scope="module")
def cuda_wheel(tmp_path_factory) -> Path:
    """Build the wheel of the sdist in isolation, without torch.

    What this checkout has compiled from the same files is not compiled again; without that it takes
    minutes, for one architecture.
    """
    folder = tmp_path_factory.mktemp("cuda_wheel")
    unpacked, architectures = sdist(folder), "90"
    if MODULE and (ROOT / "build" / "cuda").is_dir():
        shutil.copytree(ROOT / "build" / "cuda", unpacked / "build" / "cuda")
        architectures = ";".join(built_for()).replace("sm_", "")
    environment = os.environ | {
        "GCOND_BUILD_CPU": "0",
        "GCOND_BUILD_CUDA": "1",
        "GCOND_CUDA_ARCHS": architectures,
    }
    options = ("--wheel", "--outdir", folder)
    result = run(sys.executable, "-m", "build", *options, unpacked, env=environment)
    assert result.returncode == 0, result.stdout
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
@needs_nvcc
def test_the_wheel_from_the_sdist_works_without_torch(cuda_wheel, tmp_path):
    assert re.search(r"-cp\d+-cp\d+-linux_\w+\.whl$", cuda_wheel.name)
    installed = zipfile.ZipFile(cuda_wheel)
    names = installed.namelist()
    (module,) = (name for name in names if name.startswith("gcond_kernels/_cuda.cpython"))
    assert "gcond_kernels/_cuda.pyi" in names
    assert not {Path(name).suffix for name in names} & set(SUFFIXES)
    metadata = next(name for name in names if name.endswith("METADATA"))
    assert "torch==" not in installed.read(metadata).decode()
    run_isolated(FOREIGN, Path(installed.extract(module, tmp_path)))


# The module of this checkout.

# Another framework than torch, known to the module only by the functions of DLPack's exchange.
FOREIGN = """
from ctypes import *

class DLTensor(Structure):
    _fields_ = [("data", c_void_p), ("device", c_int32 * 2), ("ndim", c_int32), ("code", c_uint8),
                ("bits", c_uint8), ("lanes", c_uint16), ("shape", POINTER(c_int64)),
                ("strides", POINTER(c_int64)), ("byte_offset", c_uint64)]

class Array:
    def __init__(self, kind, code, *values):
        self.memory = (kind * len(values))(*values)
        self.shape = (c_int64 * 1)(len(values))
        self.code, self.bits = code, 8 * sizeof(kind)

READ = PYFUNCTYPE(c_int, py_object, POINTER(DLTensor))

@READ
def read(array, tensor):
    tensor[0] = DLTensor(addressof(array.memory), (1, 0), 1, array.code, array.bits, 1, array.shape,
                         None, 0)
    return 0

class Exchange(Structure):
    _fields_ = [("major", c_uint32), ("minor", c_uint32), ("previous", c_void_p),
                ("others", c_void_p * 3), ("read", READ), ("stream", c_void_p)]

def offer(exchange):
    new = pythonapi.PyCapsule_New
    new.restype, new.argtypes = py_object, [c_void_p, c_char_p, c_void_p]
    cuda.use_exchange(new(addressof(exchange), b"dlpack_exchange_api", None))

known = Exchange(1, 3, None, (c_void_p * 3)(), read, None)
newer = Exchange(2, 0, addressof(known), (c_void_p * 3)(), READ(), None)
strange = Exchange(2, 0, None, (c_void_p * 3)(), READ(), None)
try:
    offer(strange)
    raise AssertionError("an exchange of another version was accepted")
except RuntimeError as error:
    assert "DLPack" in str(error)
offer(newer)

total, gradient = Array(c_float, 2, 1, 2, 3), Array(c_double, 2, 10, 20, 30)
segments, entries = Array(c_int64, 0, 0, 3), Array(c_int32, 0, 0, 0)
first = Array(c_int32, 0, 0, 1)
chunks = cuda.Chunks(segments, entries, first, 1, 1, cuda.ACCUMULATE_CHUNK)
gradients = cuda.TensorList([gradient])
cuda.accumulate((-1, 0), total, gradients, chunks, 0.5, False)
assert list(total.memory) == [6, 12, 18], list(total.memory)
try:
    cuda.accumulate((0, 0), total, gradients, chunks, 0.5, False)
    raise AssertionError("a kernel was launched without a GPU")
except RuntimeError as error:
    print(error)
"""

# Imported by its path, in a Python that knows no package but its own.
PREAMBLE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gcond_kernels._cuda", sys.argv[1])
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
assert importlib.util.find_spec("torch") is None
"""

NO_GPU = r"CUDA driver version is insufficient|no CUDA-capable device|driver shutting down"


def run_isolated(code: str, module: Path) -> str:
    """Run code on the module without torch and without a GPU."""
    command = (sys.executable, "-I", "-S", "-c", PREAMBLE + code, module)
    result = run(*command, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})
    assert result.returncode == 0, result.stdout
    return result.stdout


@needs_module
def test_the_module_reads_tensors_of_an_unknown_framework():
    assert re.search(rf"CUDA, accumulate: .*({NO_GPU})", run_isolated(FOREIGN, Path(MODULE.origin)))


@needs_module
def test_without_a_driver_the_module_returns_the_message_of_cuda():
    message = run_isolated("print(cuda.device_problem(0))", Path(MODULE.origin))
    assert re.search(rf"CUDA, device 0: .*({NO_GPU})", message)


@needs_module
def test_the_module_depends_on_the_c_and_the_cpp_library_alone():
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", MODULE.origin).stdout)
    assert needed
    for library in needed:
        assert re.fullmatch(r"(lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)|ld-linux.*)\.so\.\d+", library)


@needs_module
def test_the_module_exports_only_its_initialization():
    exported = run("nm", "-D", "--defined-only", MODULE.origin).stdout.split()[2::3]
    assert exported == ["PyInit__cuda"]


# Its machine code.

K = range(1, 9)
ONE_EACH = ("accumulate", "arbitrate", "clip", "combine", "factor", "sum")
KERNELS = {
    *(f"{name}_kernel" for name in ONE_EACH),
    *(f"{name}_kernel<{tasks}>" for name in ("products", "resolve") for tasks in K),
}
# Vectors of every accumulator that a thread reads at once (gramian.cuh).
UNROLLED = {1: 4, 2: 4, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1}


def find_cuobjdump() -> str | None:
    """Return NVIDIA's reader of machine code: the toolkit's, or the one in Triton."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump"
    triton = importlib.util.find_spec("triton")
    theirs = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else home
    return next((str(file) for file in (home, theirs) if file.is_file()), shutil.which("cuobjdump"))


needs_cuobjdump = pytest.mark.skipif(
    MODULE is None or find_cuobjdump() is None,
    reason="the CUDA C++ kernels are not built" if MODULE is None else "there is no cuobjdump",
)


def cuobjdump(*options: str) -> str:
    return run(find_cuobjdump(), *options, MODULE.origin, check=True).stdout


def kernel_of(symbol: str) -> str:
    """Return the name of a kernel, such as products_kernel<8>, from its symbol."""
    name, number = re.search(r"\d([a-z_]+_kernel)(?:ILi(\d+)E)?", symbol).groups()
    return f"{name}<{number}>" if number else name


@needs_cuobjdump
def test_every_architecture_has_all_kernels_and_none_spills():
    """Spilled registers and arrays that are no registers make a stack: local memory."""
    found = {name: set() for name in built_for()}
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif "Function " in line:
            kernel = kernel_of(line)
            found[architecture].add(kernel)
        elif "REG:" in line:
            assert " STACK:0 " in line, (architecture, kernel, line)
            assert " LOCAL:0 " in line, (architecture, kernel, line)
    for kernels in found.values():
        assert kernels == KERNELS


def test_the_list_of_kernels_is_complete():
    named = set()
    for source in SOURCES:
        text = (ROOT / source).read_text()
        named |= set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text))
    assert named == {kernel.partition("<")[0] for kernel in KERNELS}


@needs_cuobjdump
def test_there_is_ptx_of_the_last_architecture():
    from gcond_kernels import _cuda

    (last,) = re.findall(r"PTX (\w+)", _cuda.ARCHITECTURES)
    assert f"sm_{last}" == built_for()[-1]
    listed = cuobjdump("--list-ptx").splitlines()
    assert len(listed) == sum(name.endswith(".cu") for name in SOURCES)
    assert all(f".sm_{last}.ptx" in line for line in listed)


@functools.cache
def machine_code(architecture: str) -> dict[str, list[str]]:
    """Return the instructions of every kernel."""
    code: dict[str, list[str]] = {}
    for line in cuobjdump("-sass", "-arch", architecture).splitlines():
        if "Function : " in line:
            instructions = code.setdefault(kernel_of(line), [])
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@\S+ )?(.+?) *;", line):
            instructions.append(found[1])
    return code


def loads_in_flight(instructions: list[str]) -> int:
    """Return the most loads of 16 bytes that are issued before the result of one is read."""
    most, loaded = 0, set()
    for instruction in instructions:
        operation, _, operands = instruction.partition(" ")
        target, _, read = operands.partition(", ")
        if operation.startswith("ST"):
            read = operands
        first_of_four = {int(n) // 4 * 4 for n in re.findall(r"\bR(\d+)", read)}
        if loaded & first_of_four:
            loaded = set()
        if operation.startswith("LDG") and ".128" in operation:
            loaded.add(int(target[1:]))
        most = max(most, len(loaded))
    return most


@needs_cuobjdump
@pytest.mark.parametrize(
    ("kernel", "loads", "stores"),
    [
        ("accumulate_kernel", 8, 4),
        ("combine_kernel", 12, 4),  # the momentum and two accumulators
        # Accumulators, history and momentum.
        *((f"products_kernel<{k}>", (2 * k + 1) * UNROLLED[k], 0) for k in K),
        *((f"resolve_kernel<{k}>", (2 * k + 1) * UNROLLED[k], 4) for k in K),
    ],
)
def test_loads_are_of_16_bytes_and_many_are_in_flight(kernel, loads, stores):
    architecture = "sm_90" if "sm_90" in built_for() else built_for()[0]
    instructions = machine_code(architecture)[kernel]
    assert loads_in_flight(instructions) >= loads
    written = [i for i in instructions if i.startswith("STG") and ".128" in i]
    assert len(written) >= stores
    # Accumulators of two bytes: as many vectors, half as wide; the momentum is float32.
    half_as_wide = [i for i in instructions if i.startswith("LDG") and ".64" in i]
    assert len(half_as_wide) >= loads // 2
