"""Several GPUs: equal on all of them, and equal to one process that sees all the data."""

import pytest
import torch

from gcond_kernels import ops
from tests.helpers import training_ranks as t
from tests.helpers.ranks import Ranks

GPUS = min(4, torch.cuda.device_count()) if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"it takes two GPUs, there are {GPUS}"),
]


@pytest.fixture(scope="module", params=["nccl", "cpu:gloo,cuda:nccl"])
def ranks(tmp_path_factory, request):
    ranks = Ranks(GPUS, tmp_path_factory.mktemp("ranks"), request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"mode": "stochastic"}])
@pytest.mark.parametrize("way", ["shard", "replicate", "fsdp"])
def test_ranks_decide_alike_and_as_one_process_that_sees_all(ranks, way, options, backend):
    reason = ops.unavailable(backend, torch.device("cuda:0"))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    said = ranks(t.train, way, {**options, "backend": backend})
    for parameters, decisions in said:
        assert all(torch.equal(parameters[name], said[0][0][name]) for name in parameters)
        assert decisions == said[0][1]
    alone, _ = t.train_alone(GPUS, options)
    for name, parameter in alone.items():
        # Other matrix products than the CPU's, carried on over 20 steps.
        torch.testing.assert_close(said[0][0][name], parameter, rtol=0, atol=1e-3, msg=name)


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_unlike_numbers_of_micro_batches(ranks, way):
    per_rank = [[2, 3, 0, 1][:GPUS], [0, 3, 1, 1][:GPUS], [3, 0, 2, 2][:GPUS]]
    said = ranks(t.short_windows, way, per_rank)
    alone, micro_batches = t.short_windows_alone(per_rank)
    for parameters, counts in said:
        assert counts == micro_batches
        for name, parameter in alone.items():
            assert torch.equal(parameters[name], said[0][0][name])
            torch.testing.assert_close(parameters[name], parameter, rtol=0, atol=1e-3, msg=name)
