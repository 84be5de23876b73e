"""A small training in the ranks of a process group, in any parallelism, or in one process."""

from collections import namedtuple
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gcond_kernels import Distributed, GCond, GCondFused, neuron_mask

TASKS = {"a": 0.7, "b": 1.0, "c": 0.4}
STEPS = 20
MICRO_BATCHES = 3  # of a rank in a window
# For a DistributedDataParallel; others ("fsdp", "hsdp", "tp", "sp", "fsdp_tp") are of DTensors.
STRATEGIES = ("shard", "replicate")

# Sums over ranks are added in another order than those over micro-batches in one process; twenty
# steps of AdamW carry the float32 rounding of that on, in parameters of about 1.
ROUNDING = 2e-5


class Net(nn.Module):
    """Of sizes that no number of ranks divides, with a norm that no tensor parallelism shards."""

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


class Headed(Net):
    """With a layer for each task that no other task uses."""

    def __init__(self):
        super().__init__()
        sizes = {"a": 2, "b": 1, "c": 3}
        self.heads = nn.ModuleDict({task: nn.Linear(3, size) for task, size in sizes.items()})

    def forward(self, x):
        y = super().forward(x)
        return y, {task: head(y) for task, head in self.heads.items()}


class Used(Headed):
    """Without a parameter that has no gradient, for whose state torch finds no place."""

    def __init__(self):
        super().__init__()
        del self.unused


class Mixed(nn.Module):
    """Channels-last weights, a scalar, and parameters of two types."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.narrow = nn.Linear(5, 4).to(torch.bfloat16)
        self.last = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        # Six numbers of the micro-batch, as they come, fill 3 x 4 x 4 pixels.
        image = x.float().repeat(1, 8).view(-1, 3, 4, 4)
        x = torch.tanh(self.conv(image).mean((2, 3))).to(torch.bfloat16)
        return self.last(torch.tanh(self.narrow(x)).float()) * self.scale


def device():
    """The GPU of this rank, where ranks have some."""
    on_gpus = dist.is_initialized() and "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


def world():
    """This rank, and how many there are; one process is rank 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def new_model(dtype=None, net=Net):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return net().to(device(), dtype)


def losses_of(model, number, tasks=TASKS):
    """Losses that pull apart, on the micro-batch of this number."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 6, generator=generator)
    y = model(x.to(device(), next(model.parameters()).dtype))
    y, of_heads = y if isinstance(y, tuple) else (y, {})
    y = y.float()
    losses = {
        "a": (y[:, 0] - 1).pow(2).mean(),
        "b": (y[:, 0] + y[:, 1] + 1).pow(2).mean(),
        "c": (y.sum(1) - 0.5).abs().mean(),
    }
    for task, z in of_heads.items():
        losses[task] = losses[task] + (z - 0.3).pow(2).mean()
    return {task: losses[task] for task in tasks}


def loss_functions(model, number, tasks=TASKS):
    """The same losses as functions, each with a forward pass of its own."""
    return {task: lambda task=task: losses_of(model, number)[task] for task in tasks}


def data_rank(parallelism, rank, size):
    """Whose data a rank sees, and how many there are: of tensor parallel ranks all see the same."""
    if parallelism in ("tp", "sp"):
        return 0, 1
    return (rank // 2, size // 2) if parallelism == "fsdp_tp" else (rank, size)


def parallelize(model, parallelism):
    """The model as it is trained."""
    if parallelism is None:
        return model
    if parallelism in STRATEGIES:
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    size = dist.get_world_size()
    shape = {"hsdp": (2, size // 2), "fsdp_tp": (size // 2, 2)}.get(parallelism, (size,))
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=("outer", "inner")[: len(shape)])
    if parallelism in ("tp", "fsdp_tp"):
        plan = {
            "first": tp.ColwiseParallel(output_layouts=Replicate()),
            "second": tp.ColwiseParallel(),
            "third": tp.RowwiseParallel(),
        }
        tp.parallelize_module(model, mesh["inner"] if parallelism == "fsdp_tp" else mesh, plan)
    if parallelism == "sp":
        # The norm sees a part of the samples alone: its gradient is still to be summed.
        plan = {
            "first": tp.ColwiseParallel(output_layouts=Shard(0)),
            "norm": tp.SequenceParallel(sequence_dim=0),
            "second": tp.ColwiseParallel(input_layouts=Shard(0)),
            "third": tp.RowwiseParallel(),
        }
        tp.parallelize_module(model, mesh, plan)
    if parallelism not in ("tp", "sp"):
        mesh = mesh["outer"] if parallelism == "fsdp_tp" else mesh
        for layer in (model.second, model.third, model):
            fully_shard(layer, mesh=mesh)
    return model


def distributed(strategy=None, module=None, process_group=None):
    """Options of GCondFused for several ranks."""
    return {"distributed": Distributed(strategy, module, process_group)}


def new_optimizer(
    model, parallelism=None, steps=MICRO_BATCHES, *, base=torch.optim.AdamW, lr=1e-2, **options
):
    options = {"momentum": 0.5, "method": GCond(), **options}
    if parallelism in STRATEGIES:
        options |= distributed(parallelism, model)
    return GCondFused(
        base(model.named_parameters(), lr=lr), TASKS, accumulation_steps=steps, **options
    )


def new_training(parallelism=None, steps=MICRO_BATCHES, *, net=Net, share=None, **options):
    """A model as it is trained, and its optimizer; a mask leaves a share of the weights."""
    model = parallelize(new_model(net=net), parallelism)
    if share is not None:
        options["mask"] = mask_of(model, share)
    return model, new_optimizer(model, parallelism, steps, **options)


def mask_of(model, share):
    """A part of each neuron's weights, and of a vector of which some ranks may hold nothing."""
    from torch.distributed.tensor import distribute_tensor

    mask = neuron_mask(model, share=share)
    for name, p in model.named_parameters():
        if name.removeprefix("module.") in ("norm.bias", "last.bias"):
            bits = torch.arange(p.numel(), device=p.device) % 3 < (2 if share < 0.5 else 1)
            is_dtensor = hasattr(p, "placements")
            mask[p] = distribute_tensor(bits, p.device_mesh, p.placements) if is_dtensor else bits
    return mask


def by_norm(gramian):
    """A method of the user's own: all gradients get the mean of their norms."""
    norms = gramian.diagonal().sqrt()
    return norms.mean() / norms.clamp(min=1e-12)


def number_of(step, data, position):
    return 10_000 * step + 100 * data + position


def numbers_of(step, data=None, count=MICRO_BATCHES):
    """The micro-batches of a window of this rank, or of another one's data."""
    data = world()[0] if data is None else data
    return [number_of(step, data, position) for position in range(count)]


def numbers_of_all(step, counts):
    """Those of one process that sees the data of all ranks: first the first of each.

    In stochastic mode that is the order of the blocks.
    """
    of_ranks = [numbers_of(step, data, count) for data, count in enumerate(counts)]
    return [n for of_position in zip_longest(*of_ranks) for n in of_position if n is not None]


def window(optimizer, model, numbers):
    """Micro-batches of these numbers, and a step."""
    for number in numbers:
        optimizer.backward(losses_of(model, number, optimizer.active_tasks))
    optimizer.step()


def train_steps(model, optimizer, steps, data=None):
    """The windows of these steps, on the data of this rank or another; what each decided."""
    decisions = []
    for step in steps:
        window(optimizer, model, numbers_of(step, data))
        decisions.append(decision_of(optimizer))
    return decisions


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone().cpu()


def parameters_of(model):
    return {name.removeprefix("module."): full(p) for name, p in model.named_parameters()}


OF_REPORT = (
    *("weights", "conflicts", "winners", "norm_ema", "gradient_norm", "micro_batches"),
    *("descent", "norm_ratio", "losses"),
)
Decision = namedtuple("Decision", [*OF_REPORT, "tensor_weights", "state"])


def decision_of(optimizer):
    report = optimizer.report()
    by_tensor = {name.removeprefix("module."): w for name, w in report.tensor_weights.items()}
    state = {key: value.tolist() for key, value in optimizer._resolver.method_state.items()}
    return Decision(*(getattr(report, name) for name in OF_REPORT), by_tensor, state)


def train(parallelism, options=None, steps=STEPS, counts=None):
    """A training in this rank: parameters, decisions of all steps.

    `counts` are of each step the micro-batches of every rank; None is as many for all.
    """
    rank, size = world()
    model, optimizer = new_training(parallelism, **(options or {}))
    data, _ = data_rank(parallelism, rank, size)
    decisions = []
    for step, of_ranks in enumerate(counts or [[MICRO_BATCHES] * size] * steps):
        window(optimizer, model, numbers_of(step, data, of_ranks[rank]))
        decisions.append(decision_of(optimizer))
    return parameters_of(model), decisions


def train_alone(ranks, options=None, steps=STEPS, counts=None):
    """The same in one process, which sees the data of that many ranks."""
    counts = counts or [[MICRO_BATCHES] * ranks] * steps
    model, optimizer = new_training(None, max(map(sum, counts)), **(options or {}))
    decisions = []
    for step, of_ranks in enumerate(counts):
        window(optimizer, model, numbers_of_all(step, of_ranks))
        decisions.append(decision_of(optimizer))
    return parameters_of(model), decisions


@contextmanager
def watched(collectives, note):
    """Calls `note(name, args, kwargs)` before each of these collectives of torch."""

    def collective(name, original, *args, **kwargs):
        note(name, args, kwargs)
        return original(*args, **kwargs)

    with ExitStack() as patches:
        for name in collectives:
            noted = partial(collective, name, getattr(dist, name))
            patches.enter_context(mock.patch.object(dist, name, noted))
        yield


# What ranks return.


def equal(ours, others):
    return ours.keys() == others.keys() and all(torch.equal(ours[k], others[k]) for k in ours)


def assert_close(ours, others, atol=ROUNDING):
    assert ours.keys() == others.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], others[name], rtol=0, atol=atol, msg=name)


def train_both(ranks, parallelism, options=None, steps=STEPS, counts=None, atol=ROUNDING):
    """A training in ranks, which must end where one process does that sees all their data.

    Returns:
        Parameters and decisions of the ranks, and the decisions of the process.
    """
    parameters, decisions = of_all(ranks(train, parallelism, options, steps, counts))
    data = data_rank(parallelism, 0, len(ranks.pipes))[1]
    parameters_alone, decisions_alone = train_alone(data, options, steps, counts)
    assert_close(parameters, parameters_alone, atol)
    return parameters, decisions, decisions_alone


def of_all(results):
    """Parameters, or these and decisions, that all ranks return to the bit; not what follows."""
    if isinstance(results[0], dict):
        assert all(equal(parameters, results[0]) for parameters in results)
        return results[0]
    for parameters, *others in results:
        assert equal(parameters, results[0][0])
        assert tuple(others[:1]) == results[0][1:2]
    return results[0][:2]
