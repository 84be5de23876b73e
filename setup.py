"""Builds the package; everything static is in pyproject.toml.

The C++ kernels of the CPU, in csrc/cpu/, become the extension module `gcond_kernels._cpu`. Where
they cannot be compiled the package is built without them, and the reason is written where the
module would be: `python -m gcond_kernels info` prints it. With GCOND_BUILD_CPU=1 in the environment
that is an error; with 0 the package is built without them.

With GCOND_BUILD_CUDA=1 the CUDA C++ kernels, in csrc/cuda/, are compiled too, into
`gcond_kernels._cuda`, by nvcc and ninja. Neither module needs torch.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, SetupError

ROOT = Path(__file__).parent.absolute()
CXX = os.environ.get("CXX")  # the C++ compiler, where somebody has chosen one
CPU_MODULE, CUDA_MODULE = "gcond_kernels._cpu", "gcond_kernels._cuda"
PACKAGE = ROOT / "gcond_kernels"
ARCHITECTURES = "80;90;100"
KERNELS = [
    f"cuda/{name}.cu" for name in ("resolve", "gramian", "combine", "arbitrate", "accumulate")
]
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

# Vector code is chosen in the sources, by the processor's abilities: one build serves every one.
CPU_COMPILER_FLAGS = [
    *("-std=c++17", "-O3", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno"),
    *("-Wall", "-Wno-unknown-pragmas"),
]
CPU_LINKER_FLAGS = ["-pthread", *(["-ldl"] if sys.platform == "linux" else [])]
WHY_MISSING = "_cpu_missing.txt"  # read by gcond_kernels/ops/built.py

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


@contextmanager
def asked_for(kernels: str, variable: str) -> Iterator[None]:
    """Add to an error of the build who wants it, and what there is without."""
    try:
        yield
    except SetupError as error:
        raise SetupError(
            f"{variable}=1 asks for the {kernels}, but {error}. "
            "Without the variable the package builds without them."
        ) from None


def find_nvcc() -> str:
    """Return the path of nvcc, in CUDA_HOME or else on PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        where = f"in {home}/bin (CUDA_HOME)" if home else "on PATH, and CUDA_HOME is not set"
        raise SetupError(f"there is no nvcc {where}: install the CUDA toolkit, or set CUDA_HOME")
    return nvcc


def host_compiler_options() -> list[str]:
    """Return nvcc's options for the C++ compiler; none where nvcc finds one itself."""
    by_nvcc = not CXX and os.environ.get("NVCC_CCBIN")
    if not by_nvcc and shutil.which(CXX or "g++") is None:
        raise SetupError(f"there is no C++ compiler {CXX or 'g++'!r}: install g++, or set CXX")
    return ["-ccbin", CXX] if CXX else []


def find_ninja() -> str:
    """Return the path of ninja, in the build environment or else on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        if ninja := shutil.which("ninja"):
            return ninja
        raise SetupError("ninja is not installed: pip install ninja") from None
    return str(Path(BIN_DIR) / "ninja")


def python_headers() -> str:
    """Return the folder of Python.h."""
    folder = sysconfig.get_paths()["include"]
    if not (Path(folder) / "Python.h").is_file():
        raise SetupError(f"there is no Python.h in {folder}: install Python's development files")
    return folder


def import_pybind11() -> Any:
    """Return the module that has the folder of pybind11's headers."""
    try:
        import pybind11
    except ImportError:
        raise SetupError("pybind11 is not installed: pip install pybind11") from None
    return pybind11


def copy_pybind11_headers(folder: Path) -> str:
    """Copy pybind11's headers into the folder of the build, and return the name of the copy.

    Those of an isolated build are deleted after it: the next one would compile everything again.
    """
    pybind11 = import_pybind11()
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
        raise SetupError(
            f"GCOND_CUDA_ARCHS={listed!r} is no list of architectures from 80 on such as 80;90;100"
        )
    try:
        answer = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"{nvcc} does not run: {error}") from None
    known = sorted(set(re.findall(r"compute_(\d+)", answer)), key=int)
    if unknown := sorted(set(names) - set(known)):
        raise SetupError(
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


def build_cuda(module: Path) -> None:
    """Compile the CUDA C++ kernels by ninja, and copy the module to where it is wanted."""
    ninja = find_ninja()
    folder = ROOT / "build" / "cuda" / str(sys.implementation.cache_tag)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "exports").write_text(EXPORTS)
    (folder / "build.ninja").write_text(build_file(module.name, folder))
    if subprocess.run([ninja, "-C", str(folder)]).returncode:
        raise SetupError("their compilation failed, as shown above")
    shutil.copy2(folder / module.name, module)


def cpu_module(optional: bool) -> Extension:
    """Return the module of the CPU's kernels, with its sources as they are in the checkout."""
    folders = [ROOT / "csrc" / name for name in ("cpu", "common")]
    files = {
        kind: sorted(str(path.relative_to(ROOT)) for f in folders for path in f.glob(f"*.{kind}"))
        for kind in ("cpp", "h")
    }
    return Extension(
        CPU_MODULE,
        files["cpp"],
        depends=[*files["h"], "setup.py"],
        extra_link_args=CPU_LINKER_FLAGS,
        language="c++",
        optional=optional,
    )


def find_compiler() -> str:
    """Return the command of a C++ compiler: CXX, that of Python's own build, or another on PATH."""
    if sys.platform == "win32":
        raise SetupError("they are compiled by g++ or clang++ on Linux and macOS, not on Windows")
    configured = sysconfig.get_config_var("CXX") or "c++"
    commands = [CXX] if CXX else [configured, "c++", "g++", "clang++"]
    for command in commands:
        if shutil.which(shlex.split(command)[0]):
            return command
    raise SetupError(f"there is no C++ compiler {commands[0]!r}: install g++, or set CXX")


def is_older(made: Path, sources: list[str]) -> bool:
    """Return whether a file is missing, or older than one of its sources."""
    return not made.exists() or made.stat().st_mtime < max(map(os.path.getmtime, sources))


class BuildModules(build_ext):
    """Compiles the extension modules: in parallel, and only what has changed."""

    def finalize_options(self) -> None:
        """Choose the folder of an editable install's objects: setuptools would delete them."""
        super().finalize_options()
        if self.editable_mode:
            name = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / name)

    def run(self) -> None:
        """Make the modules, by a C++ compiler that is there."""
        with suppress(SetupError):
            os.environ["CXX"] = find_compiler()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Make a module where setuptools wants it, or write there why the CPU's is missing."""
        module = Path(self.get_ext_fullpath(ext.name)).absolute()
        module.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == CUDA_MODULE:
            with asked_for("CUDA C++ kernels", "GCOND_BUILD_CUDA"):
                build_cuda(module)
            return
        reason = module.with_name(WHY_MISSING)
        for old in (module, reason):
            old.unlink(missing_ok=True)
        try:
            self.build_cpu(ext)
        except SetupError as error:
            if not ext.optional:
                with asked_for("C++ kernels of the CPU", "GCOND_BUILD_CPU"):
                    raise
            reason.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"the C++ kernels of the CPU are not built: {error}")

    def build_cpu(self, ext: Extension) -> None:
        """Compile the kernels of the CPU, as many sources at once as there are processors."""
        python_headers()
        find_compiler()
        ext.include_dirs = [import_pybind11().get_include()]
        # Python's own flags have -g, which would make the module ten times as large.
        ext.extra_compile_args = [*CPU_COMPILER_FLAGS, "-O1" if self.debug else "-g0"]
        compile_sources = self.compiler.compile

        def compile_one(source: str, **options: Any) -> str:
            (made,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if self.force or is_older(Path(made), [source, *ext.depends]):
                compile_sources([source], **options)
            return str(made)

        def compile_in_parallel(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                return list(threads.map(lambda source: compile_one(source, **options), sources))

        self.compiler.compile = compile_in_parallel
        try:
            super().build_extension(ext)
        except CCompilerError as error:
            raise SetupError("their compilation failed: pip install -v shows how") from error
        finally:
            self.compiler.compile = compile_sources

    def copy_extensions_to_source(self) -> None:
        """Copy the modules into the checkout, or the reason why the CPU's is missing."""
        super().copy_extensions_to_source()
        if CPU_MODULE in (ext.name for ext in self.extensions):
            for name in (Path(self.get_ext_filename(CPU_MODULE)).name, WHY_MISSING):
                built, copy = Path(self.build_lib, "gcond_kernels", name), PACKAGE / name
                copy.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy2(built, copy)


def wanted(variable: str) -> str:
    """Return what an environment variable asks for: 1, 0, or nothing."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{variable} must be 1 or 0, not {value!r}")
    return value


def setup_options() -> dict[str, Any]:
    """Return the options of setup() beyond pyproject.toml.

    Raises:
        SetupError: something is missing that can be known before the build has an environment.
    """
    options: dict[str, Any] = {"ext_modules": [], "cmdclass": {"build_ext": BuildModules}}
    cpu, cuda = wanted("GCOND_BUILD_CPU"), wanted("GCOND_BUILD_CUDA")
    if cpu == "1":
        with asked_for("C++ kernels of the CPU", "GCOND_BUILD_CPU"):
            find_compiler()
            python_headers()
    if cpu != "0":
        options["ext_modules"].append(cpu_module(optional=cpu != "1"))
    if cuda == "1":
        with asked_for("CUDA C++ kernels", "GCOND_BUILD_CUDA"):
            if not sys.platform.startswith("linux"):
                raise SetupError(f"they are built on Linux, not on {sys.platform}")
            architectures(find_nvcc())
            host_compiler_options()
            python_headers()
        sources = [f"csrc/{name}" for name in KERNELS + BINDINGS]
        options["ext_modules"].append(Extension(CUDA_MODULE, sources))
        # pip and build run this command to learn what an isolated build needs. With any other
        # command setuptools would install it by itself.
        if "egg_info" in sys.argv:
            options["setup_requires"] = ["ninja>=1.11"]
    return options


try:
    options = setup_options()
except SetupError as error:
    sys.exit(f"error: {error}")  # without a traceback, as setup() ends
setup(**options)
