"""The report of a step: what the result does to each task, balance, losses."""

import copy
import math

import pytest
import torch
from torch import nn

from gcond_kernels import (
    MGDA,
    GCond,
    GCondFused,
    GradDrop,
    NonConflicting,
    PCGrad,
    Sum,
    neuron_mask,
)
from gcond_kernels.training.losses import add_loss
from tests.helpers.as_on_gpu import no_reads
from tests.helpers.host_reads import HostReads
from tests.helpers.models import through_a_file

TASKS = {"a": 1.0, "b": 0.5, "c": 20.0}
X = torch.randn(24, 5, 4, generator=torch.Generator().manual_seed(1))


class Headed(nn.Module):
    """A trunk that all tasks share, a head for each, and a parameter of two of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})
        self.of_two = nn.Parameter(torch.tensor([0.3, -0.2]))

    def losses(self, x, tasks=TASKS):
        h = torch.tanh(self.trunk(x))
        losses = {task: (self.heads[task](h) - k).square().mean() for k, task in enumerate(tasks)}
        losses["a"] = losses["a"] + (self.of_two - 1.0).square().sum()
        losses["c"] = losses["c"] + (self.of_two + 1.0).square().sum()
        return losses


def optimizer_of(model, **options) -> GCondFused:
    if options.pop("masked", False):
        options["mask"] = neuron_mask(model.trunk, share=0.5)
    return GCondFused(torch.optim.SGD(model.named_parameters(), lr=0.01), TASKS, **options)


def task_gradients(model, x, mask) -> dict[str, torch.Tensor]:
    """Task → weighted mean gradient over the micro-batches, by autograd in float64."""
    twin = copy.deepcopy(model).double()
    masks = [mask.get(p) for p in model.parameters()]
    found = {}
    for task, weight in TASKS.items():
        loss = weight * sum(twin.losses(batch.double())[task] for batch in x) / len(x)
        gradients = torch.autograd.grad(
            loss, list(twin.parameters()), allow_unused=True, materialize_grads=True
        )
        kept = [g if m is None else g * m for g, m in zip(gradients, masks, strict=True)]
        found[task] = torch.cat([g.flatten() for g in kept])
    return found


def half_of_each(gramian):
    return gramian.new_full((len(gramian),), 0.5)


def shared_part(model) -> torch.Tensor:
    """Of all elements in a row, which are of parameters that tasks share."""
    shared = [not name.startswith("heads") for name, _ in model.named_parameters()]
    each = zip(model.parameters(), shared, strict=True)
    return torch.cat([torch.full((p.numel(),), flag) for p, flag in each])


@pytest.mark.parametrize(
    "options",
    [
        {"method": GCond()},
        {"method": GCond(), "granularity": "tensor"},
        {"method": PCGrad(), "masked": True, "max_norm": 0.1},
        {"method": MGDA(), "granularity": "tensor", "masked": True},
        {"method": half_of_each, "granularity": "tensor"},  # but of a task alone all
        {"method": Sum(), "backend": "python", "accumulation_steps": 3},
    ],
    ids=["GCond", "GCond by tensor", "PCGrad masked", "MGDA by tensor", "halves by tensor", "Sum"],
)
def test_descent_and_norm_ratio_are_those_of_autograd(options):
    model = Headed()
    optimizer = optimizer_of(model, **options)
    risen = False
    for number in range(4):
        x = X[3 * number :][: optimizer.accumulation_steps]
        gradients = task_gradients(model, x, optimizer.mask or {})
        for batch in x:
            optimizer.backward(model.losses(batch))
        result = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        report, row = optimizer.report(), optimizer.recorder.rows()[-1]
        cosines = {task: cosine_of(g, result) for task, g in gradients.items()}
        assert report.descent == pytest.approx(cosines, abs=1e-5)  # gradients are float32
        assert report.rising == [task for task, cosine in cosines.items() if cosine < 0.0]
        risen |= bool(report.rising)
        norms = [float(g[shared_part(model)].norm()) for g in gradients.values()]
        assert report.norm_ratio == pytest.approx(max(norms) / min(norms), rel=1e-5)
        assert {task: row[f"descent/{task}"] for task in TASKS} == pytest.approx(report.descent)
        assert [task for task in TASKS if row[f"rising/{task}"]] == report.rising
        assert row["norm_ratio"] == report.norm_ratio
        assert [row[f"shared_norm/{task}"] for task in TASKS] == pytest.approx(norms, rel=1e-5)
        optimizer.step()
    assert risen or not isinstance(optimizer.method, Sum)  # of 20 times the loss the others rise


def cosine_of(a, b) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def test_descent_is_of_the_gradient_before_momentum():
    with_momentum, without = Headed(), Headed()
    optimizers = [optimizer_of(with_momentum, momentum=0.9), optimizer_of(without)]
    for x in X[:4]:
        for model, optimizer in zip((with_momentum, without), optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.backward(model.losses(x))
            optimizer.step()
    assert optimizers[0].report().descent == optimizers[1].report().descent
    assert not torch.equal(with_momentum.of_two.grad, without.of_two.grad)


def plane(*gradients, **options):
    """A step of tasks "0", "1", ... whose gradients are these, and its record."""
    parameter = nn.Parameter(torch.zeros(2))
    tasks = {str(k): 1.0 for k in range(len(gradients))}
    optimizer = GCondFused(torch.optim.SGD([parameter], lr=0.1), tasks, **options)
    losses = {str(k): parameter @ torch.tensor(g) for k, g in enumerate(gradients)}
    optimizer.backward(losses)
    optimizer.step()
    return optimizer.report(), optimizer.recorder.rows()[-1]


# Two gradients of the same norm, with a cosine of -0.95.
OPPOSED = [1.0, 0.0], [-0.95, math.sqrt(1.0 - 0.95**2)]


@pytest.mark.parametrize(
    ("method", "cosines"),
    [
        (Sum(), [0.158, 0.158]),  # the bisector, at half of 161.8 degrees
        (PCGrad(), [0.158, 0.158]),  # across each other, equally long: the bisector too
        (GCond(), [-0.81, 0.96]),  # against the loser
    ],
    ids=["Sum", "PCGrad", "GCond"],
)
def test_what_a_method_does_to_the_loser(method, cosines):
    report, row = plane(*OPPOSED, method=method)
    assert sorted(report.descent.values()) == pytest.approx(cosines, abs=0.01)
    assert report.rising == [task for task, cosine in report.descent.items() if cosine < 0.0]
    for task, cosine in report.descent.items():
        assert row[f"descent/{task}"] == pytest.approx(cosine, abs=1e-12)
        assert row[f"rising/{task}"] == (cosine < 0.0)


@pytest.mark.parametrize(
    ("gradients", "options", "descent"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], {"method": Sum()}, [1.0, None]),
        ([[1.0, 0.0], [-1.0, 0.0]], {"method": Sum()}, [None, None]),  # the result is zero
        ([[1.0, 0.0], [-0.5, 0.0]], {"method": GradDrop()}, [None, None]),
        ([[1.0, 0.0], [math.nan, 0.0]], {"method": Sum()}, [None, None]),
        ([[1.0, 0.0], [math.nan, 0.0]], {"on_nonfinite": "drop_task"}, [1.0, None]),
        ([[1.0, 0.0]], {}, [1.0]),
    ],
)
def test_there_is_no_descent_without_a_gradient_or_a_result(gradients, options, descent):
    report, row = plane(*gradients, **options)
    assert list(report.descent.values()) == descent
    assert report.rising == []
    rising = [None if cosine is None else False for cosine in descent]
    assert [row[f"rising/{k}"] for k in range(len(descent))] == rising
    finite = all(math.isfinite(x) for g in gradients for x in g)
    several = finite and sum(any(g) for g in gradients) > 1
    assert (row["norm_ratio"] is not None) == several == (report.norm_ratio is not None)


def test_there_is_no_descent_in_a_step_that_its_weights_skip():
    """Heads have gradients all the same."""
    model = Headed()
    optimizer = optimizer_of(model, method=lambda S: S.new_full((3,), math.nan))
    optimizer.backward(model.losses(X[0]))
    report = optimizer.report()
    assert report.skipped
    assert report.descent == dict.fromkeys(TASKS)
    assert report.rising == []
    assert optimizer.recorder.rows()[0]["descent/a"] is None


def test_a_loss_within_rounding_does_not_rise():
    """What a method has made 0 is so but for the rounding of its weights."""
    g = torch.tensor([0.3, 0.4]).tolist(), torch.tensor([-0.7, 0.1]).tolist()
    J = torch.tensor(g, dtype=torch.float64)
    S = J @ J.mT
    report, _ = plane(*g, method=lambda _: torch.stack([-S[0, 1] / S[0, 0], S.new_tensor(1.0)]))
    assert report.descent["0"] == pytest.approx(0.0, abs=1e-6)
    assert report.rising == []


def test_no_loss_is_said_to_rise_by_rounding():
    """Of gradients that nearly cancel out a cosine may be -1e-4 that is rounding alone."""
    generator = torch.Generator().manual_seed(0)
    smallest = 0.0
    for _ in range(40):
        first, other = torch.randn(2, 200, generator=generator)
        gradients = first, -first + 1e-4 * other, other - 0.5 * first
        parameter = nn.Parameter(torch.zeros(200))
        base = torch.optim.SGD([parameter], lr=0.1)
        optimizer = GCondFused(base, {"a": 1.0, "b": 1.0, "c": 1e-3}, method=NonConflicting(Sum()))
        losses = dict(zip("abc", (parameter @ g for g in gradients), strict=True))
        optimizer.backward(losses)
        report = optimizer.report()
        assert report.rising == []
        smallest = min([smallest, *(c for c in report.descent.values() if c is not None)])
    assert smallest < -1e-6


# Losses.


def reported(optimizer) -> list[float | None]:
    row = optimizer.recorder.rows()[-1]
    losses = optimizer.report().losses
    assert [row[f"loss/{task}"] for task in TASKS] == list(losses.values())
    return list(losses.values())


@pytest.mark.parametrize("method", [Sum(), GCond(), GradDrop()], ids=["Sum", "GCond", "GradDrop"])
def test_losses_are_means_of_the_window_without_their_weight(method):
    model = Headed()
    optimizer = optimizer_of(model, method=method, accumulation_steps=3)
    for window in range(2):
        values = {task: [] for task in TASKS}
        for number, x in enumerate(X[3 * window :][:3]):
            losses = model.losses(x)
            for task in TASKS:
                values[task].append(losses[task].item())
            if number == 1:
                values["b"].pop()
                losses["b"] = None
            if number == 2:
                losses["c"] = lambda x=x: model.losses(x)["c"]
            optimizer.backward(losses)
        assert reported(optimizer) == pytest.approx([sum(v) / len(v) for v in values.values()])
        optimizer.step()


def test_losses_of_stochastic_windows_that_are_scaled_saved_dropped_and_left():
    model = Headed()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = {"mode": "stochastic", "accumulation_steps": 6, "grad_scaler": scaler}
    optimizer = optimizer_of(model, **options)
    values = {task: [] for task in TASKS}

    def micro_batch(x, failing=False):
        (task,) = optimizer.active_tasks
        loss = model.losses(x)[task]
        if failing:
            with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="is dropped"):
                optimizer.backward({task: lambda: 1 / 0})
            return
        optimizer.backward({task: loss})
        values[task].append(loss.item())

    for x in X[:2]:
        micro_batch(x)
    optimizer.drop_window()
    for x in X[2:4]:
        micro_batch(x, failing=x is X[3])
    micro_batch(X[4])
    micro_batch(X[5], failing=True)
    for of_task in values.values():
        of_task.clear()
    for x in X[6:9]:
        micro_batch(x)
    twin = Headed()
    other = optimizer_of(twin, **options | {"grad_scaler": copy.deepcopy(scaler)})
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, other, copied):
        one.resolve()  # c has had no micro-batch
        means = [sum(values["a"]) / 2, values["b"][0], None]
        assert reported(one) == [pytest.approx(mean) for mean in means[:2]] + [None]


def test_a_loss_that_is_not_finite_is_none_and_a_new_task_has_one():
    report, row = plane([math.inf, 0.0], [1.0, 0.0])  # inf * 0
    assert report.losses == {"0": None, "1": 0.0}
    assert (row["loss/0"], row["loss/1"]) == (None, 0.0)
    model = Headed()
    optimizer = GCondFused(torch.optim.SGD(model.parameters(), lr=0.1), {"a": 1.0, "b": 1.0})
    losses = model.losses(X[0])
    optimizer.backward({task: losses[task] for task in "ab"})
    optimizer.step()
    optimizer.add_task("c", 1.0)
    losses = model.losses(X[1])
    optimizer.backward(losses)
    assert reported(optimizer) == [pytest.approx(loss.item()) for loss in losses.values()]
    assert optimizer.recorder.rows()[0]["loss/c"] is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_are_added_without_a_read_on_a_gpu_and_to_the_same_sums(dtype, shape, monkeypatch):
    values = torch.tensor([0.1, 3e38, 1e-40], dtype=dtype).requires_grad_()
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for value in values:
        add_loss(sums[0], 1, value.view(shape))
    no_reads(monkeypatch)
    with HostReads() as reads:
        for value in values:
            add_loss(sums[1], 1, value.view(shape))
    assert reads.found == []
    assert sums[0].tolist() == sums[1].tolist()
    assert sums[0].tolist() == [0.0, sum(values.detach().double().tolist())]


@pytest.mark.filterwarnings("error")
def test_infinite_losses_are_added_without_a_warning():
    sums = torch.zeros(1, dtype=torch.float64)
    for loss in (math.inf, -math.inf, 1.0):
        add_loss(sums, 0, torch.tensor(loss))
    assert math.isnan(sums.item())
