"""A small model with two tasks, its losses, and comparisons to the bit."""

import copy
import io

import torch
from torch import nn

from gcond_kernels import GCond

TASKS = {"a": 1.0, "b": 0.5}


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def losses_of(model, x):
    y = model(x)
    return {"a": (y[:, 0] - 1).pow(2).mean(), "b": (y[:, 0] + y[:, 1] + 1).pow(2).mean()}


def batches(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 4, generator=generator) for _ in range(count)]


def sgd(model, lr: float = 0.1, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def flat_parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def flat_gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def task_gradient(model, x, task) -> torch.Tensor:
    """Of one task's mean loss over micro-batches, by autograd, in float64."""
    twin = copy.deepcopy(model).double()
    loss = sum(losses_of(twin, batch.double())[task] for batch in x) / len(x)
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def no_conflict() -> GCond:
    """A method that finds no conflict: the result is the plain weighted sum."""
    return GCond(thresholds=(-1.0, -1.0, -1.0))


def train(model, optimizer, x, scaler=None, by_scaler=False, losses_of=losses_of):
    """Train on batches, with a GradScaler's update, and its step if `by_scaler`."""
    for batch in x:
        losses = losses_of(model, batch)
        if optimizer.backward({task: losses[task] for task in optimizer.active_tasks}):
            scaler.step(optimizer) if by_scaler else optimizer.step()
            if scaler is not None:
                scaler.update()


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu")  # weights_only: plain types and tensors alone


def without_counters(state: dict) -> dict:
    """A state dict without the counts of what happened, which every step adds to."""
    groups = [
        {**group, "gcond": {k: v for k, v in group["gcond"].items() if k != "counters"}}
        for group in state["param_groups"]
    ]
    return {"state": state["state"], "param_groups": groups}


def same(a, b) -> bool:
    """Equal to the bit, nested containers included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
