"""Ranks that differ where they must not: every mistake is named on every rank."""

import copy
import math
import re
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gcond_kernels.distributed import consistency
from gcond_kernels.methods import PCGrad
from gcond_kernels.storage import collect
from gcond_kernels.storage.dtensor import shard_coordinate
from tests.helpers import distributed_training as t

MISTAKES = {}


def mistake(message):
    """Register what a rank does with a model, and how all must answer.

    It returns options of the optimizer, for one micro-batch and a step; or nothing where it has
    made its own.
    """

    def register(function):
        MISTAKES[function.__name__] = function, message
        return function

    return register


def is_rank_1():
    return dist.get_rank() == 1


def error_of(function):
    """The error of this rank in a training."""
    try:
        model = t.new_model()
        options = function(model) if callable(function) else function[dist.get_rank()]
        if options is not None:
            optimizer = t.new_optimizer(model, steps=2, **t.distributed("shard") | options)
            t.window(optimizer, model, t.numbers_of(0, count=1))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def assert_named(messages, pattern):
    for message in messages:
        assert re.match(pattern, message), message
    assert "rank 1 has" not in messages[0] or messages[0] == messages[1]


@pytest.mark.parametrize(
    ("of_rank_0", "of_rank_1", "pattern"),
    [
        ({}, {"max_norm": 2.0}, "rank 1 has max_norm=2.0, rank 0 max_norm=None"),
        (
            {"method": PCGrad(seed=0)},
            {"method": PCGrad(seed=1)},
            r"rank 1 has method=PCGrad\(seed=1\), rank 0 .*\(seed=0\)",
        ),
        (
            {"method": t.by_norm},
            {"method": t.full},
            r"rank 1 has method=[\w.]+\.full, rank 0 .*\.by_norm",
        ),
        ({}, {"granularity": "tensor"}, "rank 1 has granularity='tensor', rank 0 .*='model'"),
        ({}, {"on_nonfinite": "drop_task"}, "ranks differ in on_nonfinite"),
    ],
)
def test_setting_that_differs_is_named_on_every_rank(ranks2, of_rank_0, of_rank_1, pattern):
    assert_named(ranks2(error_of, (of_rank_0, of_rank_1)), f"RuntimeError: {pattern}")


# Parameters.


@mistake("RuntimeError: first.weight of rank 1 is not that of rank 0: load or broadcast")
def weights_in_another_order(model):
    if is_rank_1():
        model.first.weight.data = model.first.weight.data.flip(0)
    return {}


@mistake(r"RuntimeError: rank 1 has last.weight shape \[4, 5\] .*, rank 0 last.weight")
def other_shape(model):
    if is_rank_1():
        model.last = nn.Linear(5, 4)
    return {}


@mistake("RuntimeError: rank 1 has .*, rank 0 ")
def one_parameter_more(model):
    if is_rank_1():
        model.extra = nn.Parameter(torch.ones(2))
    return {}


@mistake("RuntimeError: parameters were added, .*, and the other ranks have a part of")
def late_parameter(model):
    """It comes in a window of which an accumulator was sent already."""
    optimizer = t.new_optimizer(model, mode="stochastic", **t.distributed("shard"))
    t.window(optimizer, model, range(3))
    optimizer.backward({"a": t.losses_of(model, 1)["a"]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "param_names": ["late"]})
    optimizer.backward({"b": t.losses_of(model, 2)["b"]})


@mistake("ValueError: strategy='shard' is for parameters that every rank holds in full")
def strategy_for_dtensors(model):
    t.parallelize(model, "fsdp")
    return {}


# Masks.


@mistake("RuntimeError: mask of first.weight of rank 1 is not that of rank 0")
def other_mask(model):
    return {"mask": t.mask_of(model, 0.4 if is_rank_1() else 0.6)}


@mistake("RuntimeError: rank 1 has mask=True, rank 0 mask=False")
def mask_on_one_rank(model):
    return {"mask": t.mask_of(model, 0.4)} if is_rank_1() else {}


@mistake("RuntimeError: mask of norm.weight of rank 1 is not")
def other_mask_of_a_replica(model):
    t.parallelize(model, "tp")
    return {"mask": {model.norm.weight: torch.arange(12) != is_rank_1()}} | t.distributed()


@mistake("ValueError: mask of first.weight is not sharded as the parameter")
def mask_made_before_sharding(model, dim=None):
    bits = torch.ones(12, 6, dtype=torch.bool)
    t.parallelize(model, "fsdp")
    if dim is not None:
        bits = distribute_tensor(bits, model.first.weight.device_mesh, [Shard(dim)])
    return {"mask": {model.first.weight: bits}} | t.distributed()


@mistake("ValueError: mask of first.weight is not sharded as the parameter is")
def mask_sharded_by_columns(model):
    return mask_made_before_sharding(model, dim=1)


# Wrappers.


@mistake(r"RuntimeError: rank 1 and rank 0 hold the same shard of last.weight")
def layer_that_is_not_sharded(model):
    for name, child in model.named_children():
        if name != "last":
            fully_shard(child)
    return t.distributed()


@mistake("RuntimeError: rank 1 and rank 0 hold the same shard of .*process_group")
def two_trainings_in_one(model):
    """Every rank is sharded for itself, on a mesh of one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))
    fully_shard(model, mesh=mesh["b"])
    return t.distributed()


@mistake(r"RuntimeError: set_is_last_backward\(False\) was called on the model")
def gradients_not_waited_for(model):
    t.parallelize(model, "fsdp").set_is_last_backward(False)
    return t.distributed()


@mistake("RuntimeError: the gradient of .* was put back .*optimizer.module = ")
def not_the_wrapped_model(model):
    """The model inside is given, and the gradients come in more than one bucket."""
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    with mock.patch.object(collect, "BUCKET_BYTES", 1):
        optimizer = t.new_optimizer(model, **t.distributed(module=model))
        optimizer.backward({"a": t.losses_of(wrapped, 0)["a"]})


# Calls.


@mistake("RuntimeError: with several ranks a state is saved between windows")
def saved_in_a_window(model):
    optimizer = t.new_optimizer(model, **t.distributed("shard"))
    optimizer.backward(t.losses_of(model, 0))
    optimizer.state_dict()


@mistake("RuntimeError: an optimizer that is one of several ranks cannot be copied")
def copied(model):
    copy.deepcopy(t.new_optimizer(model, **t.distributed("shard")))


# State.


def trained(model):
    """An optimizer after a step, and its state."""
    optimizer = t.new_optimizer(model, steps=2, **t.distributed("shard"))
    t.window(optimizer, model, [0, 1])
    return optimizer, copy.deepcopy(optimizer.state_dict())


@mistake(r"RuntimeError: rank 1 has resolutions so far=1, rank 0 .*=2")
def state_of_one_rank(model):
    optimizer, saved = trained(model)
    t.window(optimizer, model, [2, 3])
    if is_rank_1():
        optimizer.load_state_dict(saved)
    t.window(optimizer, model, [4, 5])


@mistake("RuntimeError: rank 1 has .*parameters that require a gradient, rank 0")
def thawed_on_one_rank(model):
    optimizer, _ = trained(model)
    model.extra = nn.Parameter(torch.ones(2), requires_grad=is_rank_1())
    optimizer.add_param_group({"params": [model.extra], "param_names": ["extra"]})
    t.window(optimizer, model, [2, 3])


@mistake(r"RuntimeError: rank 1 has options of base=.*'lr': 0.5")
def other_learning_rate(model):
    optimizer, _ = trained(model)
    if is_rank_1():
        optimizer.param_groups[0]["lr"] = 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    t.window(optimizer, model, [2, 3])


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_on_every_rank(ranks2, name):
    function, pattern = MISTAKES[name]
    assert_named(ranks2(error_of, function), pattern)


# What needs no processes.


def parameter_on(mesh, *placements):
    return SimpleNamespace(parameter=SimpleNamespace(device_mesh=mesh, placements=placements))


def mesh_of(coordinate, *shape):
    """A device mesh as far as it is asked; another one with each call."""
    return mock.Mock(get_coordinate=lambda: coordinate, shape=shape)


def test_coordinates_and_number_of_a_shard():
    data, tensor, both = mesh_of([1], 2), mesh_of([0], 2), mesh_of([1, 0], 2, 4)
    parameters = [
        parameter_on(data, Shard(0)),
        parameter_on(tensor, Shard(0)),
        parameter_on(both, Replicate(), Shard(1)),
        SimpleNamespace(parameter=torch.ones(2)),
    ]
    coordinates = [shard_coordinate(one.parameter) for one in parameters]
    assert coordinates == [((1,), (2,)), ((0,), (2,)), ((0,), (4,)), ((), ())]
    assert consistency.shard_number(parameters) == 0
    assert consistency.shard_number([parameters[0], parameter_on(data, Shard(0))]) == 1
    # Of another mesh, though this rank has the same coordinate there.
    assert consistency.shard_number([parameters[0], parameter_on(mesh_of([1], 2), Shard(0))]) == 0
    assert consistency.shard_number([parameter_on(mesh_of([1, 2], 2, 4), Shard(1), Shard(0))]) == 6


def test_first_mismatch_of_ranks_that_hold_the_same():
    replicas = [consistency.ranks_by_coordinate(where) for where in ("xyxy", "zzzz")]
    assert replicas == [[[0, 2], [1, 3]], [[0, 1, 2, 3]]]
    mismatch = partial(consistency.first_mismatch, replicas=replicas)
    same = [[[1.0], [2.0]], [[5.0], [2.0]], [[1.0], [2.0]], [[5.0], [2.0]]]
    nan = [[[math.nan], [2.0]]] * 4
    assert mismatch(same, rel_tol=1e-6) is None
    assert mismatch(nan, rel_tol=1e-6) is None
    other = [*same[:3], [[5.1], [2.0]]]
    assert mismatch(other, rel_tol=1e-3) == (0, 3, 1)
    assert mismatch(other, rel_tol=1e-3, abs_tol=0.2) is None
    other = [*same[:3], [[5.0], [math.nan]]]
    assert mismatch(other, rel_tol=1e-3) == (1, 3, 0)
