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

import offload
import pytest

from gcond_kernels import ops

try:
    from hypothesis import HealthCheck, Phase, settings
except ImportError:  # tests/gpu alone runs without it; the others say what they miss
    settings = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and not ops.unavailable("triton", torch.device("cpu")):
    import interpreter

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
    # Interpreted, an example may take a second: few of them, and shown as found, not shrunk.
    PHASES = (Phase.explicit, Phase.generate)
    settings.register_profile("interpreted", max_examples=15, phases=PHASES, **COMMON)
    settings.load_profile("project")

CPU = torch.device("cpu")


def parameter(backend):
    """The backend as a parameter of tests: on CPU tensors, by way of the GPU, or skipped."""
    reason = ops.unavailable(backend, CPU)
    if backend != "python" and torch.cuda.is_available():
        reason = ops.unavailable(backend, torch.device("cuda"))
        return pytest.param(
            backend, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason or "")]
        )
    return pytest.param(backend, marks=pytest.mark.skipif(bool(reason), reason=reason or ""))


@pytest.fixture(params=map(parameter, ops.BACKENDS))
def backend(request, monkeypatch):
    """Every backend, on CPU tensors; where there is a GPU the kernels run on that."""
    interpreted = request.param == "triton" and INTERPRETED
    few = interpreted and request.node.get_closest_marker("quick") is None
    if hasattr(request.function, "hypothesis"):
        # Hypothesis has no public way to say this of one parameter of a test.
        request.function._hypothesis_internal_use_settings = settings.get_profile(
            "interpreted" if few else "project"
        )
    if request.param != "python" and torch.cuda.is_available():
        offload.install(monkeypatch, request.param)
    # Memory that an operation allocates is NaN until it is written.
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)
