"""Building the C++ kernels of the CPU: with a compiler, without one, and with one that fails.

A stand-in takes the place of the compiler, but for the tests of the module that a real one makes.
"""

import os
import re
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

from gcond_kernels.ops import built
from tests.helpers.building import Machine, program, run, sdist
from tests.helpers.project import ROOT, copy_of_the_project

SOURCES = {path.name for folder in ("cpu", "common") for path in ROOT.glob(f"csrc/{folder}/*.cpp")}
CONFIGURED = str(sysconfig.get_config_var("CXX")).split()[0]
MODULE = f"gcond_kernels/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
NOTE = "gcond_kernels/_cpu_missing.txt"
# Makes the file behind -o, and adds its arguments to a list.
COMPILER = """
echo "$@" >> calls
while [ "$1" != -o ]; do shift; done
: > "$2"
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its compiler is another one")


class CpuMachine(Machine):
    """A machine with a C++ compiler that makes empty files."""

    def build(self, **variables: str) -> subprocess.CompletedProcess:
        """Build the module in its place, as an editable install does."""
        return self.run("setup.py", "build_ext", "--inplace", **variables)

    def wheel(self, **variables: str) -> Path:
        """Build a wheel."""
        options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "made", ".")
        result = self.run("-m", "pip", "wheel", *options, **variables)
        assert result.returncode == 0, result.stdout
        (made,) = (self.source / "made").iterdir()
        return made

    def compiled(self) -> set[str]:
        """Return the sources that were compiled since this was called before."""
        calls = self.source / "calls"
        text = calls.read_text() if calls.exists() else ""
        calls.unlink(missing_ok=True)
        return set(re.findall(r" -c csrc/\w+/(\S+)", text))


@pytest.fixture
def machine(tmp_path):
    return CpuMachine(tmp_path, {CONFIGURED: COMPILER})


def test_with_a_compiler_the_wheel_has_the_module(machine):
    wheel = machine.wheel()
    assert re.search(r"-cp\d+-cp\d+-linux_\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert MODULE in names
    assert NOTE not in names
    assert machine.compiled() == SOURCES


def test_without_a_compiler_the_wheel_has_the_reason(machine):
    machine.lose(CONFIGURED)
    names = zipfile.ZipFile(machine.wheel()).namelist()
    assert NOTE in names
    assert MODULE not in names


def test_without_the_kernels_the_wheel_is_pure(machine):
    wheel = machine.wheel(GCOND_BUILD_CPU="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not {MODULE, NOTE} & set(zipfile.ZipFile(wheel).namelist())
    assert not machine.compiled()


FAILURES = [
    (CONFIGURED, {}, f"there is no C++ compiler '{CONFIGURED}"),
    ("", {"CXX": "/nonexistent"}, "there is no C++ compiler '/nonexistent': install g++, or set"),
    ("pybind11", {}, "pybind11 is not installed: pip install pybind11"),
    ("", {"CXX": "false"}, "their compilation failed: pip install -v shows how"),
]


@pytest.mark.parametrize(("lost", "variables", "reason"), FAILURES)
def test_where_it_cannot_be_built_the_build_goes_on_and_says_why(
    machine, lost, variables, reason, monkeypatch
):
    machine.lose(lost)
    program(machine.programs / "false", "exit 1")
    result = machine.build(**variables)
    assert result.returncode == 0, result.stdout
    assert "Traceback" not in result.stdout
    assert f"the C++ kernels of the CPU are not built: {reason}" in result.stdout
    assert not (machine.source / MODULE).exists()
    monkeypatch.setattr(built, "_REASON", machine.source / NOTE)
    assert built.why_cpu_is_not_built().startswith(f"its C++ extension is not built: {reason}")


@pytest.mark.parametrize(("lost", "variables", "reason"), FAILURES)
def test_where_it_is_asked_for_that_is_an_error(machine, lost, variables, reason):
    machine.lose(lost)
    program(machine.programs / "false", "exit 1")
    result = machine.build(GCOND_BUILD_CPU="1", **variables)
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("error: GCOND_BUILD_CPU=1 asks for the C++ kernels of the CPU, but ")
    assert reason in last
    assert "Traceback" not in result.stdout


def test_the_variable_is_checked(machine):
    result = machine.build(GCOND_BUILD_CPU="yes")
    assert result.returncode == 1
    assert "GCOND_BUILD_CPU must be 1 or 0, not 'yes'" in result.stdout


def test_another_compiler_serves_where_that_of_python_is_missing(machine):
    machine.lose(CONFIGURED)
    program(machine.programs / "clang++", COMPILER)
    assert machine.build().returncode == 0
    assert (machine.source / MODULE).exists()


def test_only_what_has_changed_is_compiled_again(machine):
    assert machine.build().returncode == 0
    assert machine.compiled() == SOURCES
    assert machine.build().returncode == 0
    assert machine.compiled() == set()
    later = time.time() + 10
    os.utime(machine.source / "csrc" / "cpu" / "module.cpp", (later, later))
    assert machine.build().returncode == 0
    assert machine.compiled() == {"module.cpp"}
    os.utime(machine.source / "csrc" / "common" / "tensors.h", (later + 10, later + 10))
    assert machine.build().returncode == 0
    assert machine.compiled() == SOURCES


def test_a_checkout_has_the_module_or_the_reason_why_not(machine):
    module, note = machine.source / MODULE, machine.source / NOTE
    for variables, there, missing in (
        ({}, module, note),
        ({"CXX": "/nonexistent"}, note, module),
        ({}, module, note),
    ):
        assert machine.build(**variables).returncode == 0
        assert there.exists()
        assert not missing.exists()


# The module as a real compiler makes it.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel of the sdist in isolation, without torch."""
    folder = tmp_path_factory.mktemp("cpu_wheel")
    return build(sdist(folder), folder)


def build(source: Path, folder: Path) -> Path:
    environment = os.environ | {"GCOND_BUILD_CPU": "1", "GCOND_BUILD_CUDA": "0"}
    options = ("--wheel", "--outdir", folder / "made")
    result = run(sys.executable, "-m", "build", *options, source, env=environment)
    assert result.returncode == 0, result.stdout
    (made,) = (folder / "made").glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_of_the_sdist_serves_by_its_module(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    result = run(sys.executable, "-m", "gcond_kernels", "info", env=environment, cwd=tmp_path)
    assert re.search(r"accumulate +cpu ", result.stdout), result.stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", tmp_path / MODULE).stdout)
    assert needed
    for library in needed:
        assert re.fullmatch(r"(lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)|ld-linux.*)\.so\.\d+", library)


@pytest.mark.slow
def test_the_wheels_of_the_checkout_and_of_the_sdist_have_the_same_files(wheel, tmp_path):
    other = build(copy_of_the_project(tmp_path / "source"), tmp_path)
    assert other.name == wheel.name
    assert zipfile.ZipFile(other).namelist() == zipfile.ZipFile(wheel).namelist()
