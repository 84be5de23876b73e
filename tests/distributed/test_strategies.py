"""Ranks decide the same to the bit, and as one process that sees the data of all of them."""

from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from gcond_kernels import LionLars, TrainingState
from gcond_kernels.distributed.mesh import counted_range
from gcond_kernels.distributed.process_group import ProcessGroup
from gcond_kernels.methods import (
    FAMO,
    RLW,
    CAGrad,
    GCond,
    GradDrop,
    GradNorm,
    NonConflicting,
    PCGrad,
)
from gcond_kernels.storage.dtensor import local_shard
from tests.conftest import slow
from tests.helpers import distributed_training as t
from tests.helpers.models import same


def quick_first(quick, runs):
    """Some runs as they are, and the rest of all marked slow."""
    return [*quick, *(slow(*run) for run in runs if run not in quick)]


OF_TWO = ("shard", "replicate", "fsdp", "tp", "sp")
ALL = ("momentum", "clipped", "signs")
QUICK = [(2, parallelism, ALL[number % 3]) for number, parallelism in enumerate(OF_TWO)]
OTHERS = [
    *product([2], OF_TWO, ALL),
    *product([4], ["shard", "hsdp", "tp", "fsdp_tp"], ["clipped", "signs"]),
    *product([4], ["fsdp"], ["momentum", "signs"]),
]
OPTIONS = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "clipped": {"max_norm": 0.5},
    "signs": {"update": LionLars(1e-3, 3.0), "base": torch.optim.SGD, "lr": 1.0},
    "resolved": {"method": GCond(history="resolved", dominance_window=1)},
    "stochastic": {"mode": "stochastic"},
    "bfloat16": {"accumulator_dtype": torch.bfloat16},
}


@pytest.mark.parametrize(("size", "parallelism", "options"), quick_first(QUICK, OTHERS))
def test_ranks_decide_as_one_process_that_sees_all_data(ranks, size, parallelism, options):
    _, decisions, decisions_alone = t.train_both(ranks(size), parallelism, OPTIONS[options])
    assert [d.winners for d in decisions] == [d.winners for d in decisions_alone]
    assert sum(len(d.conflicts) for d in decisions) >= t.STEPS  # there is something to decide
    for ours, theirs in zip(decisions, decisions_alone, strict=True):
        assert ours.weights == pytest.approx(theirs.weights, rel=1e-3, abs=1e-3)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3)


@pytest.mark.parametrize(
    ("parallelism", "options"),
    quick_first(
        [("shard", "plain"), ("replicate", "resolved"), ("fsdp", "stochastic")],
        product(("shard", "replicate", "fsdp"), ("plain", "resolved", "stochastic")),
    ),
)
def test_other_options(ranks2, parallelism, options):
    t.train_both(ranks2, parallelism, OPTIONS[options])


@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_bfloat16_accumulators(ranks2, strategy):
    """Rounded to 8 bits at every addition, in another order: the same on all ranks, and near."""
    t.train_both(ranks2, strategy, OPTIONS["bfloat16"], 5, atol=0.05)


def test_kernels_in_cuda_cpp(ranks2):
    pytest.importorskip("gcond_kernels._cuda", reason="the CUDA C++ extension is not built")
    for parallelism in ("shard", "fsdp"):
        options = {"backend": "cuda", "max_norm": 0.5}
        parameters, _ = t.of_all(ranks2(t.train, parallelism, options, 8))
        t.assert_close(parameters, t.train_alone(2, {"max_norm": 0.5}, 8)[0])


# Other methods, with a head for each task, a mask, momentum and clipping.

# Adam without weight decay: it moves nothing that has no gradient.
HEADED = {"net": t.Headed, "share": 0.4, "max_norm": 0.5, "base": torch.optim.Adam}
METHODS = {
    "GCond": HEADED,
    "PCGrad": {**HEADED, "method": PCGrad(seed=3)},
    "CAGrad": {**HEADED, "method": CAGrad()},
    "GradNorm": {**HEADED, "method": GradNorm(lr=0.05)},
    "FAMO": {**HEADED, "method": FAMO(lr=0.1)},
    "RLW": {**HEADED, "method": RLW(seed=3)},
    "NonConflicting": {**HEADED, "method": NonConflicting(GCond())},
    "of the user": {**HEADED, "method": t.by_norm},
    "by tensor": {**HEADED, "granularity": "tensor"},
}
QUICK_METHODS = [(2, "shard", "GradNorm"), (2, "replicate", "PCGrad"), (2, "fsdp", "by tensor")]
OTHER_METHODS = [
    *product([2], ["shard", "fsdp"], METHODS),
    *product([2], ["replicate"], ["PCGrad", "GradNorm", "by tensor"]),
    (4, "shard", "by tensor"),
    (4, "fsdp_tp", "PCGrad"),
]


def assert_masked_stay(parameters):
    model = t.new_model(net=t.Headed)
    mask = t.mask_of(model, HEADED["share"])
    for name, before in model.named_parameters():
        moved = parameters[name] != before
        trained = mask.get(before, torch.ones_like(moved))
        assert not moved[~trained].any(), name
        assert name == "unused" or moved[trained].all(), name


def assert_same_decisions(decisions, others):
    for ours, theirs in zip(decisions, others, strict=True):
        assert ours.weights == pytest.approx(theirs.weights, rel=1e-3, abs=1e-3)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3)
        assert ours.norm_ratio == pytest.approx(theirs.norm_ratio, rel=1e-3)
        assert ours.descent == pytest.approx(theirs.descent, rel=1e-2, abs=1e-2)
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
        assert ours.tensor_weights.keys() == theirs.tensor_weights.keys()  # shared tensors
        for name, weights in ours.tensor_weights.items():
            assert weights == pytest.approx(theirs.tensor_weights[name], rel=1e-2, abs=1e-2), name


@pytest.mark.parametrize(
    ("size", "parallelism", "method"), quick_first(QUICK_METHODS, OTHER_METHODS)
)
def test_any_method_decides_as_one_process_that_sees_all_data(ranks, size, parallelism, method):
    both = t.train_both(ranks(size), parallelism, METHODS[method], 10)
    parameters, decisions, decisions_alone = both
    assert_same_decisions(decisions, decisions_alone)
    assert_masked_stay(parameters)
    for decision in decisions[1:]:  # there is something to decide
        assert max(abs(weight - 1.0) for weight in decision.weights.values()) > 0.01
    shared = set() if method != "by tensor" else set(parameters) - {"unused"}
    own = {name for name in shared if name.startswith("heads")}
    assert set(decisions[-1].tensor_weights) == shared - own


@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_losses_are_means_over_the_micro_batches_of_all_ranks(ranks2, strategy):
    counts = [(1, 3), (3, 1)] * 5
    both = t.train_both(ranks2, strategy, METHODS["GradNorm"], counts=counts)
    _, decisions, decisions_alone = both
    assert_same_decisions(decisions, decisions_alone)
    for ours, theirs in zip(decisions, decisions_alone, strict=True):
        for key, value in theirs.state.items():
            assert ours.state[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


# The signs of GradDrop.


def whole_numbers(parameters, generator):
    return [torch.randint(-3, 4, p.shape, generator=generator).float() for p in parameters]


def sign_dropout(strategy, ranks=None):
    """Steps of GradDrop in ranks, or in one process that sees the data of so many.

    Gradients are small whole numbers and weights powers of two, so that sums in any order are
    exact: beside a threshold by a rounding another sign would be picked, and everything differ.
    """
    rank, size = t.world() if strategy else (0, ranks)
    mine = [rank] if strategy else range(size)
    model = t.new_model(net=t.Headed)
    parameters = dict(model.named_parameters())
    optimizer = t.GCondFused(
        torch.optim.SGD(list(parameters.items()), lr=1.0),
        {"a": 1.0, "b": 0.5, "c": 2.0},
        accumulation_steps=len(mine),
        momentum=0.5,
        method=GradDrop(leak=0.25, seed=7),
        mask=t.mask_of(model, 0.7),
        **t.distributed(strategy),
    )
    steps = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        drawn = [
            {
                task: {
                    name: torch.randint(-3, 4, p.shape, generator=generator).float()
                    for name, p in parameters.items()
                    if not name.startswith("heads") or f".{task}." in name
                }
                for task in t.TASKS
            }
            for _ in range(size)
        ]
        for data in mine:
            optimizer.backward(
                {
                    task: sum((parameters[name] * n).sum() for name, n in numbers.items())
                    for task, numbers in drawn[data].items()
                }
            )
        optimizer.resolve()
        steps.append({name: p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
    return t.parameters_of(model), steps


@pytest.mark.parametrize(("size", "strategy"), [(2, "shard"), (2, "replicate"), (4, "shard")])
def test_ranks_pick_the_signs_of_one_process(ranks, size, strategy):
    results = ranks(size)(sign_dropout, strategy)
    parameters_alone, steps_alone = sign_dropout(None, size)
    parameters, steps = results[0]
    assert all(map(same, results, [results[0]] * size))
    t.assert_close(parameters, parameters_alone, 1e-5)
    for ours, theirs in zip(steps, steps_alone, strict=True):
        t.assert_close(ours, theirs, 1e-6)


class Uneven(nn.Module):
    """A layer of which two ranks hold shards of other sizes, and one that both hold in full."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 65), nn.LayerNorm(65)


def signs_of_shards(parallelism):
    """The signs that GradDrop picks of gradients of 1 and -1, of what this rank holds."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Uneven()
    if parallelism == "fsdp":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"first": ColwiseParallel()})
    sgd = torch.optim.SGD(model.named_parameters(), lr=1.0)
    optimizer = t.GCondFused(sgd, {"a": 1.0, "b": 1.0}, method=GradDrop())

    def total():
        shards = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        return sum(shard.sum() for shard in shards)

    optimizer.backward({"a": total, "b": lambda: -total()})
    optimizer.resolve()
    return {name: local_shard(p.grad).sign() for name, p in model.named_parameters()}


def test_shards_pick_signs_of_their_own_and_replicas_the_same(ranks2):
    ours, theirs = (signs["first.weight"][:32] for signs in ranks2(signs_of_shards, "fsdp"))
    assert not torch.equal(ours, theirs)
    assert abs((ours * theirs).mean()) < 0.3
    ours, theirs = ranks2(signs_of_shards, "tp")
    assert ours["first.weight"].shape == (33, 6)
    assert theirs["first.weight"].shape == (32, 6)
    assert torch.equal(ours["norm.weight"], theirs["norm.weight"])
    assert torch.equal(ours["norm.bias"], theirs["norm.bias"])


# Any parameters, in any number of tasks.


def train_mixed(strategy, options, folder=None):
    """Five steps with parameters of all sorts: every rank a part of the same micro-batches.

    Where a folder is given it is saved there in the middle, and goes on in another optimizer.
    """
    rank, size = t.world() if strategy else (0, 1)
    base = {"base": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
    options = {"net": t.Mixed, **base, **options}
    model, optimizer = t.new_training(strategy, 4 // size, **options)
    for step in range(5):
        if step == 2 and folder:
            dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
            model, optimizer = t.new_training(strategy, 4 // size, **options)
            dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
        t.window(optimizer, model, range(100 * step + rank, 100 * step + 4, size))
    return t.parameters_of(model)


@pytest.mark.parametrize("options", [{}, {"update": LionLars(clip=3.0)}])
@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_parameters_of_all_sorts(ranks2, strategy, options):
    # bfloat16 parameters keep 8 bits: a rounding that falls to the other side shows.
    ours = t.of_all(ranks2(train_mixed, strategy, options))
    t.assert_close(ours, train_mixed(None, options), atol=2e-2)


def bfloat16_accumulators_of_mixed_parameters(strategy):
    """The gradient of a float32 parameter where others are of bfloat16."""
    options = {"momentum": 0.0, "accumulator_dtype": torch.bfloat16}
    model, optimizer = t.new_training(strategy, 1, net=t.Mixed, **options)
    optimizer.backward(t.losses_of(model, 0))  # the same on every rank: sums are exact
    optimizer.resolve()
    return [p.grad.clone() for p in model.parameters()]


def test_bfloat16_accumulators_do_not_round_the_gradients_of_others(ranks2):
    alone = bfloat16_accumulators_of_mixed_parameters(None)
    for gradients in ranks2(bfloat16_accumulators_of_mixed_parameters, "shard"):
        for ours, theirs in zip(gradients, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def float64_gradients(parallelism, ranks=None):
    """Of three steps of a model in float64: in ranks, or in one process that sees their data."""
    mine = range(ranks) if ranks else [t.world()[0]]
    model, options = t.new_model(torch.float64, t.Headed), {}
    if parallelism in t.STRATEGIES:
        options = t.distributed(parallelism)
    elif parallelism:
        model = t.parallelize(model, parallelism)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = {"accumulation_steps": len(mine), "momentum": 0.5, "max_norm": 0.3}
    optimizer = t.GCondFused(sgd, t.TASKS, method=CAGrad(), **steps, **options)
    assert optimizer.accumulator_dtype == torch.float64
    found = []
    for step in range(3):
        for number in mine:
            generator = torch.Generator().manual_seed(10 * step + number)
            x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
            y, heads = model(x)
            goals = {"a": 1.0, "b": -1.0, "c": 0.3}
            own = {k: (heads[k] - goals[k]).square().mean() for k in goals}
            optimizer.backward({k: own[k] + (y - goals[k]).square().mean() for k in t.TASKS})
        found += [t.full(p.grad) for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


@pytest.mark.parametrize("parallelism", [*t.STRATEGIES, slow("fsdp")])
def test_models_in_float64(ranks2, parallelism):
    alone = float64_gradients(None, 2)
    for gradients in ranks2(float64_gradients, parallelism):
        for ours, theirs in zip(gradients, alone, strict=True):
            assert ours.dtype == torch.float64
            assert (ours - theirs).abs().max() <= 1e-13 * theirs.abs().max()


def sums_of_tasks(K, dtype):
    """A step of K tasks whose gradients are whole numbers: sums in any order are exact."""
    rank, size = t.world()
    parameters = list(t.new_model().parameters())
    sgd = torch.optim.SGD(parameters, lr=1.0)
    tasks = {str(k): 1.0 for k in range(K)}
    plain_sum = GCond(max_iterations=0, tie_breaking_weights=(0.0, 1.0))
    options = t.distributed("shard") | {"method": plain_sum, "accumulator_dtype": dtype}
    optimizer = t.GCondFused(sgd, tasks, **options)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        numbers = [whole_numbers(parameters, generator) for _ in range(size * K)]
        mine = numbers[rank * K : (rank + 1) * K]
        optimizer.backward(
            {
                task: sum((p * n).sum() for p, n in zip(parameters, of_task, strict=True))
                for task, of_task in zip(tasks, mine, strict=True)
            }
        )
        optimizer.resolve()
        wanted = [sum(n[i] for n in numbers) / size for i in range(len(parameters))]
        if not all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True)):
            return f"step {step}: not the sum"
        optimizer.step()
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, slow(4)])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 9])
def test_shards_of_any_number_of_tasks_add_up(ranks, size, K, dtype):
    assert ranks(size)(sums_of_tasks, K, dtype) == [None] * size


def sums_written_at_once():
    """The same with a reduce-scatter that writes before it is waited for."""
    original = ProcessGroup.start_sum_to_shards

    def start_sum_to_shards(self, shard, full):
        work = original(self, shard, full)
        work.wait()
        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessGroup, "start_sum_to_shards", start_sum_to_shards)
        return sums_of_tasks(3, torch.float32)


@pytest.mark.parametrize("size", [2, 4])
def test_shards_that_are_written_before_they_are_waited_for(ranks, size):
    assert ranks(size)(sums_written_at_once) == [None] * size


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1000])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_replicas_count_every_element_once(size, replicas):
    ranges = [counted_range(size, replica, replicas) for replica in range(replicas)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
