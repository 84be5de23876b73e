"""Builds the package; everything static is in pyproject.toml.

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
ARCHITECTURES = "80;90;100"
KERNELS = [f"cuda/{name}.cu" for name in ("resolve", "gramian", "combine", "arbitrate", "accumulate")]
BINDINGS = ["cuda/module.cpp", "common/tensors.cpp"]  # only these include Python's headers

# Products and sums are rounded apart, on the GPU and on the host, except where the code says fmaf.
COMPILER_FLAGS = (
    "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,"
    "-fno-strict-aliasing,-Wall,-Wno-unknown-pragmas"
)
# CUDA's runtime becomes part of the module, and other libraries of the process see nothing of it.
# No kernel calls one of another file: there is no device code to link.
LINKER_FLAGS = (
    "-shared -cudart static -nodlink -Xlinker --exclude-libs,ALL,--version-script,exports"
)
EXPORTS = "{ global: PyInit__cuda; local: *; };\n"

# Paths are relative, so that it does not matter what characters are in that of this project.
BUILD_FILE = """cuda = {cuda_options}
python = {python_options}
rule compile
  command = {nvcc} {compiler_flags} $options -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {nvcc} {linker_flags} $in -o $out
  description = link $out
{objects}
build {module}: link {object_names}
"""


def missing(what: str) -> SetupError:
    """Return the error of a build that cannot be done."""
    return SetupError(
        f"GCOND_BUILD_CUDA=1 asks for the CUDA C++ kernels, but {what}. "
        "Without the variable the package builds without them."
    )


def find_nvcc() -> str:
    """Return the path of nvcc, in CUDA_HOME or else on PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        where = f"in {home}/bin (CUDA_HOME)" if home else "on PATH, and CUDA_HOME is not set"
        raise missing(f"there is no nvcc {where}: install the CUDA toolkit, or set CUDA_HOME")
    return nvcc


def host_compiler_options() -> list[str]:
    """Return nvcc's options for the C++ compiler; none where nvcc finds one itself."""
    compiler = os.environ.get("CXX")
    by_nvcc = not compiler and os.environ.get("NVCC_CCBIN")
    if not by_nvcc and shutil.which(compiler or "g++") is None:
        raise missing(f"there is no C++ compiler {compiler or 'g++'!r}: install g++, or set CXX")
    return ["-ccbin", compiler] if compiler else []


def find_ninja() -> str:
    """Return the path of ninja, in the build environment or else on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        if ninja := shutil.which("ninja"):
            return ninja
        raise missing("ninja is not installed: pip install ninja") from None
    return str(Path(BIN_DIR) / "ninja")


def python_headers() -> str:
    """Return the folder of Python.h."""
    folder = sysconfig.get_paths()["include"]
    if not (Path(folder) / "Python.h").is_file():
        raise missing(f"there is no Python.h in {folder}: install Python's development files")
    return folder


def copy_pybind11_headers(folder: Path) -> str:
    """Copy pybind11's headers into the folder of the build, and return the name of the copy.

    Those of an isolated build are deleted after it: the next one would compile everything again.
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
    """Return what to compile for, such as 80, 90, 100, in ascending order."""
    listed = os.environ.get("GCOND_CUDA_ARCHS") or ARCHITECTURES
    names = re.split(r"[;, ]+", listed.strip())
    if not all(re.fullmatch(r"\d{2,3}", name) and int(name) >= 80 for name in names):
        raise missing(
            f"GCOND_CUDA_ARCHS={listed!r} is no list of architectures from 80 on such as 80;90;100"
        )
    try:
        answer = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise missing(f"{nvcc} does not run: {error}") from None
    known = sorted(set(re.findall(r"compute_(\d+)", answer)), key=int)
    if unknown := sorted(set(names) - set(known)):
        raise missing(
            f"{nvcc} does not know sm_{unknown[0]}: set GCOND_CUDA_ARCHS to some of "
            f"{';'.join(known)}, or install another CUDA toolkit"
        )
    return sorted(names, key=int)


def quoted(*arguments: str) -> str:
    """Return arguments as the shell reads them, once ninja has read them."""
    return shlex.join(arguments).replace("$", "$$")


def build_file(module: str, folder: Path) -> str:
    """Return the text of a build.ninja that makes `module` in `folder`."""
    nvcc = find_nvcc()
    names = architectures(nvcc)
    # Later GPUs compile the PTX of the last architecture for themselves.
    codes = [(name, f"sm_{name}") for name in names] + [(names[-1], f"compute_{names[-1]}")]
    built_for = ", ".join([*(f"sm_{name}" for name in names), f"PTX {names[-1]}"])
    return BUILD_FILE.format(
        nvcc=quoted(nvcc, *host_compiler_options()),
        compiler_flags=COMPILER_FLAGS,
        linker_flags=LINKER_FLAGS,
        cuda_options=quoted(*(f"-gencode=arch=compute_{name},code={code}" for name, code in codes)),
        python_options=quoted(
            f"-I{copy_pybind11_headers(folder)}",
            f"-I{python_headers()}",
            f'-DGCOND_ARCHITECTURES="{built_for}"',
        ),
        objects="\n".join(
            f"build {source}.o: compile ../../../csrc/{source}\n  options = ${language}"
            for language, sources in (("cuda", KERNELS), ("python", BINDINGS))
            for source in sources
        ),
        object_names=" ".join(f"{source}.o" for source in KERNELS + BINDINGS),
        module=module,
    )


class BuildCuda(build_ext):
    """Writes a build.ninja and runs it: in parallel, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Compile csrc/, and link it to where setuptools wants the module."""
        ninja = find_ninja()
        module = Path(self.get_ext_fullpath(ext.name)).absolute()
        folder = ROOT / "build" / "cuda" / str(sys.implementation.cache_tag)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "exports").write_text(EXPORTS)
        (folder / "build.ninja").write_text(build_file(module.name, folder))
        if subprocess.run([ninja, "-C", str(folder)]).returncode:
            raise missing("their compilation failed, as shown above")
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / module.name, module)


def setup_options() -> dict[str, object]:
    """Return the options of setup() beyond pyproject.toml.

    Raises:
        SetupError: something is missing that can be known before the build has an environment.
    """
    wanted = os.environ.get("GCOND_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SetupError(f"GCOND_BUILD_CUDA must be 1 or 0, not {wanted!r}")
    if wanted != "1":
        return {}
    if not sys.platform.startswith("linux"):
        raise missing(f"they are built on Linux, not on {sys.platform}")
    architectures(find_nvcc())
    host_compiler_options()
    python_headers()
    options: dict[str, object] = {
        "ext_modules": [
            Extension("gcond_kernels._cuda", [f"csrc/{name}" for name in KERNELS + BINDINGS])
        ],
        "cmdclass": {"build_ext": BuildCuda},
    }
    # pip and build run this command to learn what an isolated build needs. With any other command
    # setuptools would install these by itself.
    if "egg_info" in sys.argv:
        options["setup_requires"] = ["pybind11>=2.12", "ninja>=1.11"]
    return options


try:
    options = setup_options()
except SetupError as error:
    sys.exit(f"error: {error}")  # without a traceback, as setup() ends
setup(**options)
