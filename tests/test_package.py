"""The package as it is installed, imported and asked about itself."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gcond_kernels
from gcond_kernels import __main__ as command_line
from gcond_kernels import info, ops
from gcond_kernels.ops import backends
from tests.helpers.project import ROOT, copy_of_the_project

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

# The backends, by the names that they are installed under, and their folders in the project.
BACKENDS = {
    "cpu": "csrc/cpu",
    "cuda": "csrc/cuda",
    "python": "python",
    "triton_kernels": "triton_kernels",
}


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist in an isolated environment that has no torch."""
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--outdir", folder, source],
        check=True,
        capture_output=True,
        env=os.environ | {"GCOND_BUILD_CPU": "0", "GCOND_BUILD_CUDA": "0"},
    )
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_of_the_project(folder / "source"), folder)


def test_the_wheel_is_pure_and_complete(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    # No top-level `python` or `tests`, nothing compiled, and nothing to compile.
    sources = {f"gcond_kernels/{name}" for name in ("py.typed", "_cpu.pyi", "_cuda.pyi")} | {
        f"gcond_kernels/{path.relative_to(ROOT / 'gcond_kernels')}"
        for path in (ROOT / "gcond_kernels").rglob("*.py")
    }
    for backend, folder in BACKENDS.items():
        sources |= {f"gcond_kernels/{backend}/{file.name}" for file in (ROOT / folder).glob("*.py")}
    assert names == sources


@pytest.mark.slow
def test_the_wheel_from_the_sdist_has_the_same_files(wheel, tmp_path):
    shutil.unpack_archive(
        build("sdist", copy_of_the_project(tmp_path / "source"), tmp_path), tmp_path
    )
    (unpacked,) = tmp_path.glob("gcond_kernels-*/")
    from_sdist = build("wheel", unpacked, tmp_path)
    assert zipfile.ZipFile(from_sdist).namelist() == zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkout_and_an_editable_install_import_the_backends_of_this_project(backend):
    spec = importlib.util.find_spec(f"gcond_kernels.{backend}")
    assert Path(spec.origin).resolve() == ROOT / BACKENDS[backend] / "__init__.py"


def test_what_the_wheel_requires(wheel):
    metadata = next(
        zipfile.ZipFile(wheel).read(name).decode()
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith("METADATA")
    )
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    always = [line for line in needs if "extra ==" not in line]
    assert len(always) == 3
    assert any("torch>=2.11" in line for line in always)
    assert any("numpy" in line for line in always)
    assert any("triton" in line and "linux" in line for line in always)
    extras = {line for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    assert len(extras) <= 3


@pytest.mark.slow
def test_the_wheel_works_from_elsewhere_without_triton_or_demo_packages(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = """
import sys
for name in ("triton", "matplotlib", "rich", "skimage", "sklearn"):
    sys.modules[name] = None  # importing it raises ImportError
import torch, gcond_kernels, gcond_kernels.__main__
assert "installed" in gcond_kernels.__file__
p = torch.nn.Parameter(torch.ones(3))
optimizer = gcond_kernels.GCondFused(torch.optim.SGD([p], lr=1.0), {"a": 1.0, "b": 1.0})
optimizer.backward({"a": p.sum(), "b": -0.9 * p.sum()})
optimizer.step()
assert optimizer.report().zone == "critical"
print("fine")
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "fine\n", result.stderr


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == gcond_kernels.__version__


def test_torch_is_pinned_exactly_and_no_build_requirement():
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in constraints)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not any("torch" in need for need in build)


def test_info_names_backend_and_reasons(capsys):
    assert command_line.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    cpu = torch.device("cpu")
    for operation in ops.OPERATIONS:
        assert f"{operation:<16} {ops.backend_for('auto', cpu).serves(operation)}" in printed
    if ops.backend_for("auto", cpu).serves("gramian") != "python":
        assert f"{ops.backend_for('auto', cpu).serves('gramian')} (float64: python)" in printed
    for backend in ("cuda", "triton", "cpu"):
        if ops.unavailable(backend, cpu):
            assert f"not {backend}: " in printed


def test_info_names_the_first_backend_that_is_there_on_a_gpu(monkeypatch):
    monkeypatch.delenv("GCOND_BACKEND", raising=False)
    monkeypatch.setattr(
        backends, "unavailable", lambda b, _device: "too old" if b == "cuda" else None
    )
    monkeypatch.setattr(ops, "unavailable", backends.unavailable)
    everything = SimpleNamespace(**dict.fromkeys(ops.OPERATIONS))
    monkeypatch.setattr(backends.Backend, "module", lambda _backend, _name: everything)
    lines = info._operation_lines(torch.device("cuda"))
    for operation, line in zip(ops.OPERATIONS, lines, strict=False):
        assert line.split()[:2] == [operation, "triton"]
    assert "not cuda: too old" in "\n".join(lines)


def test_the_environment_variable_chooses_the_backend(monkeypatch, capsys):
    cpu = torch.device("cpu")
    monkeypatch.setenv("GCOND_BACKEND", "python")
    assert ops.backend_for("auto", cpu).name == "python"
    monkeypatch.setenv("GCOND_BACKEND", "auto")
    first = "python" if ops.unavailable("cpu", cpu) else "cpu"
    assert ops.backend_for("auto", cpu).name == first
    monkeypatch.setenv("GCOND_BACKEND", "jax")
    with pytest.raises(RuntimeError, match="GCOND_BACKEND=jax cannot be used on cpu: there is no"):
        ops.backend_for("auto", cpu)
    assert ops.backend_for("python", cpu).name == "python"  # an argument outranks the variable
    assert command_line.main(["info"]) == 0
    assert "GCOND_BACKEND=jax cannot be used" in capsys.readouterr().out


def test_a_backend_that_is_not_there_is_an_error_that_says_why():
    for backend in ops.BACKENDS:
        reason = ops.unavailable(backend, torch.device("cpu"))
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot be used on cpu"):
                ops.backend_for(backend, torch.device("cpu"))


def test_what_a_reader_looks_for_first_is_there():
    for name in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "csrc/README.md",
        "csrc/cpu/README.md",
        "csrc/cuda/README.md",
        "triton_kernels/README.md",
    ):
        assert (ROOT / name).is_file()
