"""What ranks send, when they send it, and in whose memory."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gcond_kernels.distributed.process_group import ALL_GATHER, REDUCE_SCATTER
from tests.helpers import distributed_training as t

# Of n bytes a reduce-scatter or an all-gather sends n (P - 1) / P, an all-reduce twice as many; and
# which argument has the n bytes.
COLLECTIVES = {"all_reduce": (2, 0), REDUCE_SCATTER: (1, 1), ALL_GATHER: (1, 0)}


def traffic_of(strategy, granularity="model", dtype=None, net=t.Net):
    """Bytes sent in the third window, by collective; lengths of accumulators, history, momentum."""
    model = t.new_model(dtype, net)
    del model.unused
    model = t.parallelize(model, strategy)
    optimizer = t.new_optimizer(model, strategy, granularity=granularity)
    t.train_steps(model, optimizer, range(2))
    sent, size = {}, dist.get_world_size()

    def note(name, args, _):
        factor, argument = COLLECTIVES[name]
        share = factor * (size - 1) / size
        sent.setdefault(name, []).append(share * args[argument].nbytes)

    with t.watched(COLLECTIVES, note):
        t.window(optimizer, model, t.numbers_of(2))
    storage = optimizer._storage
    kept = [list(storage.history.shape), list(storage.momentum.shape)]
    sent = {name: sorted(moved) for name, moved in sent.items()}
    return sent, storage.accumulators.shape[1], kept


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_on_the_wire(ranks, size):
    """(K + 1) N elements, not 2 K N; beside them one all-reduce of the inner products."""
    K = len(t.TASKS)
    sent, length, kept = ranks(size)(traffic_of, "shard")[0]
    share = (size - 1) / size
    assert sent[REDUCE_SCATTER] == [4 * length * share] * K
    assert sent[ALL_GATHER][-1] == 4 * length * share
    assert kept == [[K, length // size], [length // size]]
    small = sent[ALL_GATHER][:-1] + sent["all_reduce"]
    assert len(small) == 3
    assert sum(small) < 4 * length

    sent, length, kept = ranks(size)(traffic_of, "replicate")[0]
    assert sent["all_reduce"][-K:] == [2 * 4 * length * share] * K
    assert REDUCE_SCATTER not in sent
    assert len(sent["all_reduce"]) == K + 1
    assert kept == [[K, length], [length]]


def test_inner_products_with_the_history_travel_by_tensor_only_where_needed(ranks2):
    """S, X, losses and S of each tensor, in float64; X of each too where not all are shared."""
    K = len(t.TASKS)
    for net in (t.Net, t.Headed):
        T = len(list(t.new_model(net=net).parameters())) - 1  # without the one that is not used
        for granularity in ("model", "tensor"):
            sent, _, _ = ranks2(traffic_of, "shard", granularity, None, net)[0]
            each = 1 if (net, granularity) == (t.Net, "model") else 2
            # Of two ranks each sends as much as it has.
            assert sum(sent["all_reduce"]) == 8 * K**2 * (2 + each * T) + 8 * K


def test_the_result_travels_in_the_type_of_the_gradients(ranks2):
    sent, length, _ = ranks2(traffic_of, "shard", "model", torch.bfloat16)[0]
    assert sent[ALL_GATHER][-1] == 2 * length / 2


def accumulators_sent(strategy, mode):
    """How many accumulators were sent when each loss function of two windows was called."""
    model, optimizer = t.new_training(strategy, mode=mode)
    sent = []

    def loss(task, number):
        sent.append(optimizer._rank_strategy.sent)
        return t.losses_of(model, number)[task]

    for step in range(2):
        for number in t.numbers_of(step, data=0):
            optimizer.backward(
                {task: lambda k=task, n=number: loss(k, n) for task in optimizer.active_tasks}
            )
        optimizer.step()
    return sent


@pytest.mark.parametrize(("strategy", "last"), [("replicate", 2), ("shard", 1)])
def test_accumulators_are_sent_while_the_next_task_runs(ranks2, strategy, last):
    """Not in the first window, before which the ranks have not compared their parameters.

    A shard goes where an accumulator was that must have arrived, for which a host does not wait.
    """
    for mode, before in (("exact", 15), ("stochastic", 3)):
        assert ranks2(accumulators_sent, strategy, mode)[0] == [0] * before + [0, 1, last]


def memory_of(dtype):
    """Whether shards and `.grad` lie in the accumulators, after a step of K tasks."""
    results = []
    for K in (1, 2, 3, 6):
        model = nn.parallel.DistributedDataParallel(t.new_model(dtype))
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        tasks = {str(k): 1.0 for k in range(K)}
        optimizer = t.GCondFused(sgd, tasks, **t.distributed(module=model))
        y = model(torch.ones(2, 6, dtype=dtype)).float()
        optimizer.backward({task: (y - int(task)).pow(2).mean() for task in tasks})
        shards = optimizer._rank_strategy._shards()
        optimizer.step()
        memory = optimizer._storage.accumulators.untyped_storage().data_ptr()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        inside = {gradient.untyped_storage().data_ptr() == memory for gradient in gradients}
        results.append((shards.untyped_storage().data_ptr() == memory, inside))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_result_take_no_memory_beside_the_accumulators(ranks2, dtype):
    one, *more = ranks2(memory_of, dtype)[0]
    assert more == [(True, {True})] * 3
    # One float32 accumulator is shard and result at once; what is narrower has no space beside it.
    assert one == (True, {dtype == torch.float32})
