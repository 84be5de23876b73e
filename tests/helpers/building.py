"""Builds of the project: from its sdist, and where programs are missing or fail."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.project import copy_of_the_project


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    return subprocess.run([str(word) for word in command], **options)


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


class Machine:
    """A copy of the project, and stand-ins for all that a build needs of its environment."""

    def __init__(self, folder: Path, stand_ins: dict[str, str]):
        self.source = copy_of_the_project(folder / "source")
        self.programs, self.modules = folder / "bin", folder / "modules"
        for name, script in stand_ins.items():
            program(self.programs / name, script)
        self.modules.mkdir()
        (self.modules / "ninja.py").write_text(f"BIN_DIR = {str(self.programs)!r}")
        (self.modules / "pybind11").mkdir()
        (self.modules / "pybind11" / "__init__.py").write_text(
            "__version__ = '1'\ndef get_include():\n    return __path__[0]\n"
        )

    def lose(self, name: str) -> None:
        """Remove a program, a module of Python, or both."""
        if name:
            (self.programs / name).unlink(missing_ok=True)
        if name in ("ninja", "pybind11"):
            shutil.rmtree(self.modules / name, ignore_errors=True)
            (self.modules / f"{name}.py").write_text("raise ImportError")

    def run(self, *command, **variables: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.programs), "PYTHONPATH": str(self.modules)}
        environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        return run(sys.executable, *command, cwd=self.source, env=environment | variables)


def sdist(folder: Path) -> Path:
    """Make the sdist of a copy of the project, and unpack it."""
    source = copy_of_the_project(folder / "source")
    options = ("--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", folder)
    run(sys.executable, "-m", "build", *options, source, check=True)
    (made,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(made, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked
