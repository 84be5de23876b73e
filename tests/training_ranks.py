"""What the ranks do in tests: a small training, in any of the ways to spread it, and in one process."""

import copy
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from gcond_kernels import GCond, GCondFused

TASKS = {"a": 0.7, "b": 1.0, "c": 0.4}
STEPS = 20
MICRO_BATCHES = 3  # of a rank in a window
WAYS = ("shard", "replicate", "local")
# Ways in which every rank sees data of its own, those in which all see the same, and half of each.
SPREAD = ("fsdp", "hsdp", "tp", "fsdp_tp")


class Net(nn.Module):
    """Of sizes that no number of ranks divides, with a norm that tensor parallelism leaves alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 8)
        self.third = nn.Linear(8, 5)
        self.last = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = self.norm(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.third(torch.tanh(self.second(x)))))


def new_model(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def losses_of(model, number, tasks=TASKS):
    """Losses that pull apart, on the micro-batch of this number."""
    generator = torch.Generator().manual_seed(number)
    y = model(torch.randn(4, 6, generator=generator).to(next(model.parameters()).dtype))
    y = y.float()
    losses = {
        "a": (y[:, 0] - 1).pow(2).mean(),
        "b": (y[:, 0] + y[:, 1] + 1).pow(2).mean(),
        "c": (y.sum(1) - 0.5).abs().mean(),
    }
    return {task: losses[task] for task in tasks}


def data_rank(way, rank, size):
    """Whose data a rank sees, and how many there are."""
    if way == "tp":
        return 0, 1
    return (rank // 2, size // 2) if way == "fsdp_tp" else (rank, size)


def spread(model, way, size):
    """The model as it is trained."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )
    from torch.nn.parallel import DistributedDataParallel

    if way in WAYS:
        return DistributedDataParallel(model)
    if way == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "shards"))
    elif way == "fsdp_tp":
        whole = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        mesh, tensor = whole["data"], whole["tensor"]
    else:
        mesh = tensor = init_device_mesh("cpu", (size,), mesh_dim_names=("all",))
    if way in ("tp", "fsdp_tp"):
        plan = {
            "first": ColwiseParallel(output_layouts=None),
            "second": ColwiseParallel(),
            "third": RowwiseParallel(),
        }
        plan["first"] = ColwiseParallel(output_layouts=_replicate())
        parallelize_module(model, tensor, plan)
    if way != "tp":
        for layer in (model.second, model.third):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _replicate():
    from torch.distributed.tensor import Replicate

    return Replicate()


def new_optimizer(model, way=None, steps=MICRO_BATCHES, base=torch.optim.AdamW, lr=1e-2, **options):
    options = {"momentum": 0.5, "method": GCond(), **options}
    if way in WAYS:
        options |= {"sync": way, "module": model}
    adamw = base(model.named_parameters(), lr=lr)
    return GCondFused(adamw, TASKS, accumulation_steps=steps, **options)


def number_of(step, data, position):
    return 10_000 * step + 100 * data + position


def window(optimizer, model, numbers, ready=None):
    """Micro-batches of these numbers, and a step."""
    for number in numbers:
        optimizer.backward(losses_of(model, number, optimizer.active_tasks))
    if ready is not None:
        ready(optimizer)
    optimizer.step()


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def parameters_of(model):
    return {
        name.removeprefix("module."): whole(parameter)
        for name, parameter in model.named_parameters()
    }


def decision_of(optimizer):
    report = optimizer.report()
    return report.weights, report.conflicts, report.winners, report.norm_ema, report.gradient_norm


def train(way, options=None, counts=None, steps=STEPS):
    """A training in this rank: parameters, decisions of all steps.

    Args:
        way: how the model is spread.
        options: of the optimizer.
        counts: micro-batches of each rank in a window; None is as many for all.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    model = spread(new_model(), way, size)
    optimizer = new_optimizer(model, way, **(options or {}))
    data, _ = data_rank(way, rank, size)
    decisions = []
    for step in range(steps):
        count = MICRO_BATCHES if counts is None else counts[(rank + step) % size]
        window(optimizer, model, [number_of(step, data, i) for i in range(count)])
        decisions.append(decision_of(optimizer))
    return parameters_of(model), decisions


def train_alone(ranks, options=None, counts=None, steps=STEPS):
    """The same in one process, which sees the data of that many ranks."""
    model = new_model()
    per_rank = [MICRO_BATCHES] * ranks if counts is None else counts
    optimizer = new_optimizer(model, steps=sum(per_rank), **(options or {}))
    decisions = []
    for step in range(steps):
        # First the first of all ranks: in stochastic mode that is the order of the blocks.
        had = [per_rank[(rank + step) % ranks] for rank in range(ranks)]
        numbers = [
            number_of(step, rank, position)
            for position in range(max(had))
            for rank in range(ranks)
            if position < had[rank]
        ]
        window(optimizer, model, numbers)
        decisions.append(decision_of(optimizer))
    return parameters_of(model), decisions


def train_local(ranks, options=None, steps=STEPS):
    """What sync="local" stands for: each rank's own decisions, the mean of the results."""
    models = [new_model() for _ in range(ranks)]
    optimizers = [new_optimizer(model, **(options or {})) for model in models]
    for step in range(steps):
        for data, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for position in range(MICRO_BATCHES):
                optimizer.backward(losses_of(model, number_of(step, data, position)))
            optimizer.resolve()
        for together in zip(*(model.parameters() for model in models), strict=True):
            gradients = [p.grad for p in together if p.grad is not None]
            if gradients:
                mean = sum(gradients) / ranks
                for gradient in gradients:
                    gradient.copy_(mean)
        for optimizer in optimizers:
            optimizer.step()
    return parameters_of(models[0])


@contextmanager
def counted_traffic():
    """Bytes that one rank sends at least, by collective, while this is open.

    Of a reduce-scatter or an all-gather of n bytes that is n (P - 1) / P, of an all-reduce twice.
    """
    sent, size = {}, dist.get_world_size()

    def counting(name, shares, tensor_of):
        original = getattr(dist, name)

        def collective(*args, **kwargs):
            tensor = tensor_of(args)
            moved = shares * tensor.numel() * tensor.element_size() * (size - 1) / size
            sent.setdefault(name, []).append(moved)
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, collective)

    with (
        counting("all_reduce", 2, lambda args: args[0]),
        counting("reduce_scatter_tensor", 1, lambda args: args[1]),
        counting("all_gather_into_tensor", 1, lambda args: args[0]),
    ):
        yield sent


def copy_of(tree):
    return copy.deepcopy(tree)


def trained_on(way, folder, save_after=None, steps=STEPS, options=None, base=torch.optim.AdamW):
    """A training that is saved after some steps, or goes on from what was saved there.

    Every step's window is that of one process that sees everything: so the number of ranks changes
    nothing but rounding. `way` None is one process.
    """
    import torch.distributed.checkpoint as dcp

    from gcond_kernels import TrainingState

    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    data, of = (0, 1) if way is None else data_rank(way, rank, size)
    model = new_model() if way is None else spread(new_model(), way, size)
    optimizer = new_optimizer(model, way, steps=4 // of, base=base, **(options or {}))
    state = {"training": TrainingState(model, optimizer)}
    start = 0
    if save_after is None:
        dcp.load(state, checkpoint_id=folder)
        start = int(optimizer._now.counters[0])
    decisions = []
    for step in range(start, steps):
        window(optimizer, model, [number_of(step, 0, i) for i in range(data, 4, of)])
        decisions.append(decision_of(optimizer))
        if save_after == step + 1:
            dcp.save(state, checkpoint_id=folder)
    return parameters_of(model), decisions
