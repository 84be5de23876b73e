"""Builds the package; everything static stands in pyproject.toml.

With GCOND_BUILD_CUDA=1 in the environment the CUDA C++ kernels of csrc/ are compiled too, into the
extension module `gcond_kernels._cuda`, by nvcc and ninja. They need no torch.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).parent
SOURCES = [  # the one that takes longest first
    "resolve.cu",
    "gramian.cu",
    "module.cpp",
    "combine.cu",
    "arbitrate.cu",
    "lists.cu",
    "accumulate.cu",
    "tensors.cpp",
]
ARCHITECTURES = "80;90;100"

# One rounding for a product and one for a sum, on the GPU and on the host alike, except where the
# code says fmaf.
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,"
    "-fno-strict-aliasing,-Wall,-Wno-unknown-pragmas"
)

RULES = """
ninja_required_version = 1.5
rule compile
  command = {nvcc} {flags} {targets} $includes -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {nvcc} -shared -cudart static -Xlinker --exclude-libs,ALL $in -o $out
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
    raise missing("nvcc is neither in CUDA_HOME/bin nor on PATH: install the CUDA toolkit")


def find_ninja() -> str:
    """The ninja of the build environment, or the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        if found := shutil.which("ninja"):
            return found
        raise missing("ninja is not installed: pip install ninja") from None
    return str(Path(BIN_DIR) / "ninja")


def include_folders() -> list[str]:
    """Where pybind11.h and Python.h are."""
    try:
        import pybind11
    except ImportError:
        raise missing("pybind11 is not installed: pip install pybind11") from None
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").is_file():
        raise missing(f"there is no Python.h in {python}: install Python's development files")
    return [pybind11.get_include(), python]


def targets(nvcc: str) -> tuple[str, str]:
    """What nvcc is told to compile for, and the same in words."""
    listed = os.environ.get("GCOND_CUDA_ARCHS") or ARCHITECTURES
    names = re.split(r"[;, ]+", listed.strip())
    if not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
        raise missing(f"GCOND_CUDA_ARCHS={listed!r} is no list of architectures such as 80;90;100")
    try:
        answer = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise missing(f"{nvcc} does not run: {error}") from None
    known = set(re.findall(r"compute_(\w+)", answer.stdout))
    for name in names:
        if name.rstrip("af") not in known:
            raise missing(f"{nvcc} does not know sm_{name}; it knows {', '.join(sorted(known))}")
    flags = [f"-gencode arch=compute_{name},code=sm_{name}" for name in names]
    # And code that later GPUs compile for themselves.
    flags.append(f"-gencode arch=compute_{names[-1]},code=compute_{names[-1]}")
    return " ".join(flags), ", ".join([*(f"sm_{name}" for name in names), f"PTX {names[-1]}"])


def escaped(path: object) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildCuda(build_ext):
    """Writes a build.ninja and runs it: in parallel, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles csrc/ and links it to where setuptools wants the module."""
        nvcc, ninja, includes = find_nvcc(), find_ninja(), include_folders()
        if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
            raise missing("there is no C++ compiler: install g++")
        flags, words = targets(nvcc)
        version = f"cp{sys.version_info.major}{sys.version_info.minor}"
        folder = ROOT / "build" / "cuda" / version
        folder.mkdir(parents=True, exist_ok=True)
        result = Path(self.get_ext_fullpath(ext.name)).absolute()
        result.parent.mkdir(parents=True, exist_ok=True)
        lines = [RULES.format(nvcc=escaped(nvcc), flags=NVCC_FLAGS, targets=flags)]
        objects = []
        for source in SOURCES:
            made = folder / f"{source}.o"
            objects.append(escaped(made))
            lines.append(f"build {escaped(made)}: compile {escaped(ROOT / 'csrc' / source)}")
            if source.endswith(".cpp"):  # the only ones that see Python: the kernels serve any
                options = [f"-I{escaped(path)}" for path in includes]
                options.append(f"'-DGCOND_ARCHITECTURES=\"{words}\"'")
                lines.append(f"  includes = {' '.join(options)}")
        module = folder / result.name
        lines.append(f"build {escaped(module)}: link {' '.join(objects)}")
        lines.append(f"default {escaped(module)}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        try:
            subprocess.run([ninja, "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise missing(f"ninja failed, see above: {error}") from None
        shutil.copy2(module, result)


def options() -> dict[str, object]:
    """What setup() is told beyond pyproject.toml."""
    if not wanted():
        return {}
    if not sys.platform.startswith("linux"):
        raise missing(f"they are built on Linux, not on {sys.platform}")
    find_nvcc()  # before an environment is made for nothing
    return {
        "ext_modules": [Extension("gcond_kernels._cuda", [f"csrc/{name}" for name in SOURCES])],
        "cmdclass": {"build_ext": BuildCuda},
        # pip's build isolation installs these: only here, for the pure wheel needs neither.
        "setup_requires": ["pybind11>=2.12", "ninja>=1.11"],
    }


setup(**options())
