"""The process groups of the package, beside those of the user."""

import inspect
import json
import re
import threading
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from gcond_kernels import TrainingState
from gcond_kernels.distributed import process_group
from gcond_kernels.distributed.process_group import ALL_GATHER, REDUCE_SCATTER
from tests.helpers import distributed_training as t

CALLS = ("all_reduce", "broadcast", "all_gather_object", "barrier", ALL_GATHER, REDUCE_SCATTER)


def train_beside_async_save(parallelism, folder):
    """A training beside dcp.async_save, whose thread alone sends in the default group."""
    if parallelism == "fsdp":
        model = fully_shard(t.new_model(), mesh=DeviceMesh.from_group(dist.new_group(), "cpu"))
    else:
        model = t.parallelize(t.new_model(), parallelism)
        model.module.register_buffer("own", torch.zeros(2))
    in_default, trains = [], threading.current_thread()

    def note(name, _, kwargs):
        if threading.current_thread() is trains and kwargs.get("group") is None:
            in_default.append(name)

    optimizer = t.new_optimizer(model, parallelism)
    decisions, saving = [], None
    with t.watched(CALLS, note):
        for step in range(8):
            if step % 2 == 1:
                if saving is not None:
                    saving.result()
                state = {"training": TrainingState(model, optimizer)}
                saving = dcp.async_save(state, checkpoint_id=f"{folder}/{step}")
            decisions += t.train_steps(model, optimizer, [step])
        saving.result()
    assert in_default == []
    return t.parameters_of(model), decisions


@pytest.mark.parametrize("parallelism", ["fsdp", "shard"])
def test_nothing_is_sent_in_the_users_group(ranks2, tmp_path, parallelism):
    """There dcp.async_save's thread sends, beside training; its checkpoints are complete."""
    parameters, _ = t.of_all(ranks2(train_beside_async_save, parallelism, str(tmp_path)))
    t.assert_close(parameters, t.train_alone(2, {}, 8)[0])
    for step in (1, 3, 5, 7):
        assert (tmp_path / str(step) / ".metadata").exists()


def group_that_cannot_be_made():
    with (
        mock.patch.object(dist, "new_group", side_effect=RuntimeError("no route")),
        pytest.raises(RuntimeError) as error,
    ):
        t.new_optimizer(t.new_model(), **t.distributed("shard"))
    return str(error.value)


def test_error_of_a_group_that_cannot_be_made_says_what_to_do(ranks2):
    for message in ranks2(group_that_cannot_be_made):
        assert re.search(r"ranks \[0, 1\] .* cannot be made: no route.*GLOO_SOCKET_IFNAME", message)


def train_in_another_order():
    """A process group of the user's whose ranks are not in the order of the job."""
    group = dist.new_group([1, 0], sort_ranks=False)
    rank = dist.get_rank(group)
    model = t.new_model()
    optimizer = t.new_optimizer(model, **t.distributed("shard", process_group=group))
    assert optimizer._rank_strategy.group.rank == rank
    decisions = t.train_steps(model, optimizer, range(4), rank)
    return t.parameters_of(model), decisions, history_of(model, optimizer)


def history_of(model, optimizer):
    """The history of the first task with its scale, by the names of the parameters."""
    state = TrainingState(model, optimizer).state_dict()["optimizer"]
    of_method = json.loads(state["param_groups"][0]["gcond"]["method"])
    _, (scale, *_) = of_method["history_scale"]
    return {
        name: t.full(kept["gcond"]["history"]["0"]) * scale for name, kept in state["state"].items()
    }


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters,
    reason="this torch sorts the ranks of a group",
)
def test_ranks_in_another_order_than_in_the_job(ranks2):
    results = ranks2(train_in_another_order)
    t.assert_close(t.of_all(results)[0], t.train_alone(2, {}, 4)[0])
    model, optimizer = t.new_training(None, 2 * t.MICRO_BATCHES)
    for step in range(4):
        t.window(optimizer, model, t.numbers_of_all(step, (3, 3)))
    history = history_of(model, optimizer)
    for _, _, of_ranks in results:  # each has put the shards of all in their places
        t.assert_close(of_ranks, history, 1e-2)


def saved_by_one_rank(strategy, caller):
    """The entries of the state, or the error, of a rank that saves alone; then of all together."""
    model, optimizer = t.new_training(strategy, net=t.Used)
    t.window(optimizer, model, t.numbers_of(0))
    alone = None
    with mock.patch.object(process_group, "PATIENCE", timedelta(seconds=1)):
        try:
            if dist.get_rank() == caller:
                alone = len(optimizer.state_dict()["state"])
        except RuntimeError as error:
            alone = str(error)
    dist.barrier()
    return alone, len(optimizer.state_dict()["state"])


def test_error_on_a_rank_that_saves_alone_names_the_missing_ranks(ranks2):
    for caller in (0, 1):
        results = ranks2(saved_by_one_rank, "shard", caller)
        assert re.match(
            rf"rank {1 - caller} did not call state_dict\(\) within 1 s after rank {caller}: "
            'call it on all ranks, or use strategy="replicate"',
            results[caller][0],
        )
        assert results[1 - caller] == (None, 16)
        assert results[caller][1] == 16  # together with the other it may again
    assert ranks2(saved_by_one_rank, "replicate", 1) == [(None, 16), (16, 16)]
