"""FSDP2 whose modules are told to keep their gradients."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.helpers import distributed_training as t


def without_sync(kind, given):
    """One module is to keep its gradients, in the second micro-batch of two windows.

    Returns:
        Parameters; of each window the error, and the counts of the tasks after it.
    """
    model = t.new_model()
    if kind == "all_reduce":
        shape = (dist.get_world_size(), 1)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
        for module in (model.second, model):
            fully_shard(module, mesh=mesh)
    else:
        t.parallelize(model, "fsdp")
    optimizer = t.new_optimizer(model, **t.distributed(module=model if given else None))
    call = "all_reduce" if kind == "all_reduce" else "gradient_sync"
    switch = getattr(model.second, f"set_requires_{call}")
    errors = []
    for step in range(2):
        first, second, third = t.numbers_of(step)
        optimizer.backward(t.losses_of(model, first))
        before = optimizer._storage.accumulators.clone()
        losses = t.losses_of(model, second)

        def turned_off(losses=losses):
            switch(False)
            return losses["a"]

        attempt = losses
        if kind == "in a function":
            attempt = {task: lambda x=loss: x for task, loss in losses.items()} | {"a": turned_off}
        else:
            turned_off()
        with pytest.raises(RuntimeError) as error:
            optimizer.backward(attempt)
        assert torch.equal(before, optimizer._storage.accumulators)
        errors.append((str(error.value), list(optimizer._storage.counts)))
        switch(True)
        if kind == "in a function":  # the window begins anew
            optimizer.backward(t.losses_of(model, first))
            losses = t.losses_of(model, second)
        optimizer.backward(losses)
        optimizer.backward(t.losses_of(model, third))
        optimizer.step()
    return t.parameters_of(model), errors


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", ["gradient_sync", "all_reduce", "in a function"])
def test_module_that_is_to_keep_its_gradients(ranks2, kind, given):
    """It is named before anything has changed, and training goes on from there."""
    call = "all_reduce" if kind == "all_reduce" else "gradient_sync"
    for parameters, errors in ranks2(without_sync, kind, given):
        for error, counts in errors:
            assert f"set_requires_{call}(False) was called on second, a Linear, that" in error
            assert "holds second.weight" in error
            assert counts == ([0, 0, 0] if kind == "in a function" else [1, 1, 1])
        t.assert_close(parameters, t.train_alone(2, {}, 2)[0])


def without_all_reduce():
    """On a mesh of one dimension, where there is nothing to all-reduce."""
    model, optimizer = t.new_training("fsdp")
    model.second.set_requires_all_reduce(False)
    t.train_steps(model, optimizer, range(2))
    return t.parameters_of(model)


def test_all_reduce_may_be_left_out_where_there_is_none(ranks2):
    t.assert_close(t.of_all(ranks2(without_all_reduce)), t.train_alone(2, {}, 2)[0])


def loss_that_is_a_dtensor():
    """Each rank has the sum of its own part: the loss is their sum."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = torch.nn.Parameter(distribute_tensor(torch.arange(4.0), mesh, [Shard(0)]))
    optimizer = t.GCondFused(torch.optim.SGD([p], lr=0.1), {"a": 0.5, "b": 1.0})
    optimizer.backward({"a": p.square().sum(), "b": p.full_tensor().sum()})
    return optimizer.report().losses


def test_the_value_of_a_loss_that_is_a_dtensor_is_that_of_all_ranks(ranks2):
    assert ranks2(loss_that_is_a_dtensor) == [{"a": 14.0, "b": 6.0}] * 2
