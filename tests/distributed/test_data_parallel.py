"""DistributedDataParallel around the model: kept from reducing gradients, and found by itself."""

import copy
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import distributed_training as t


def buffers_of_batchnorm():
    """Buffers after three steps, the first without data on rank 1; whether the wrapper reduces."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    wrapped = DistributedDataParallel(model)
    reduces = [wrapped.require_backward_grad_sync]
    optimizer = t.new_optimizer(wrapped, "shard", steps=1)
    optimizer = t.new_optimizer(wrapped, "shard", steps=1)  # as in a cell of a notebook run again
    reduces.append(wrapped.require_backward_grad_sync)
    for step in range(3):
        idle = step == 0 and dist.get_rank() == 1
        t.window(optimizer, wrapped, [] if idle else t.numbers_of(step, count=1))
    buffers = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
    reduces.append(wrapped.require_backward_grad_sync)
    del optimizer
    return buffers, [*reduces, wrapped.require_backward_grad_sync]


def test_buffers_are_those_of_rank_0_and_the_wrapper_reduces_again_afterwards(ranks2):
    assert t.of_all(ranks2(buffers_of_batchnorm))[1] == [True, False, False, True]


def test_copy_of_an_optimizer_is_none_of_the_model():
    model = t.new_model()
    optimizer = t.new_optimizer(model, **t.distributed("shard", model))
    assert optimizer.module is model
    assert optimizer.distributed.strategy == "shard"
    copied = copy.deepcopy(optimizer)
    assert copied.module is copied.distributed.module is None


def buffers_that_are_views():
    """A buffer with gaps in memory, and a module that broadcasts none."""
    rank = dist.get_rank()
    seen = []
    for broadcast in (True, False):
        model = t.new_model()
        memory = torch.full((3, 4), float(rank))
        model.register_buffer("gaps", memory[:, 1:3])
        model = DistributedDataParallel(model, broadcast_buffers=broadcast)
        model.gaps = None
        model.module.gaps = memory[:, 1:3]
        memory.fill_(float(rank))
        t.window(t.new_optimizer(model, "shard", steps=1), model, [0])
        seen.append(memory.tolist())
    return seen


def test_buffers_with_gaps_and_buffers_that_are_not_broadcast(ranks2):
    (sent, kept), (of_rank_0, own) = ranks2(buffers_that_are_views)
    assert sent == [[0.0] * 4] * 3
    assert of_rank_0 == [[1.0, 0.0, 0.0, 1.0]] * 3
    assert kept == [[0.0] * 4] * 3
    assert own == [[1.0] * 4] * 3


def with_parameter_of_another_optimizer(fused_losses):
    """DistributedDataParallel that the optimizer cannot take: slower, not wrong."""
    model = t.new_model()
    if not fused_losses:
        del model.unused
    model.another = nn.Parameter(torch.ones(()))
    model = DistributedDataParallel(model)
    named = [(n, p) for n, p in model.named_parameters() if p is not model.module.another]
    adamw = torch.optim.AdamW(named, lr=1e-2)
    optimizer = t.GCondFused(adamw, t.TASKS, accumulation_steps=t.MICRO_BATCHES, momentum=0.5)

    def loss(task, number):
        return t.losses_of(model, number)[task] + 0.0 * model.module.another

    try:
        for step in range(5):
            for number in t.numbers_of(step):
                losses = t.losses_of(model, number)
                if not fused_losses:
                    losses = {task: lambda k=task, n=number: loss(k, n) for task in t.TASKS}
                optimizer.backward(losses)
            model.module.another.grad = None
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return t.parameters_of(model), model.require_backward_grad_sync


def test_wrapper_with_a_parameter_of_another_optimizer_is_left_alone(ranks2):
    parameters, reduces = t.of_all(ranks2(with_parameter_of_another_optimizer, False))
    assert reduces is True
    alone = t.train_alone(2, {}, 5)[0]
    del alone["unused"], parameters["another"]
    t.assert_close(parameters, alone)


def test_error_of_a_wrapper_that_is_left_alone_says_why(ranks2):
    for message in ranks2(with_parameter_of_another_optimizer, True):
        assert "set optimizer.module = model" in message
        assert "It was left alone: module.another is in no parameter group" in message


def found(kind, net=t.Net, idle=False):
    """DistributedDataParallel that is found; "assigned" is given in the second window.

    Returns:
        Parameters; whether the wrapper reduces before, in training, and afterwards; a buffer.
    """
    rank = dist.get_rank()
    model = t.new_model(net=net)
    assigned = kind == "assigned"
    if assigned:
        optimizer = t.new_optimizer(model)
        t.window(optimizer, model, t.numbers_of(0))
    model = DistributedDataParallel(model)
    model.module.register_buffer("own", torch.tensor(float(rank)))
    if not assigned:
        optimizer = t.new_optimizer(model)
    reduces = [model.require_backward_grad_sync]
    for step in range(1 if assigned else 0, 5):
        for number in [] if idle and (step, rank) == (0, 1) else t.numbers_of(step):
            losses = (t.loss_functions if kind == "functions" else t.losses_of)(model, number)
            if assigned:
                optimizer.module = model
                optimizer.module = None
                assert optimizer.module is model
            optimizer.backward(losses)
        optimizer.step()
    reduces.append(model.require_backward_grad_sync)
    del optimizer
    reduces.append(model.require_backward_grad_sync)
    return t.parameters_of(model), reduces, model.module.own.item()


@pytest.mark.parametrize("net", [t.Net, t.Headed])
@pytest.mark.parametrize("kind", ["tensors", "functions", "assigned"])
def test_wrapper_that_was_not_given_is_found(ranks2, kind, net):
    """Its first forward pass is made by then, and has parameters that no loss reaches."""
    results = ranks2(found, kind, net)
    parameters, reduces = t.of_all(results)
    t.assert_close(parameters, t.train_alone(2, {"net": net}, 5)[0])
    assert reduces == [True, False, True]
    assert results[1][2] == 0.0  # the buffer of rank 0


def test_wrapper_is_found_also_on_a_rank_without_a_backward_pass(ranks2):
    parameters, reduces = t.of_all(ranks2(found, "tensors", t.Net, True))
    assert reduces == [True, False, True]
    t.assert_close(parameters, t.train_alone(2, counts=[(3, 0), *[(3, 3)] * 4])[0])


def static_graph(optimizer, model):
    optimizer.module = DistributedDataParallel(model, static_graph=True)


def not_all_parameters(optimizer, model):
    model.another = nn.Linear(2, 2)
    optimizer.module = DistributedDataParallel(model)


def no_module(optimizer, _):
    optimizer.module = "model"


def wrapped_for_other_ranks(model):
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return DistributedDataParallel(model, process_group=groups[dist.get_rank()])


def other_ranks(optimizer, model):
    optimizer.module = wrapped_for_other_ranks(model)


def other_ranks_found(optimizer, model):
    wrapped = wrapped_for_other_ranks(model)
    optimizer.backward(t.losses_of(wrapped, 0))


def cannot_be_called_off(optimizer, model):
    name = "gcond_kernels.distributed.data_parallel.can_call_off"
    wrapped = DistributedDataParallel(model)
    with mock.patch(name, return_value=False):
        optimizer.backward(t.losses_of(wrapped, 0))


ASSIGNED_WRONGLY = {
    static_graph: "ValueError: module: DistributedDataParallel's static_graph=True",
    not_all_parameters: "ValueError: module: module.another.weight is in no parameter group",
    no_module: "TypeError: module must be a torch.nn.Module, not 'model'",
    other_ranks: r"ValueError: module: .* has ranks \[[01]\], and this GCondFused \[0, 1\]",
    other_ranks_found: r"RuntimeError: .* has ranks \[[01]\], and this GCondFused \[0, 1\]",
    cannot_be_called_off: r"RuntimeError: .* set optimizer.module = model before",
}


def assigned(wrongly):
    """How a model that does not go with the optimizer is refused, given late."""
    model, optimizer = t.new_training()
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        wrongly(optimizer, model)
    return f"{error.type.__name__}: {error.value}", optimizer._storage.counts


@pytest.mark.parametrize("wrongly", ASSIGNED_WRONGLY)
def test_model_that_does_not_go_with_the_optimizer(ranks2, wrongly):
    for message, counts in ranks2(assigned, wrongly):
        assert re.match(ASSIGNED_WRONGLY[wrongly], message), message
        assert counts == [0, 0, 0]


def two_trainings():
    """Ranks 0 and 1 train one model, ranks 2 and 3 another, in process groups of the wrappers."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, place = divmod(dist.get_rank(), 2)
    model = DistributedDataParallel(t.new_model(), process_group=groups[pair])
    optimizer = t.new_optimizer(model, "shard")
    for step in range(4):
        t.window(optimizer, model, [n + 7 * pair for n in t.numbers_of(step, place)])
    return t.parameters_of(model)


def two_trainings_alone(pair):
    model, optimizer = t.new_training(None, 2 * t.MICRO_BATCHES)
    for step in range(4):
        t.window(optimizer, model, [n + 7 * pair for n in t.numbers_of_all(step, (3, 3))])
    return t.parameters_of(model)


def test_process_group_of_the_wrapper_is_taken(ranks4):
    first, _, second, _ = results = ranks4(two_trainings)
    for pair in (0, 1):
        parameters = t.of_all(results[2 * pair : 2 * pair + 2])
        t.assert_close(parameters, two_trainings_alone(pair))
    assert not t.equal(first, second)
