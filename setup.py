"""Builds the package; everything static stands in pyproject.toml.

With GCOND_BUILD_CUDA=1 in the environment the CUDA C++ kernels of csrc/ are compiled too, into the
extension module `gcond_kernels._cuda`, by nvcc and ninja. They need no torch.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.absolute()
SOURCES = [  # the one that takes longest first
    "resolve.cu",
    "gramian.cu",
    "module.cpp",
    "graddrop.cu",
    "combine.cu",
    "arbitrate.cu",
    "lists.cu",
    "accumulate.cu",
    "tensors.cpp",
]
ARCHITECTURES = "80;90;100"

# One rounding for a product and one for a sum, on the GPU and on the host alike, except where the
# code says fmaf.
COMPILER_FLAGS = (
    "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,"
    "-fno-strict-aliasing,-Wall,-Wno-unknown-pragmas"
)
# CUDA's runtime becomes part of the module. No kernel calls one of another file: there is no device
# code to link.
LINKER_FLAGS = (
    "-shared -cudart static -nodlink -Xlinker --exclude-libs,ALL,--version-script,exports"
)
# What other libraries of the process may see of the module: of the C++ library, nothing.
EXPORTS = "{ global: PyInit__cuda; local: *; };\n"

RULES = """ninja_required_version = 1.5
rule compile
  command = {nvcc} {compiler_flags} $options -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {nvcc} {linker_flags} $in -o $out
  description = link $out
"""


def wanted() -> bool:
    """Whether the environment asks for the CUDA C++ kernels."""
    value = os.environ.get("GCOND_BUILD_CUDA", "")
    if value not in ("", "0", "1"):
        raise SetupError(f"GCOND_BUILD_CUDA must be 1 or 0, not {value!r}")
    return value == "1"


def missing(what: str) -> SetupError:
    """The build was asked for and cannot be done."""
    return SetupError(
        f"GCOND_BUILD_CUDA=1 asks for the CUDA C++ kernels, but {what}. "
        "Without the variable the package builds without them."
    )


def find_nvcc() -> str:
    """The compiler, in CUDA_HOME or else on PATH."""
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise missing(f"there is no nvcc at {nvcc} (CUDA_HOME={home})")
        return str(nvcc)
    if nvcc := shutil.which("nvcc"):
        return nvcc
    raise missing(
        "nvcc is not on PATH, and CUDA_HOME is not set: install the CUDA toolkit, or set CUDA_HOME"
    )


def host_compiler() -> list[str]:
    """What nvcc is told of the C++ compiler; nothing where it finds one itself."""
    if compiler := os.environ.get("CXX"):
        if shutil.which(compiler) is None:
            raise missing(f"there is no C++ compiler {compiler!r} (CXX)")
        return ["-ccbin", compiler]
    if not os.environ.get("NVCC_CCBIN") and shutil.which("g++") is None:
        raise missing("there is no C++ compiler: install g++, or name another in CXX")
    return []


def find_ninja() -> str:
    """The ninja of the build environment, or the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        if found := shutil.which("ninja"):
            return found
        raise missing("ninja is not installed: pip install ninja") from None
    return str(Path(BIN_DIR) / "ninja")


def python_headers() -> str:
    """Where Python.h is."""
    folder = sysconfig.get_paths()["include"]
    if not (Path(folder) / "Python.h").is_file():
        raise missing(f"there is no Python.h in {folder}: install Python's development files")
    return folder


def pybind11_headers(folder: Path) -> str:
    """Where pybind11's headers are, seen from `folder`: a copy, at a place that stays.

    Those of an isolated build are gone after it, and the next would have to compile again.
    """
    try:
        import pybind11
    except ImportError:
        raise missing("pybind11 is not installed: pip install pybind11") from None
    copy = folder / f"pybind11-{pybind11.__version__}"
    if not copy.is_dir():
        incomplete = copy.with_suffix(".incomplete")
        shutil.copytree(pybind11.get_include(), incomplete, dirs_exist_ok=True)
        incomplete.rename(copy)
    return copy.name


def architectures(nvcc: str) -> list[str]:
    """What to compile for, such as 80, 90, 100: each is known to nvcc."""
    listed = os.environ.get("GCOND_CUDA_ARCHS") or ARCHITECTURES
    names = re.split(r"[;, ]+", listed.strip())
    if not all(re.fullmatch(r"\d{2,3}", name) and int(name) >= 80 for name in names):
        raise missing(
            f"GCOND_CUDA_ARCHS={listed!r} is no list of architectures from 80 on such as 80;90;100"
        )
    names.sort(key=int)  # the last one's PTX is for GPUs to come
    try:
        answer = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise missing(f"{nvcc} does not run: {error}") from None
    known = sorted({int(number) for number in re.findall(r"compute_(\d+)", answer.stdout)})
    for name in names:
        if int(name) not in known:
            raise missing(
                f"{nvcc} does not know sm_{name}: set GCOND_CUDA_ARCHS to some of "
                f"{';'.join(map(str, known))}, or install another CUDA toolkit"
            )
    return names


def targets(names: list[str]) -> list[str]:
    """What nvcc is told to compile for: these, and code that later GPUs compile for themselves."""
    codes = [(name, f"sm_{name}") for name in names] + [(names[-1], f"compute_{names[-1]}")]
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in codes]


def words(arguments: list[str]) -> str:
    """A command's arguments as the shell reads them, once ninja has read them."""
    return shlex.join(arguments).replace("$", "$$")


def build_file(module: str, folder: Path) -> str:
    """What ninja is told: it works in `folder`, and makes `module` there.

    Paths are relative: then it does not matter what characters are in that of this project.
    """
    nvcc, names = find_nvcc(), architectures(find_nvcc())
    tool = words([nvcc, *host_compiler()])
    lines = [
        RULES.format(nvcc=tool, compiler_flags=COMPILER_FLAGS, linker_flags=LINKER_FLAGS),
        f"cuda = {words(targets(names))}",
    ]
    said = ", ".join([*(f"sm_{name}" for name in names), f"PTX {names[-1]}"])
    # Only these see Python: the kernels serve any.
    python = [f"-I{pybind11_headers(folder)}", f"-I{python_headers()}"]
    lines.append(f"""python = {words([*python, f'-DGCOND_ARCHITECTURES="{said}"'])}""")
    for source in SOURCES:
        lines.append(f"build {source}.o: compile ../../../csrc/{source}")
        lines.append(f"  options = {'$python' if source.endswith('.cpp') else '$cuda'}")
    objects = " ".join(f"{source}.o" for source in SOURCES)
    lines.append(f"build {module}: link {objects} | exports")
    return "\n".join([*lines, f"default {module}", ""])


def write_if_new(file: Path, text: str) -> None:
    """Writes a file that ninja compares the age of."""
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)


class BuildCuda(build_ext):
    """Writes a build.ninja and runs it: in parallel, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles csrc/ and links it to where setuptools wants the module."""
        ninja = find_ninja()
        result = Path(self.get_ext_fullpath(ext.name)).absolute()
        version = f"cp{sys.version_info.major}{sys.version_info.minor}"
        folder = ROOT / "build" / "cuda" / version
        folder.mkdir(parents=True, exist_ok=True)
        write_if_new(folder / "exports", EXPORTS)
        (folder / "build.ninja").write_text(build_file(result.name, folder))
        if subprocess.run([ninja, "-C", str(folder)]).returncode:
            raise missing("their compilation failed, as said above")
        result.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / result.name, result)


def check_machine() -> None:
    """Raises what can be known to be missing before an environment is made for the build."""
    if not sys.platform.startswith("linux"):
        raise missing(f"they are built on Linux, not on {sys.platform}")
    architectures(find_nvcc())
    host_compiler()
    python_headers()


def options() -> dict[str, object]:
    """What setup() is told beyond pyproject.toml."""
    if not wanted():
        return {}
    check_machine()
    told: dict[str, object] = {
        "ext_modules": [Extension("gcond_kernels._cuda", [f"csrc/{name}" for name in SOURCES])],
        "cmdclass": {"build_ext": BuildCuda},
    }
    # By this command pip and build ask what to install for an isolated build: only here, for the
    # pure wheel needs neither. Said to any other, setuptools would fetch them by itself.
    if "egg_info" in sys.argv:
        told["setup_requires"] = ["pybind11>=2.12", "ninja>=1.11"]
    return told


try:
    told = options()
except SetupError as error:
    sys.exit(f"error: {error}")  # without a traceback, as setup() ends
setup(**told)
