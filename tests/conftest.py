"""What all tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings

from gcond_kernels import ops

# Small tensors all over: a second thread gains nothing, and waits long where cores are shared.
torch.set_num_threads(1)

# No deadline: the first example of a test pays for imports, and this may be a slow machine.
settings.register_profile(
    "project",
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("project")


@pytest.fixture(params=[b for b in ops.BACKENDS if not ops.unavailable(b, torch.device("cpu"))])
def backend(request) -> str:
    """Every backend that serves CPU tensors here."""
    return request.param
