"""What all tests share."""

import os

import torch

# Without a GPU the Triton kernels run interpreted (Triton reads this when a kernel is defined), and
# those in CUDA C++ by their driver on the host.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("GCOND_CUDA_HOST", "1")

# What cuBLAS needs to be told before torch lets it run where memory is to be NaN at first.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

from gcond_kernels import ops
from tests.helpers import offload

try:
    from hypothesis import HealthCheck, Phase, settings
except ImportError:  # tests/gpu alone runs without it; the others say what they miss
    settings = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and not ops.unavailable("triton", torch.device("cpu")):
    from tests.helpers import interpreter

    interpreter.patch()

# Small tensors all over: a second thread gains nothing, and waits long where cores are shared.
torch.set_num_threads(1)

if settings is not None:
    # No deadline: the first example of a test pays for imports, and this may be a slow machine.
    COMMON = {
        "deadline": None,
        "derandomize": True,
        "suppress_health_check": [HealthCheck.function_scoped_fixture],
    }
    settings.register_profile("project", max_examples=60, **COMMON)
    # Interpreted, an example may take a second: few of them, and shown as found, not shrunk;
    # without the slow tests the first of those.
    PHASES = (Phase.explicit, Phase.generate)
    settings.register_profile("interpreted", max_examples=15, phases=PHASES, **COMMON)
    settings.register_profile("interpreted, few", max_examples=3, phases=PHASES, **COMMON)
    settings.load_profile("project")

# Where there is a GPU the kernels run on that, and by way of it serve CPU tensors.
WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = {backend: ops.unavailable(backend, WHERE) for backend in ops.BACKENDS}


def parameter(backend):
    """The backend as a parameter of tests."""
    on_gpu = backend != "python" and torch.cuda.is_available()
    return pytest.param(backend, marks=[pytest.mark.gpu] if on_gpu else [])


def slow(*values):
    """Values of a test's parameters that go further than those that are not slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)  # before those that are marked slow are deselected
def pytest_collection_modifyitems(items):
    """Of a test that goes over many parameters, interpreted kernels take the first and the last.

    Those between are slow, but for tests that are marked quick; all are in those marked
    slow_interpreted.
    """
    interpreted = {}
    for item in items if INTERPRETED else ():
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") == "triton" and item.get_closest_marker("quick") is None:
            interpreted.setdefault((item.path, item.originalname), []).append(item)
    for of_one_test in interpreted.values():
        all_slow = of_one_test[0].get_closest_marker("slow_interpreted") is not None
        for item in of_one_test if all_slow else of_one_test[1:-1]:
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter):
    """Says once, instead of for every test, which backend was not there, and why."""
    for backend, reason in MISSING.items():
        if reason is not None:
            terminalreporter.write_line(f"NOT TESTED: backend {backend!r}: {reason}")


PRESENT = [parameter(b) for b in ops.BACKENDS if MISSING[b] is None]


@pytest.fixture(params=PRESENT)
def backend(request, monkeypatch):
    """Every backend, on CPU tensors; where there is a GPU the kernels run on that."""
    interpreted = request.param == "triton" and INTERPRETED
    profile = "project"
    if interpreted and request.node.get_closest_marker("quick") is None:
        few = request.config.option.markexpr == "not slow"
        profile = "interpreted, few" if few else "interpreted"
    if hasattr(request.function, "hypothesis"):
        # Hypothesis has no public way to say this of one parameter of a test.
        request.function._hypothesis_internal_use_settings = settings.get_profile(profile)
    if request.param != "python" and torch.cuda.is_available():
        offload.install(monkeypatch, request.param)
    # Memory that an operation allocates is NaN until it is written.
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)
