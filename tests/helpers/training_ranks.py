"""What the ranks do in tests: a small training, spread in any of the ways, and in one process."""

import copy
import json
import os
import warnings
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gcond_kernels import GCond, GCondFused, TrainingState, neuron_mask
from gcond_kernels.methods import GradDrop, PCGrad
from tests.helpers.ranks import join

TASKS = {"a": 0.7, "b": 1.0, "c": 0.4}
STEPS = 20
MICRO_BATCHES = 3  # of a rank in a window
WAYS = ("shard", "replicate")
# Ways in which every rank sees data of its own, those in which all see the same, and half of each.
# Before torch 2.13 they have other names.
newer = hasattr(dist, "all_gather_single")
ALL_GATHER = "all_gather_single" if newer else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if newer else "reduce_scatter_tensor"
SPREAD = ("fsdp", "hsdp", "tp", "fsdp_tp")


class Net(nn.Module):
    """Of sizes that no number of ranks divides, with a norm that no tensor parallelism cuts."""

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


def device():
    """The GPU of this rank, where ranks have some."""
    on_gpus = dist.is_initialized() and "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


def new_model(dtype=torch.float32, net=Net):
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


def data_rank(way, rank, size):
    """Whose data a rank sees, and how many there are."""
    if way in ("tp", "sp"):
        return 0, 1
    return (rank // 2, size // 2) if way == "fsdp_tp" else (rank, size)


def spread(model, way, size):
    """The model as it is trained."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
    from torch.nn.parallel import DistributedDataParallel

    if way in WAYS:
        return DistributedDataParallel(model)
    if way == "hsdp":
        mesh = init_device_mesh(device().type, (2, size // 2), mesh_dim_names=("copies", "shards"))
    elif way == "fsdp_tp":
        whole = init_device_mesh(device().type, (size // 2, 2), mesh_dim_names=("data", "tensor"))
        mesh, tensor = whole["data"], whole["tensor"]
    else:
        mesh = tensor = init_device_mesh(device().type, (size,), mesh_dim_names=("all",))
    if way in ("tp", "fsdp_tp"):
        plan = {
            "first": ColwiseParallel(output_layouts=Replicate()),
            "second": ColwiseParallel(),
            "third": RowwiseParallel(),
        }
        parallelize_module(model, tensor, plan)
    if way == "sp":
        # The norm sees a part of the samples alone: its gradient is still to be summed.
        plan = {
            "first": ColwiseParallel(output_layouts=Shard(0)),
            "norm": SequenceParallel(sequence_dim=0),
            "second": ColwiseParallel(input_layouts=Shard(0)),
            "third": RowwiseParallel(),
        }
        parallelize_module(model, tensor, plan)
    if way not in ("tp", "sp"):
        for layer in (model.second, model.third):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def new_optimizer(model, way=None, steps=MICRO_BATCHES, base=torch.optim.AdamW, lr=1e-2, **options):
    options = {"momentum": 0.5, "method": GCond(), **options}
    if way in WAYS:
        options |= {"sync": way, "module": model}
    adamw = base(model.named_parameters(), lr=lr)
    return GCondFused(adamw, TASKS, accumulation_steps=steps, **options)


def prepared(way, steps=MICRO_BATCHES, net=Net, share=None, **options):
    """A model as it is trained, and its optimizer.

    Args:
        way: how the model is spread; None is one process.
        steps: micro-batches of a window.
        net: the model.
        share: of the weights that a mask leaves; None is no mask.
        options: of the optimizer.
    """
    model = new_model(net=net)
    if way is not None:
        model = spread(model, way, dist.get_world_size())
    if share is not None:
        options["mask"] = mask_of(model, share)
    return model, new_optimizer(model, way, steps=steps, **options)


def mask_of(model, share):
    """A part of each neuron's weights, and of a vector of which some ranks may hold nothing."""
    from torch.distributed.tensor import distribute_tensor

    mask = neuron_mask(model, share=share)
    for name, p in model.named_parameters():
        if name.removeprefix("module.") in ("norm.bias", "last.bias"):
            bits = torch.arange(p.numel(), device=p.device) % 3 < (2 if share < 0.5 else 1)
            spread_out = hasattr(p, "placements")
            mask[p] = distribute_tensor(bits, p.device_mesh, p.placements) if spread_out else bits
    return mask


def by_length(gramian):
    """A method of the user's own: all gradients get the mean of their lengths."""
    lengths = gramian.diagonal().sqrt()
    return lengths.mean() / lengths.clamp(min=1e-12)


def half(gramian):
    """Another one."""
    return torch.full_like(gramian.diagonal(), 0.5)


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
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone().cpu()


def parameters_of(model):
    return {
        name.removeprefix("module."): whole(parameter)
        for name, parameter in model.named_parameters()
    }


def decision_of(optimizer):
    report = optimizer.report()
    by_tensor = {name.removeprefix("module."): w for name, w in report.tensor_weights.items()}
    state = {key: value.tolist() for key, value in optimizer._now.method_state.items()}
    return (
        report.weights, report.conflicts, report.winners, report.norm_ema, report.gradient_norm,
        by_tensor, state,
    )  # fmt: skip


def train(way, options=None, counts=None, steps=STEPS):
    """A training in this rank: parameters, decisions of all steps.

    Args:
        way: how the model is spread.
        options: of the optimizer.
        counts: micro-batches of each rank in a window; None is as many for all.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    model, optimizer = prepared(way, **(options or {}))
    data, _ = data_rank(way, rank, size)
    decisions = []
    for step in range(steps):
        count = MICRO_BATCHES if counts is None else counts[(rank + step) % size]
        window(optimizer, model, [number_of(step, data, i) for i in range(count)])
        decisions.append(decision_of(optimizer))
    return parameters_of(model), decisions


def train_alone(ranks, options=None, counts=None, steps=STEPS):
    """The same in one process, which sees the data of that many ranks."""
    per_rank = [MICRO_BATCHES] * ranks if counts is None else counts
    model, optimizer = prepared(None, sum(per_rank), **(options or {}))
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
        counting(REDUCE_SCATTER, 1, lambda args: args[1]),
        counting(ALL_GATHER, 1, lambda args: args[0]),
    ):
        yield sent


class ThroughTorch:
    """The states that torch makes of a model and its optimizer, without TrainingState."""

    def __init__(self, model, optimizer, flat):
        from torch.distributed.checkpoint import state_dict as torchs

        self.torchs = torchs
        self.of = model, optimizer
        self.options = torchs.StateDictOptions(flatten_optimizer_state_dict=flat)

    def state_dict(self):
        model, optimizer = self.torchs.get_state_dict(*self.of, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        self.torchs.set_state_dict(
            *self.of, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
            options=self.options,
        )  # fmt: skip


def trained_on(
    way, folder, save_after=None, steps=STEPS, options=None, base=torch.optim.AdamW, flat=None
):
    """A training that is saved after some steps, or goes on from what was saved there.

    Every step's window is that of one process that sees everything: so the number of ranks changes
    nothing but rounding. `way` None is one process; `flat` None is saved by a TrainingState, False
    and True by torch.
    """
    import torch.distributed.checkpoint as dcp

    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    data, of = (0, 1) if way is None else data_rank(way, rank, size)
    model, optimizer = prepared(way, 4 // of, base=base, **(options or {}))
    state = {"training": TrainingState(model, optimizer)}
    if flat is not None:
        state = {"training": ThroughTorch(model, optimizer, flat)}
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


# What the tests of single promises run in every rank.


def with_nan(way, on_nonfinite, rank_with_nan):
    """A NaN in one micro-batch of one rank, in the middle of three steps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = spread(new_model(), way, size)
    optimizer = new_optimizer(model, way, on_nonfinite=on_nonfinite)
    data, _ = data_rank(way, rank, size)
    seen = []
    for step in range(3):
        for position in range(MICRO_BATCHES):
            losses = losses_of(model, number_of(step, data, position))
            if (step, position, rank) == (1, 1, rank_with_nan):
                losses["b"] = losses["b"] * torch.tensor(float("nan"))
            try:
                optimizer.backward(losses)
            except FloatingPointError as error:  # from the last micro-batch
                seen.append(str(error))
                optimizer.on_nonfinite = "skip"
        optimizer.step()
        seen.append((optimizer.report().nonfinite_tasks, optimizer.report().skipped))
    return parameters_of(model), seen


def short_windows(way, per_rank):
    """Windows that end early on some ranks, or hold nothing there."""
    rank = dist.get_rank()
    model = spread(new_model(), way, dist.get_world_size())
    optimizer = new_optimizer(model, way)
    for step, counts in enumerate(per_rank):
        window(optimizer, model, [number_of(step, rank, i) for i in range(counts[rank])])
    return parameters_of(model), optimizer.report().micro_batches


def short_windows_alone(per_rank):
    model = new_model()
    optimizer = new_optimizer(model, steps=4 * MICRO_BATCHES)  # longer than any of these
    for step, counts in enumerate(per_rank):
        numbers = [number_of(step, r, i) for r, count in enumerate(counts) for i in range(count)]
        window(optimizer, model, numbers)
    return parameters_of(model), optimizer.report().micro_batches


def traffic_of(way, options):
    """Bytes sent in the third window and step, by collective, and what the window is made of."""
    kind = {key: options.pop(key) for key in ("dtype", "net") if key in options}
    model = new_model(**kind)
    del model.unused
    model = spread(model, way, dist.get_world_size())
    optimizer = new_optimizer(model, way, **options)
    rank = dist.get_rank()
    for step in range(2):
        window(optimizer, model, [number_of(step, rank, i) for i in range(MICRO_BATCHES)])
    with counted_traffic() as sent:
        window(optimizer, model, [number_of(2, rank, i) for i in range(MICRO_BATCHES)])
    storage = optimizer._storage
    kept = [
        None if kept is None else list(kept.shape) for kept in (storage.history, storage.momentum)
    ]
    return (
        {name: sorted(moved) for name, moved in sent.items()},
        storage.accumulators.shape[1],
        kept,
    )


def when_rows_are_sent(way, mode):
    """How many rows were on their way when every loss function of two windows was called."""
    model = spread(new_model(), way, dist.get_world_size())
    optimizer = new_optimizer(model, way, mode=mode)
    sent = []

    def loss(task, number):
        sent.append(optimizer._strategy.sent)
        return losses_of(model, number)[task]

    for step in range(2):
        for position in range(MICRO_BATCHES):
            number = number_of(step, 0, position)
            optimizer.backward(
                {t: (lambda t=t, n=number: loss(t, n)) for t in optimizer.active_tasks}
            )
        optimizer.step()
    return sent


def failing_last_task(way, mistake, steps):
    """The last task of the last micro-batch fails when the others are on their way."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = spread(new_model(), way, size)
    optimizer = new_optimizer(model, way, steps=steps)
    said = []
    for step in range(2):
        for position in range(steps):
            number = number_of(step, rank, position)

            def loss(task, number=number, step=step, position=position):
                if mistake and (step, position, rank, task) == (1, steps - 1, 1, "c"):
                    raise ValueError("no such luck")
                return losses_of(model, number)[task]

            try:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    optimizer.backward({task: lambda task=task: loss(task) for task in TASKS})
            except ValueError as error:
                said += [str(error), *(str(warning.message) for warning in warned)]
                try:
                    optimizer.backward(losses_of(model, number))
                except RuntimeError as full:
                    said.append(str(full))
        optimizer.step()
    return parameters_of(model), optimizer.report().micro_batches, said


class TwoPaths(nn.Module):
    """The side path is taken only where it is asked for."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.main, self.side, self.never = nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x, side):
        return self.main(x) + (self.side(x) if side else 0.0)


def unlike_paths(way):
    """A layer that only rank 1 uses, in the second step: who has a gradient of it afterwards?"""
    model = spread(TwoPaths(), way, dist.get_world_size())
    optimizer = new_optimizer(model, way, steps=1)
    present = []
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        y = model(x, side=step == 1 and dist.get_rank() == 1)
        optimizer.backward({"a": y[:, 0].mean(), "b": -y[:, 1].mean(), "c": y.square().mean()})
        optimizer.resolve()
        present.append([p.grad is not None for p in model.parameters()])
        optimizer.step()
    return present, parameters_of(model)


def batchnorm():
    """Buffers after three steps, the first without data on rank 1; what the wrapper is told."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    wrapped = nn.parallel.DistributedDataParallel(model)
    told = [wrapped.require_backward_grad_sync]
    optimizer = new_optimizer(wrapped, "shard", steps=1)
    optimizer = new_optimizer(wrapped, "shard", steps=1)  # as in a cell of a notebook run again
    told.append(wrapped.require_backward_grad_sync)
    for step in range(3):
        idle = step == 0 and dist.get_rank() == 1
        window(optimizer, wrapped, [] if idle else [number_of(step, dist.get_rank(), 0)])
    buffers = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
    told.append(wrapped.require_backward_grad_sync)
    del optimizer
    told.append(wrapped.require_backward_grad_sync)
    return buffers, told


def untold(with_unused):
    """DistributedDataParallel that the optimizer cannot take: slower, not wrong."""
    size, rank = dist.get_world_size(), dist.get_rank()
    model = new_model()
    if not with_unused:
        del model.unused
    model.another = nn.Parameter(torch.ones(()))
    model = spread(model, "shard", size)
    named = [(n, p) for n, p in model.named_parameters() if p is not model.module.another]
    adamw = torch.optim.AdamW(named, lr=1e-2)
    optimizer = GCondFused(adamw, TASKS, accumulation_steps=MICRO_BATCHES, momentum=0.5)

    def losses(number):
        return {
            task: x + 0.0 * model.module.another for task, x in losses_of(model, number).items()
        }

    try:
        for step in range(5):
            for position in range(MICRO_BATCHES):
                number = number_of(step, rank, position)
                of_functions = {task: (lambda t=task, n=number: losses(n)[t]) for task in TASKS}
                optimizer.backward(losses(number) if with_unused else of_functions)
            model.module.another.grad = None
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return parameters_of(model), model.require_backward_grad_sync


def forgotten(kind, net=Net, idle=False):
    """DistributedDataParallel that is found: losses are tensors of one graph, or functions.

    Args:
        kind: "tensors", "functions"; "assigned" where the model is given in the second window.
        net: the model.
        idle: whether rank 1 has no micro-batch in the first window.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    model = new_model(net=net)
    optimizer = new_optimizer(model) if kind == "assigned" else None
    if kind == "assigned" and not idle:
        window(optimizer, model, [number_of(0, rank, i) for i in range(MICRO_BATCHES)])
    model = spread(model, "shard", size)
    model.module.register_buffer("own", torch.tensor(float(rank)))
    optimizer = optimizer or new_optimizer(model)
    told = [model.require_backward_grad_sync]
    for step in range(1 if kind == "assigned" else 0, 5):
        for position in range(0 if idle and (step, rank) == (0, 1) else MICRO_BATCHES):
            number = number_of(step, rank, position)
            losses = losses_of(model, number)
            if kind == "assigned":
                optimizer.module = model
                optimizer.module = None
                assert optimizer.module is model
            if kind == "functions":
                losses = {
                    task: (lambda task=task, n=number: losses_of(model, n)[task]) for task in TASKS
                }
            optimizer.backward(losses)
        optimizer.step()
    told.append(model.require_backward_grad_sync)
    buffer = model.module.own.item()
    del optimizer
    told.append(model.require_backward_grad_sync)
    return parameters_of(model), told, buffer


def assigned_wrongly(kind):
    """What a model that does not go with the optimizer is answered, given late."""
    model = new_model()
    optimizer = new_optimizer(model)
    try:
        if kind == "static graph":
            optimizer.module = nn.parallel.DistributedDataParallel(model, static_graph=True)
        if kind == "not all parameters":
            model.another = nn.Linear(2, 2)
            optimizer.module = nn.parallel.DistributedDataParallel(model)
        if kind == "no module":
            optimizer.module = "model"
        if kind in ("other ranks", "other ranks found"):
            groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
            group = groups[dist.get_rank()]
            wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)
            if kind == "other ranks":
                optimizer.module = wrapped
            optimizer.backward(losses_of(wrapped, 0))
        if kind == "cannot be called off":
            wrapped = nn.parallel.DistributedDataParallel(model)
            with mock.patch(
                "gcond_kernels.distributed.data_parallel.can_call_off", return_value=False
            ):
                optimizer.backward(losses_of(wrapped, 0))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}", optimizer._storage.counts
    return None


def saved_beside_training(way, folder):
    """A training beside dcp.async_save, whose thread sends in the default group; who else does?"""
    import threading

    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    rank, size = dist.get_rank(), dist.get_world_size()
    if way == "fsdp":
        model = fully_shard(new_model(), mesh=DeviceMesh.from_group(dist.new_group(), "cpu"))
    else:
        model = spread(new_model(), way, size)
        model.module.register_buffer("own", torch.zeros(2))
    in_default, trains = [], threading.current_thread()

    def watched(name):
        original = getattr(dist, name)

        def collective(*args, **kwargs):
            if threading.current_thread() is trains and kwargs.get("group") is None:
                in_default.append(name)
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, collective)

    optimizer = new_optimizer(model, way)
    decisions, saving = [], None
    names = ("all_reduce", "broadcast", "all_gather_object", "barrier", ALL_GATHER, REDUCE_SCATTER)
    with ExitStack() as watching:
        for name in names:
            watching.enter_context(watched(name))
        for step in range(8):
            if step % 2 == 1:
                if saving is not None:
                    saving.result()
                state = {"training": TrainingState(model, optimizer)}
                saving = dcp.async_save(state, checkpoint_id=f"{folder}/{step}")
            window(optimizer, model, [number_of(step, rank, i) for i in range(MICRO_BATCHES)])
            decisions.append(decision_of(optimizer))
        saving.result()
    return parameters_of(model), decisions, in_default


def without_sync(kind, told):
    """FSDP2 where one block is to keep its gradients, in the second micro-batch.

    Args:
        kind: "gradient_sync", "all_reduce"; or "in a function" that makes the loss.
        told: whether the optimizer is given the model.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = new_model()
    if kind == "all_reduce":
        mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("copies", "shards"))
        fully_shard(model.second, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        spread(model, "fsdp", size)
    optimizer = new_optimizer(model, module=model if told else None)
    said = []
    for step in range(2):
        for position in range(MICRO_BATCHES):
            number = number_of(step, rank, position)
            losses = losses_of(model, number)
            if position == 1:
                rows = optimizer._storage.accumulators.clone()
                call = "all_reduce" if kind == "all_reduce" else "gradient_sync"
                switch = getattr(model.second, f"set_requires_{call}")

                def turned_off(task="a", losses=losses, switch=switch):
                    switch(False)
                    return losses[task]

                of_function = {task: lambda x=losses[task]: x for task in TASKS} | {"a": turned_off}
                if kind != "in a function":
                    turned_off()
                try:
                    optimizer.backward(of_function if kind == "in a function" else losses)
                except RuntimeError as error:
                    said.append(str(error))
                unchanged = torch.equal(rows, optimizer._storage.accumulators)
                said.append((unchanged, list(optimizer._storage.counts)))
                switch(True)
                if kind == "in a function":  # the window began anew
                    optimizer.backward(losses_of(model, number_of(step, rank, 0)))
            optimizer.backward(losses if kind != "in a function" else losses_of(model, number))
        optimizer.step()
    return parameters_of(model), said


def sync_of_one_dimension():
    """Where there is nothing to all-reduce, set_requires_all_reduce is of no effect."""
    model = spread(new_model(), "fsdp", dist.get_world_size())
    model.second.set_requires_all_reduce(False)
    optimizer = new_optimizer(model)
    for step in range(2):
        rank = dist.get_rank()
        window(optimizer, model, [number_of(step, rank, i) for i in range(MICRO_BATCHES)])
    return parameters_of(model)


def ungroupable():
    """What is said where a group cannot be made."""
    failing = mock.patch.object(dist, "new_group", side_effect=RuntimeError("no route"))
    try:
        with failing:
            new_optimizer(new_model(), sync="shard")
    except RuntimeError as error:
        return str(error)
    return None


def in_another_order():
    """A process group of the user's whose ranks are not in the order of the job."""
    group = dist.new_group([1, 0], sort_ranks=False)
    rank = dist.get_rank(group)
    model = new_model()
    optimizer = new_optimizer(model, sync="shard", process_group=group)
    decisions = []
    for step in range(4):
        window(optimizer, model, [number_of(step, rank, i) for i in range(MICRO_BATCHES)])
        decisions.append(decision_of(optimizer))
    state = TrainingState(model, optimizer).state_dict()
    # Each rank has put the parts of all in their places.
    history = history_of(state["optimizer"])
    return parameters_of(model), decisions, history, optimizer._strategy.group.rank == rank


def history_of(state):
    """The history of the first task as it was weighed, by the names of the parameters."""
    of_method = json.loads(state["param_groups"][0]["gcond"]["method"])
    _, (scale, *_) = of_method["history_scale"]
    return {
        name: whole(kept["gcond"]["history"]["0"]) * scale for name, kept in state["state"].items()
    }


def scaled(way):
    """Loss scaling where rank 1 alone overflows in the second step."""
    model = spread(new_model(), way, dist.get_world_size())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = new_optimizer(model, way, steps=1, grad_scaler=scaler)
    rank, scales = dist.get_rank(), []
    for step in range(3):
        losses = losses_of(model, number_of(step, rank, 0))
        if (step, rank) == (1, 1):
            losses["a"] = losses["a"] * 3e38
        optimizer.backward(losses)
        optimizer.step()
        scaler.update()
        scales.append((scaler.get_scale(), optimizer.report().skipped))
    return parameters_of(model), scales


def thawed(way):
    """A layer thawed after two steps, then a group added: history and momentum are cut anew."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = new_model()
    for p in model.second.parameters():
        p.requires_grad_(False)
    optimizer = new_optimizer(model, **({} if way is None else {"sync": way}))
    return _thawed(model, optimizer, [rank], size)


def thawed_alone(ranks):
    model = new_model()
    for p in model.second.parameters():
        p.requires_grad_(False)
    return _thawed(model, new_optimizer(model, steps=ranks * MICRO_BATCHES), range(ranks), ranks)


def _thawed(model, optimizer, data, size):
    for step in range(8):
        if step == 2:
            for p in model.second.parameters():
                p.requires_grad_(True)
        numbers = [number_of(step, d, i) for i in range(MICRO_BATCHES) for d in data]
        window(optimizer, model, numbers)
    return parameters_of(model), decision_of(optimizer)


def mistake(kind):
    """What a rank says to a mistake that rank 1 makes alone, or all of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    odd = rank == 1
    try:
        model = new_model()
        options = {"sync": "shard"}
        if kind == "other weights" and odd:
            with torch.no_grad():
                model.first.weight += 1
        if kind == "weights in another order" and odd:
            with torch.no_grad():
                model.first.weight.copy_(model.first.weight.flip(0))
        if kind == "a layer left alone":
            fully_shard_without(model, "last")
        if kind == "two trainings in one":
            fully_shard_apart(model)
        if kind in (
            "a layer left alone",
            "two trainings in one",
            "gradients kept",
            "not waited for",
        ):
            kept = kind in ("gradients kept", "not waited for")
            model = spread(model, "fsdp", size) if kept else model
            del options["sync"]
            optimizer = new_optimizer(model, steps=2, **options)
            if kind == "gradients kept":
                model.set_requires_gradient_sync(False)
            if kind == "not waited for":
                model.set_is_last_backward(False)
            window(optimizer, model, [number_of(0, rank, 0)])
            return "nothing"
        if kind == "not the wrapped model":
            return not_the_wrapped_model()
        if kind == "other setting" and odd:
            options["max_norm"] = 2.0
        if kind in UNLIKE:
            options |= UNLIKE[kind][rank]
        if kind == "other mask":
            options["mask"] = mask_of(model, 0.4 if odd else 0.6)
        if kind == "mask on one rank" and odd:
            options["mask"] = mask_of(model, 0.4)
        if kind == "other mask of a part that both hold":
            model = spread(model, "tp", size)
            options = {"mask": {model.norm.weight: torch.arange(12) != rank}}
        if kind == "mask made before sharding":
            bits = torch.ones(12, 6, dtype=torch.bool)
            model = spread(model, "fsdp", size)
            options = {"mask": {model.first.weight: bits}}
        if kind == "mask cut otherwise":
            model = spread(model, "fsdp", size)
            options = {"mask": {model.first.weight: cut_by_columns(model.first.weight)}}
        if kind == "other shape" and odd:
            model.last = nn.Linear(5, 4)
        if kind == "one parameter more" and odd:
            model.extra = nn.Parameter(torch.ones(2))
        if kind == "sync of DTensors":
            model = spread(model, "fsdp", size)
        if kind == "not all parameters":
            wrapped = nn.parallel.DistributedDataParallel(model)
            base = torch.optim.SGD(model.first.parameters(), lr=0.1)
            GCondFused(base, TASKS, module=wrapped)
        if kind == "static graph":
            wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)
            GCondFused(torch.optim.SGD(model.parameters(), lr=0.1), TASKS, module=wrapped)
        optimizer = new_optimizer(model, steps=2, **options)
        if kind == "other on_nonfinite" and odd:
            optimizer.on_nonfinite = "drop_task"
        if kind == "nothing anywhere":
            optimizer.step()
        optimizer.backward(losses_of(model, 0))
        if kind == "saved in a window":
            optimizer.state_dict()
        if kind == "copied":
            optimizer.step()
            copy.deepcopy(optimizer)
        if kind in ("state of one rank", "thawed on one rank", "other rate"):
            optimizer.backward(losses_of(model, 1))
            optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
            for p in model.last.parameters():
                p.requires_grad_(False)
            if kind == "thawed on one rank":
                # Neither had it so far.
                model.extra = nn.Parameter(torch.ones(2))
                model.extra.requires_grad_(odd)
                group = {"params": [model.extra], "param_names": ["extra"]}
                optimizer.add_param_group(group)
            window(optimizer, model, [2, 3])
            if kind == "state of one rank" and odd:
                optimizer.load_state_dict(saved)
            if kind == "other rate":
                if odd:
                    optimizer.param_groups[0]["lr"] = 0.5
                optimizer.load_state_dict(optimizer.state_dict())
            window(optimizer, model, [4, 5])
            return "nothing"
        if kind == "late parameter":
            late_parameter(optimizer, model)
        optimizer.step()
        return "nothing"
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


# Options of rank 0 and of rank 1.
UNLIKE = {
    "other seed": ({"method": PCGrad(seed=0)}, {"method": PCGrad(seed=1)}),
    "other function": ({"method": by_length}, {"method": half}),
    "other granularity": ({}, {"granularity": "tensor"}),
}


def cut_by_columns(parameter):
    """A mask of a parameter that is cut by rows."""
    from torch.distributed.tensor import Shard, distribute_tensor

    bits = torch.ones(parameter.shape, dtype=torch.bool)
    return distribute_tensor(bits, parameter.device_mesh, [Shard(1)])


def fully_shard_without(model, name):
    """Sharded layer by layer, but for one."""
    from torch.distributed.fsdp import fully_shard

    for child_name, child in model.named_children():
        if child_name != name:
            fully_shard(child)


def fully_shard_apart(model):
    """Every rank for itself, on a mesh of one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device().type, (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))
    fully_shard(model, mesh=mesh["b"])


def not_the_wrapped_model():
    """The model inside is given, and the gradients come in more than one bucket."""
    from gcond_kernels.storage import collect

    model = new_model()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with mock.patch.object(collect, "BUCKET_BYTES", 1):
        optimizer = GCondFused(sgd, {"a": 1.0}, module=model)
        optimizer.backward({"a": losses_of(wrapped, 0)["a"]})
    return "nothing"


def late_parameter(optimizer, model):
    """A parameter that comes in a window of which a row was sent already."""
    optimizer.step()
    optimizer.accumulation_steps, optimizer.mode = 3, "stochastic"
    window(optimizer, model, range(3))
    optimizer.backward({"a": losses_of(model, 1)["a"]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "param_names": ["late"]})
    optimizer.backward({"b": losses_of(model, 2)["b"]})


def state_of_rank(way, folder, save, options=None):
    """A state saved by every rank for itself, or by rank 0 for all, and loaded again."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, optimizer = prepared(way, **(options or {}))
    data, _ = data_rank(way, rank, size)
    for step in range(4):
        window(optimizer, model, [number_of(step, data, i) for i in range(MICRO_BATCHES)])
    name = f"{folder}/{rank}.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name)
    dist.barrier()

    again, other = prepared(way, **(options or {}))
    saved = torch.load(name if save == "each" else f"{folder}/0.pt", weights_only=False)
    again.load_state_dict(saved["model"])
    said = None
    try:
        other.load_state_dict(saved["optimizer"])
    except ValueError as error:
        said = str(error)
    refusals = [None] * size
    dist.all_gather_object(refusals, said)
    if any(refusals):
        return refusals
    for step in range(4, 7):
        numbers = [number_of(step, data, i) for i in range(MICRO_BATCHES)]
        window(optimizer, model, numbers)
        window(other, again, numbers)
    mine, others = parameters_of(model), parameters_of(again)
    return all(torch.equal(mine[name], others[name]) for name in mine)


def states_of_torch(way):
    """What get_optimizer_state_dict and set_optimizer_state_dict change, in all their forms.

    Returns:
        By form, before the first window and after two: whether the optimizer was left as it was;
        whether a fresh one goes on from it to the same bits.
    """
    from torch.distributed.checkpoint import state_dict as torchs

    rank = dist.get_rank()
    forms = {
        "plain": ({}, {}),
        "flat": ({"flatten_optimizer_state_dict": True},) * 2,
        "full": ({"full_state_dict": True},) * 2,
        "of rank 0": (
            {"full_state_dict": True, "cpu_offload": True},
            {"full_state_dict": True, "broadcast_from_rank0": True},
        ),
    }
    results = {}
    for steps in (0, 2):
        model, optimizer = used(way)
        for step in range(steps):
            window(optimizer, model, [number_of(step, rank, i) for i in range(MICRO_BATCHES)])
        trained, unchanged = [(model, optimizer)], {}
        for form, (get, put) in forms.items():
            before = of_all_kinds(model, optimizer)
            options = torchs.StateDictOptions(**get)
            state = copy.deepcopy(
                torchs.get_optimizer_state_dict(model, optimizer, options=options)
            )
            unchanged[form] = of_all_kinds(model, optimizer) == before
            again, other = used(way)
            torchs.set_model_state_dict(again, copy.deepcopy(torchs.get_model_state_dict(model)))
            options = torchs.StateDictOptions(**put)
            torchs.set_optimizer_state_dict(again, other, state, options=options)
            trained.append((again, other))
        for net, its in trained:
            for step in range(steps, steps + 2):
                window(its, net, [number_of(step, rank, i) for i in range(MICRO_BATCHES)])
        ends = [of_all_kinds(*one) for one in trained]
        for form, end in zip(forms, ends[1:], strict=True):
            results[form, steps] = unchanged[form], end == ends[0]
    return results


def used(way):
    model = spread(new_model(net=Used), way, dist.get_world_size())
    return model, new_optimizer(model, way)


def of_all_kinds(model, optimizer):
    """Parameters, rate, states of the base and of the optimizer itself, to the bit, as text."""
    base, storage, now = optimizer.base, optimizer._storage, optimizer._now
    state = [dict(base.state.get(p, {})) for p in model.parameters()]
    kept = (
        []
        if not storage.segments
        else [storage.history, storage.momentum, storage.momentum_steps, storage.parameter_tasks]
    )
    if not now.counters[0]:
        kept = []
    parts = list(parameters_of(model).values()), state, base.param_groups[0]["lr"], kept
    with torch_prints_all():
        return repr(copy.deepcopy((parts, now.method_state, now.counters)))


@contextmanager
def torch_prints_all():
    """Shows tensors in full."""
    torch.set_printoptions(precision=12, threshold=10**7)
    yield
    torch.set_printoptions(profile="default")


def saved_by_one_rank(way, caller):
    """What a rank is told that saves alone, where all ranks are to call."""
    from gcond_kernels.distributed import process_group as peers

    model, optimizer = used(way)
    rank = dist.get_rank()
    for number in range(MICRO_BATCHES):
        optimizer.backward(losses_of(model, number_of(0, rank, number)))
    optimizer.step()
    said = []
    with mock.patch.object(peers, "PATIENCE", timedelta(seconds=1)):
        try:
            said.append(len(optimizer.state_dict()["state"]) if rank == caller else None)
        except RuntimeError as error:
            said.append(str(error))
    dist.barrier()
    return [*said, len(optimizer.state_dict()["state"])]


def doomed(rank, size, store, folder, signal_number, timeout):
    """A training that is saved after every second step, until rank 1 is hit in its sixth window."""
    import torch.distributed.checkpoint as dcp

    join(rank, size, store, timeout)
    model = spread(new_model(), "shard", size)
    optimizer = new_optimizer(model, "shard", steps=4 // size)
    state = {"training": TrainingState(model, optimizer)}
    for step in range(STEPS):
        for position in range(rank, 4, size):
            optimizer.backward(losses_of(model, number_of(step, 0, position)))
            if (rank, step, position) == (1, 5, 1):
                os.kill(os.getpid(), signal_number)
        optimizer.step()
        if step % 2 == 1:
            dcp.save(state, checkpoint_id=f"{folder}/{step + 1:02}")


def knows_no_ranks():
    """An optimizer that was made before the process group, as it seems to it."""
    model = new_model()
    with mock.patch.object(dist, "is_initialized", return_value=False):
        optimizer = new_optimizer(model)
    try:
        optimizer.backward(losses_of(model, 0))
    except RuntimeError as error:
        return str(error)
    return None


class Mixed(nn.Module):
    """Channels-last weights, a scalar, and parameters of two types."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
            self.narrow = nn.Linear(5, 4).to(torch.bfloat16)
            self.last = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        # Six numbers of the micro-batch, as they come, fill 3 x 4 x 4 pixels.
        image = x.repeat(1, 8).view(-1, 3, 4, 4)
        x = torch.tanh(self.conv(image).mean((2, 3))).to(torch.bfloat16)
        return self.last(torch.tanh(self.narrow(x)).float()) * self.scale


def mixed_losses(model, number):
    generator = torch.Generator().manual_seed(number)
    y = model(torch.randn(4, 6, generator=generator))
    return {"a": y[:, 0].mean(), "b": (y[:, 0] + y[:, 1]).pow(2).mean(), "c": -y.sum(1).mean()}


def mixed(way, options, folder=None):
    """Five steps with all sorts of parameters; saved and loaded in their middle where asked."""
    import torch.distributed.checkpoint as dcp

    rank, size = (0, 1) if way is None else (dist.get_rank(), dist.get_world_size())
    runs = []
    for _ in range(2):
        model = Mixed() if way is None else spread(Mixed(), way, size)
        base = {"base": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
        runs.append((model, new_optimizer(model, way, steps=4 // size, **base, **options)))
    model, optimizer = runs[0]
    for step in range(5):
        if step == 2 and folder:
            dcp.save({"training": TrainingState(*runs[0])}, checkpoint_id=folder)
            dcp.load({"training": TrainingState(*runs[1])}, checkpoint_id=folder)
            model, optimizer = runs[1]
        for number in range(rank, 4, size):
            optimizer.backward(mixed_losses(model, 100 * step + number))
        optimizer.step()
    return parameters_of(model)


def where_things_lie(dtype):
    """Whether `.grad` and the shards lie in the rows, after a step of K tasks."""
    said = []
    for K in (1, 2, 3, 6):
        model = nn.parallel.DistributedDataParallel(new_model(dtype))
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        tasks = {str(k): 1.0 for k in range(K)}
        optimizer = GCondFused(sgd, tasks, module=model)
        y = model(torch.ones(2, 6, dtype=dtype)).float()
        optimizer.backward({task: (y - int(task)).pow(2).mean() for task in tasks})
        shards = optimizer._strategy._shards()
        optimizer.step()
        rows = optimizer._storage.accumulators.untyped_storage().data_ptr()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        in_rows = {gradient.untyped_storage().data_ptr() == rows for gradient in gradients}
        said.append((shards.untyped_storage().data_ptr() == rows, in_rows))
    return said


def tasks_in_all_numbers(K, dtype):
    """A step of K tasks whose gradients are whole numbers: sums in any order are exact."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = new_model()
    parameters = list(model.parameters())
    sgd = torch.optim.SGD(parameters, lr=1.0)
    tasks = {str(k): 1.0 for k in range(K)}
    none_left = GCond(max_iterations=0, tie_breaking_weights=(0.0, 1.0))  # the plain sum
    optimizer = GCondFused(sgd, tasks, method=none_left, accumulator_dtype=dtype, sync="shard")
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        numbers = [
            [torch.randint(-3, 4, p.shape, generator=generator).float() for p in parameters]
            for _ in range(size * K)
        ]
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


def loaded_early_and_late(way):
    """Own state loaded before the first window; and that of two steps ago, with a layer thawed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    data, _ = data_rank(way, rank, size)

    def numbers(step):
        return [number_of(step, data, i) for i in range(MICRO_BATCHES)]

    results = []
    for reload in (False, True):
        model = new_model()
        for p in model.last.parameters():
            p.requires_grad_(False)
        optimizer = new_optimizer(model, sync=way)
        if reload:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for step in range(2):
            window(optimizer, model, numbers(step))
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        for p in model.last.parameters():
            p.requires_grad_(True)
        for step in range(2, 4):
            window(optimizer, model, numbers(step))
        if reload:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            for step in range(2, 4):
                window(optimizer, model, numbers(step))
        results.append(parameters_of(model))
    return results


def frozen_since(way, folder):
    """Saved with a layer that is frozen when it is loaded; saved by a copy behind its back."""
    import torch.distributed.checkpoint as dcp

    rank, size = dist.get_rank(), dist.get_world_size()
    data, _ = data_rank(way, rank, size)
    results = []
    for name in ("save", "async_save"):
        model = spread(new_model(), way, size)
        optimizer = new_optimizer(model, way)
        for step in range(3):
            window(optimizer, model, [number_of(step, data, i) for i in range(MICRO_BATCHES)])
        state = {"training": TrainingState(model, optimizer)}
        done = getattr(dcp, name)(state, checkpoint_id=f"{folder}/{name}")
        if name == "async_save":
            done.result()
        again = new_model()
        for p in again.first.parameters():
            p.requires_grad_(False)
        again = spread(again, way, size)
        other = new_optimizer(again, way)
        dcp.load({"training": TrainingState(again, other)}, checkpoint_id=f"{folder}/{name}")
        for p in model.parameters():
            p.requires_grad_(True)
        for n, p in model.named_parameters():
            if n.removeprefix("module.").startswith("first"):
                p.requires_grad_(False)
        for step in range(3, 6):
            numbers = [number_of(step, data, i) for i in range(MICRO_BATCHES)]
            window(optimizer, model, numbers)
            window(other, again, numbers)
        results.append((parameters_of(model), parameters_of(again)))
    return results


def narrow_rows_of_mixed_parameters(way):
    """The gradient of a float32 parameter where others are of bfloat16, from bfloat16 rows."""
    model = Mixed() if way is None else spread(Mixed(), way, dist.get_world_size())
    options = {"momentum": 0.0, "accumulator_dtype": torch.bfloat16}
    optimizer = new_optimizer(model, way, steps=1, **options)
    optimizer.backward(mixed_losses(model, 0))  # the same on every rank: sums are exact
    optimizer.resolve()
    return [p.grad.clone() for p in model.parameters()]


def retried(way, load):
    """A short window with a NaN on rank 1, raised, then gone on with otherwise, or from a state."""
    rank = dist.get_rank()
    model = spread(new_model(), way, dist.get_world_size())
    optimizer = new_optimizer(model, way, on_nonfinite="raise")
    saved = copy.deepcopy(optimizer.state_dict())
    losses = losses_of(model, number_of(0, rank, 0))
    optimizer.backward({**losses, "b": losses["b"] * (float("nan") if rank == 1 else 1.0)})
    said = []
    for go_on in (optimizer.step, lambda: optimizer.backward(losses_of(model, 1))):
        try:
            go_on()
        except (FloatingPointError, RuntimeError) as error:
            said.append(str(error))
    if load:
        optimizer.load_state_dict(saved)
    else:
        optimizer.on_nonfinite = "drop_task"
        optimizer.step()
    window(optimizer, model, [number_of(1, rank, 0)])
    micro_batches = optimizer.report().micro_batches
    optimizer.mode = "stochastic"
    window(optimizer, model, range(MICRO_BATCHES))
    for number in range(2):  # a row is on its way
        optimizer.backward(losses_of(model, number, optimizer.active_tasks))
    for call in (lambda: optimizer.load_state_dict(saved), optimizer.drop_window):
        try:
            call()
        except RuntimeError as error:
            said.append(str(error))
    optimizer.step()
    return parameters_of(model), said, micro_batches


def failing_first_function(way, mode):
    """A function that fails where tensors had been passed back; and one in stochastic mode."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = spread(new_model(), way, size)
    optimizer = new_optimizer(model, way, steps=3 if mode == "stochastic" else 1, mode=mode)

    def fails():
        raise ValueError("no such luck")

    for step in range(3):
        for position in range(optimizer.accumulation_steps):
            number = number_of(step, rank, position)
            losses = losses_of(model, number, optimizer.active_tasks)
            first = optimizer.active_tasks[0]
            if (step, rank) == (1, 1) and first == ("b" if mode == "stochastic" else "a"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with pytest.raises(ValueError, match="no such luck"):
                        optimizer.backward({**losses, first: fails})
                if not optimizer.active_tasks:  # the row of another task was sent before
                    break
                losses = losses_of(model, number, optimizer.active_tasks)
            optimizer.backward(losses)
        optimizer.step()
    return parameters_of(model), decision_of(optimizer)


def failing_first_function_alone():
    """In stochastic mode the failing rank has no more than its first micro-batch in that step."""
    model = new_model()
    optimizer = new_optimizer(model, steps=6)
    for step in range(3):
        for position, task in enumerate(TASKS):
            for rank in range(1 if step == 1 and position else 2):
                number = number_of(step, rank, position)
                optimizer.backward(losses_of(model, number, [task]))
        optimizer.step()
    return parameters_of(model)


def between_rows_and_step():
    """A collective of the user's before step(), where one rank's window is short."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = spread(new_model(), "shard", size)
    optimizer = new_optimizer(model, "shard")
    sums = []
    for step in range(3):
        for position in range(MICRO_BATCHES if rank == 0 or step == 0 else 1):
            optimizer.backward(losses_of(model, number_of(step, rank, position)))
        optimizer.resolve()  # where the other rank waits, in its last backward
        told = torch.tensor([float(rank)])
        dist.all_reduce(told)
        sums.append(told.item())
        optimizer.step()
    return parameters_of(model), sums


def nothing_then_something():
    rank = dist.get_rank()
    model = spread(new_model(), "shard", dist.get_world_size())
    optimizer = new_optimizer(model, "shard")
    for step in range(2):
        window(optimizer, model, [number_of(step, rank, i) for i in range(MICRO_BATCHES)])
        with pytest.raises(RuntimeError, match="nothing was accumulated on any of the 2 ranks"):
            optimizer.step()
    return parameters_of(model)


def scaler_step_without_data():
    """Through GradScaler.step, where rank 1 has no loss in the first window."""
    rank = dist.get_rank()
    model = spread(new_model(), "shard", dist.get_world_size())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = new_optimizer(model, "shard", steps=1, grad_scaler=scaler)
    for step in range(2):
        if step > 0 or rank == 0:
            optimizer.backward(losses_of(model, number_of(step, rank, 0)))
        scaler.step(optimizer)
        scaler.update()
    return parameters_of(model)


def two_trainings():
    """Ranks 0 and 1 train one model, ranks 2 and 3 another, in process groups of the wrappers."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, place = divmod(rank, 2)
    model = nn.parallel.DistributedDataParallel(new_model(), process_group=groups[pair])
    optimizer = new_optimizer(model, "shard")
    for step in range(4):
        numbers = [number_of(step, place, i) + 7 * pair for i in range(MICRO_BATCHES)]
        window(optimizer, model, numbers)
    return parameters_of(model)


def two_trainings_alone(pair):
    model = new_model()
    optimizer = new_optimizer(model, steps=2 * MICRO_BATCHES)
    for step in range(4):
        numbers = [number_of(step, place, i) + 7 * pair for i in range(3) for place in range(2)]
        window(optimizer, model, numbers)
    return parameters_of(model)


def buffers_that_are_views():
    """A buffer with gaps in memory, and a module that broadcasts none."""
    rank = dist.get_rank()
    seen = []
    for broadcast in (True, False):
        model = new_model()
        memory = torch.full((3, 4), float(rank))
        model.register_buffer("gaps", memory[:, 1:3])
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
        model.gaps = None
        model.module.gaps = memory[:, 1:3]
        memory.fill_(float(rank))
        optimizer = new_optimizer(model, "shard", steps=1)
        window(optimizer, model, [0])
        seen.append(memory.tolist())
    return seen


def writes_at_once():
    """As `tasks_in_all_numbers`, with a reduce-scatter that writes before it is waited for."""
    from gcond_kernels.distributed.process_group import ProcessGroup

    original = ProcessGroup.start_sum_to_shards

    def start_sum_to_shards(self, part, row):
        work = original(self, part, row)
        work.wait()
        return mock.Mock(wait=lambda: None)

    with mock.patch.object(ProcessGroup, "start_sum_to_shards", start_sum_to_shards):
        return tasks_in_all_numbers(3, torch.float32)


def dropped_signs(way, ranks=None):
    """Steps of GradDrop in ranks, or in one process that sees the data of so many.

    Gradients are small whole numbers and weights powers of two, so that sums in any order are
    exact: beside a threshold by a rounding another sign would be picked, and everything differ.
    """
    of = dist.get_world_size() if way else ranks
    mine = [dist.get_rank()] if way else range(ranks)
    model = new_model(net=Headed)
    parameters = dict(model.named_parameters())
    sgd = torch.optim.SGD(list(parameters.items()), lr=1.0)
    optimizer = GCondFused(
        sgd, {"a": 1.0, "b": 0.5, "c": 2.0}, accumulation_steps=len(mine), momentum=0.5,
        method=GradDrop(leak=0.25, seed=7), mask=mask_of(model, 0.7), sync=way,
    )  # fmt: skip
    gradients = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        drawn = [
            {
                task: {
                    name: torch.randint(-3, 4, p.shape, generator=generator).float()
                    for name, p in parameters.items()
                    if not name.startswith("heads") or f".{task}." in name
                }
                for task in TASKS
            }
            for _ in range(of)
        ]
        for data in mine:
            optimizer.backward(
                {
                    task: sum((parameters[name] * n).sum() for name, n in numbers.items())
                    for task, numbers in drawn[data].items()
                }
            )
        optimizer.resolve()
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
    return gradients, parameters_of(model)


class Uneven(nn.Module):
    """A layer of which two ranks hold unlike shares, and one that both hold whole."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 65), nn.LayerNorm(65)


def signs_of_parts(way):
    """The signs that GradDrop picks of gradients of 1 and -1, of what this rank holds."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from gcond_kernels.storage.dtensor import local_shard

    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    model = Uneven()
    if way == "fsdp":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"first": ColwiseParallel()})
    sgd = torch.optim.SGD(model.named_parameters(), lr=1.0)
    optimizer = GCondFused(sgd, {"a": 1.0, "b": 1.0}, method=GradDrop())

    def total():
        locals_ = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        return sum(p.sum() for p in locals_)

    optimizer.backward({"a": total, "b": lambda: -total()})
    optimizer.resolve()
    return {name: local_shard(p.grad).sign() for name, p in model.named_parameters()}
