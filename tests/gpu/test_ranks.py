"""Several GPUs: equal on all of them, and equal to one process that sees all the data."""

import pytest
import torch

from gcond_kernels import ops
from tests.helpers import distributed_training as t
from tests.helpers.ranks import Ranks

GPUS = min(4, torch.cuda.device_count()) if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(GPUS < 2, reason=f"it takes two GPUs, there are {GPUS}"),
]


@pytest.fixture(scope="module", params=["nccl", "cpu:gloo,cuda:nccl"])
def ranks(tmp_path_factory, request):
    ranks = Ranks(GPUS, tmp_path_factory.mktemp("ranks"), request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"mode": "stochastic"}])
@pytest.mark.parametrize("parallelism", [*t.STRATEGIES, "fsdp"])
def test_ranks_decide_as_one_process_that_sees_all_data(ranks, parallelism, options, backend):
    reason = ops.unavailable(backend, torch.device("cuda:0"))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    parameters, _ = t.of_all(ranks(t.train, parallelism, {**options, "backend": backend}))
    # Other matrix products than the CPU's, carried on over 20 steps.
    t.assert_close(parameters, t.train_alone(GPUS, options)[0], atol=1e-3)


@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_other_numbers_of_micro_batches(ranks, strategy):
    counts = [[2, 3, 0, 1][:GPUS], [0, 3, 1, 1][:GPUS], [3, 0, 2, 2][:GPUS]]
    parameters, decisions = t.of_all(ranks(t.train, strategy, None, None, counts))
    alone, decisions_alone = t.train_alone(GPUS, counts=counts)
    assert decisions[-1].micro_batches == decisions_alone[-1].micro_batches
    t.assert_close(parameters, alone, atol=1e-3)
