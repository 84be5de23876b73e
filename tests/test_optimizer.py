"""GCondFused as users drive it."""

import copy
import gc
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gcond_kernels import GCond, GCondFused, LionLars, PCGrad, ops
from tests.helpers.models import (
    TASKS,
    batches,
    flat_gradients,
    flat_parameters,
    losses_of,
    model_of,
    no_conflict,
    same,
    sgd,
    task_gradient,
    train,
    without_counters,
)

# One window.


@pytest.mark.parametrize("b", [0.5, 0.0])
@pytest.mark.parametrize("full", [True, False])
def test_exact_mode_is_the_weighted_mean_of_every_task(backend, full, b):
    """Also of a window that is short, and with a weight of zero."""
    model, x, tasks = model_of(), batches(4), {"a": 1.0, "b": b}
    steps = 4 if full else 8
    optimizer = GCondFused(
        sgd(model), tasks, accumulation_steps=steps, method=no_conflict(), backend=backend
    )
    for number, batch in enumerate(x):
        assert optimizer.active_tasks == ("a", "b")
        assert optimizer.backward(losses_of(model, batch)) == (full and number == 3)
    optimizer.resolve()
    assert optimizer.active_tasks == ()  # and .grad is written
    expected = sum(weight * task_gradient(model, x, task) for task, weight in tasks.items())
    assert torch.allclose(flat_gradients(model).double(), expected, rtol=1e-5, atol=1e-7)
    optimizer.step()
    assert optimizer.active_tasks == ("a", "b")


def test_stochastic_mode_gives_each_task_its_block(backend):
    model, x = model_of(), batches(5)
    optimizer = GCondFused(
        sgd(model),
        TASKS,
        accumulation_steps=5,
        mode="stochastic",
        method=no_conflict(),
        backend=backend,
    )
    order = []
    for batch in x:
        (task,) = optimizer.active_tasks
        order.append(task)
        optimizer.backward({task: losses_of(model, batch)[task]})
    assert order == ["a", "a", "a", "b", "b"]  # the first A mod K tasks get one more
    expected = task_gradient(model, x[:3], "a") + 0.5 * task_gradient(model, x[3:], "b")
    assert torch.allclose(flat_gradients(model).double(), expected, rtol=1e-5, atol=1e-7)
    assert optimizer.report().micro_batches == {"a": 3, "b": 2}


def test_short_stochastic_window_leaves_out_tasks_without_micro_batch(backend):
    model, x = model_of(), batches(9)
    optimizer = GCondFused(
        sgd(model, 0.0), TASKS, accumulation_steps=4, mode="stochastic", backend=backend
    )
    train(model, optimizer, x[:4])
    averages = optimizer.report().norm_ema
    history = optimizer._storage.history.clone()
    optimizer.backward({"a": losses_of(model, x[4])["a"]})
    optimizer.step()
    report = optimizer.report()
    assert report.micro_batches == {"a": 1, "b": 0}
    assert report.weights == {"a": 1.0, "b": 0.0}
    assert report.cosines == {}
    assert report.norm_ema["b"] == averages["b"]
    assert torch.equal(optimizer._storage.history[1], history[1])
    assert not torch.equal(optimizer._storage.history[0], history[0])
    assert torch.allclose(
        flat_gradients(model).double(), task_gradient(model, x[4:5], "a"), rtol=1e-5, atol=1e-7
    )


def test_functions_and_tensors_give_the_same(backend):
    results = []
    for kind in ("tensors", "functions", "mixed"):
        model = model_of()
        optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, backend=backend)
        for batch in batches(6):
            losses = losses_of(model, batch)
            functions = {t: lambda t=t, b=batch, m=model: losses_of(m, b)[t] for t in TASKS}
            if kind == "functions":
                losses = functions
            elif kind == "mixed":
                losses = {"a": functions["a"], "b": losses["b"]}
            if optimizer.backward(losses):
                optimizer.step()
        results.append(flat_parameters(model))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_functions_are_called_one_at_a_time_each_graph_freed_before_the_next():
    alive, seen = [], []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.clone())
            alive.append(1)
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            alive.pop()
            return gradient.expand_as(x)

    parameter = nn.Parameter(torch.ones(3))

    def loss():
        seen.append(len(alive))
        return Probe.apply(parameter)

    optimizer = GCondFused(torch.optim.SGD([parameter], lr=0.1), dict.fromkeys("abc", 1.0))
    optimizer.backward(dict.fromkeys("abc", loss))
    assert seen == [0, 0, 0]


def test_a_conflict_is_resolved_and_reported(backend):
    p = nn.Parameter(torch.zeros(2))
    optimizer = GCondFused(torch.optim.SGD([p], lr=1.0), {"x": 1.0, "y": 2.0}, backend=backend)
    optimizer.backward({"x": p @ torch.tensor([1.0, 0.0]), "y": p @ torch.tensor([-0.95, 0.1])})
    optimizer.step()
    report = optimizer.report()
    assert report.zone == "critical"
    (conflict,) = report.conflicts
    assert conflict.tasks == ("x", "y")
    cosine = -0.95 / math.hypot(0.95, 0.1)
    assert conflict.cosine == pytest.approx(cosine)
    assert report.cosines == {("x", "y"): pytest.approx(cosine)}
    assert report.min_cosine == pytest.approx(cosine)
    assert report.tensor_cosines == {"parameter 0": pytest.approx(cosine)}
    assert conflict.winner == "x"  # a first step is a tie: the first of the pair
    assert report.winners == ["x"]
    assert report.norms == {"x": pytest.approx(1.0), "y": pytest.approx(2 * math.hypot(0.95, 0.1))}
    assert torch.allclose(p.grad, torch.tensor([1.0, 0.2]), atol=1e-6)
    assert report.gradient_norm == pytest.approx(math.hypot(1.0, 0.2), rel=1e-6)
    assert torch.allclose(p, -p.grad)
    assert (report.step, report.skipped, report.skipped_steps) == (1, False, 0)


def test_momentum_is_the_bias_corrected_average(backend):
    p = nn.Parameter(torch.zeros(3))
    optimizer = GCondFused(torch.optim.SGD([p], lr=0.0), {"x": 1.0}, momentum=0.9, backend=backend)
    average = torch.zeros(3).double()
    for t in range(1, 6):
        gradient = torch.randn(3)
        optimizer.backward({"x": p @ gradient})
        optimizer.step()
        average = 0.9 * average + 0.1 * gradient.double()
        assert torch.allclose(p.grad.double(), average / (1 - 0.9**t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_max_norm_bounds_what_is_written(backend, momentum):
    model = model_of()
    optimizer = GCondFused(sgd(model), TASKS, momentum=momentum, max_norm=0.05, backend=backend)
    free = model_of()
    unclipped = GCondFused(sgd(free), TASKS, momentum=momentum, backend=backend)
    for batch in batches(3):
        optimizer.backward(losses_of(model, batch))
        optimizer.step()
        assert flat_gradients(model).norm().item() == pytest.approx(0.05, rel=1e-5)
    loose = model_of()
    loosely = GCondFused(sgd(loose), TASKS, momentum=momentum, max_norm=1e3, backend=backend)
    for m, o in ((free, unclipped), (loose, loosely)):
        train(m, o, batches(1))
    assert torch.equal(flat_gradients(loose), flat_gradients(free))


def test_lion_lars_writes_signs_with_a_trust_ratio_per_tensor(backend):
    model = model_of()
    optimizer = GCondFused(
        sgd(model, 0.0),
        {"a": 1.0},
        update=LionLars(0.01, 3.0),
        momentum=0.5,
        backend=backend,
    )
    average = 0.0
    for step, batch in enumerate(batches(3), start=1):
        optimizer.backward({"a": losses_of(model, batch)["a"]})
        optimizer.step()
        average = 0.5 * average + 0.5 * task_gradient(model, [batch], "a")
        hats = (average / (1 - 0.5**step)).split([p.numel() for p in model.parameters()])
        for p, hat in zip(model.parameters(), hats, strict=True):
            ratio = min(p.detach().double().norm() / hat.norm(), 3.0) if p.norm() > 0 else 1.0
            assert torch.allclose(p.grad.double().flatten(), hat.sign() * ratio * 0.01, rtol=1e-5)


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan, True, "1"])
@pytest.mark.parametrize("name", ["coefficient", "clip"])
def test_lion_lars_names_a_number_out_of_its_range(name, number):
    with pytest.raises(ValueError, match=f"LionLars: {name} must be a number above 0"):
        LionLars(**{name: number})


# Parameters of all kinds.


def test_parameters_without_gradient_keep_none_and_are_left_alone(backend):
    model = model_of()
    unused = nn.Parameter(torch.ones(3))
    base = torch.optim.AdamW([*model.parameters(), unused], weight_decay=0.5, betas=(0.0, 0.9))
    optimizer = GCondFused(base, TASKS, momentum=0.9, backend=backend)
    for batch in batches(3):
        optimizer.backward(losses_of(model, batch))
        optimizer.step()
        assert unused.grad is None
    assert torch.equal(unused, torch.ones(3))


def test_a_parameter_that_only_one_task_uses(backend):
    trunk = nn.Parameter(torch.tensor([1.0, 2.0]))
    head = nn.Parameter(torch.tensor([0.5]))
    base = torch.optim.SGD([trunk, head], lr=0.0)
    optimizer = GCondFused(base, TASKS, accumulation_steps=2, backend=backend)
    for window in range(3):
        optimizer.backward({"a": trunk.sum() * head.sum(), "b": trunk.sum()})
        # The second micro-batch leaves the head without a gradient.
        optimizer.backward({"a": trunk.sum(), "b": trunk.sum()})
        optimizer.step()
        assert head.grad.item() == pytest.approx(1.5), window
        assert optimizer.report().tensor_cosines.keys() == {"parameter 0"}


def test_gradient_that_stops_coming_is_not_remembered(backend):
    trunk, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = GCondFused(torch.optim.SGD([trunk, head], lr=0.0), {"a": 1.0}, backend=backend)
    optimizer.backward({"a": trunk.sum() * head.sum()})
    optimizer.step()
    assert head.grad is not None
    optimizer.backward({"a": trunk.sum()})
    optimizer.step()
    assert head.grad is None
    assert torch.equal(trunk.grad, torch.ones(2))


def test_frozen_parameters_cost_nothing_and_may_thaw_in_the_middle_of_a_window(backend):
    model = model_of()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = GCondFused(
        sgd(model), TASKS, accumulation_steps=2, method=no_conflict(), momentum=0.5, backend=backend
    )
    x = batches(4)
    optimizer.backward(losses_of(model, x[0]))
    assert len(optimizer._storage.segments) == 2
    for p in model[0].parameters():
        p.requires_grad_(True)
    optimizer.backward(losses_of(model, x[1]))
    optimizer.step()
    # Of the two micro-batches the thawed layer saw one: its mean counts the other as zero.
    expected = sum(
        weight * task_gradient(model_of(), [x[1]], task) / 2 for task, weight in TASKS.items()
    )
    got = model[0].weight.grad.double().flatten()
    assert torch.allclose(got, expected[: got.numel()], rtol=1e-5, atol=1e-7)


def test_tied_parameters_get_one_gradient(backend):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, i):
            return self.head(self.embedding(i))

    torch.manual_seed(0)
    model = Tied()
    index = torch.tensor([0, 3, 3])
    optimizer = GCondFused(torch.optim.SGD(model.parameters(), lr=0.0), {"a": 1.0}, backend=backend)
    optimizer.backward({"a": model(index).pow(2).mean()})
    optimizer.step()
    written = model.head.weight.grad.clone()
    model.zero_grad()
    model(index).pow(2).mean().backward()
    assert torch.allclose(written, model.head.weight.grad)


def test_param_groups_keep_their_learning_rates_and_more_can_be_added(backend):
    model, extra = model_of(), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.0},
            {"params": model[2].parameters(), "lr": 0.5},
        ],
        lr=0.1,
    )
    optimizer = GCondFused(base, TASKS, accumulation_steps=2, method=no_conflict(), backend=backend)
    frozen = model[0].weight.clone()
    x = batches(3)
    optimizer.backward(losses_of(model, x[0]))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert len(optimizer.param_groups) == len(base.param_groups) == 3
    losses = losses_of(model, x[1])
    optimizer.backward({"a": losses["a"] + extra.sum(), "b": losses["b"]})
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert torch.allclose(extra, torch.full((2,), 0.5))  # one micro-batch of two, λ = 1, lr = 1
    assert not torch.equal(model[2].weight, model_of()[2].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_channels_last_and_views_with_gaps(backend, dtype):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 5, 5).to(dtype)
    plain = nn.Parameter(weight.clone())
    last = nn.Parameter(weight.clone().to(memory_format=torch.channels_last))
    gaps = nn.Parameter(weight.new_zeros(4, 3, 5, 10)[..., ::2])
    gaps.data.copy_(weight)
    direction = torch.randn(4, 3, 5, 5).to(dtype)
    written = []
    for p in (plain, last, gaps):
        optimizer = GCondFused(
            torch.optim.SGD([p], lr=0.0), {"a": 1.0}, accumulation_steps=2, backend=backend
        )
        for scale in (1.0, 2.0):
            optimizer.backward({"a": (p * direction * scale).sum().float()})
        optimizer.step()
        assert p.grad.shape == p.shape
        assert p.grad.dtype == dtype
        written.append(p.grad)
    assert written[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])
    assert torch.allclose(written[0], 1.5 * direction, rtol=1e-2)


def test_gradients_in_another_memory_order_than_the_parameter(backend):
    p = nn.Parameter(torch.randn(4, 6))
    direction = torch.randn(6, 4)

    def turn(parameter):
        parameter.grad = parameter.grad.t().contiguous().t()

    p.register_post_accumulate_grad_hook(turn)
    optimizer = GCondFused(torch.optim.SGD([p], lr=0.0), {"a": 1.0}, backend=backend)
    optimizer.backward({"a": (p * direction.t()).sum()})
    optimizer.step()
    assert torch.equal(p.grad, direction.t())


def test_a_model_converted_to_channels_last_between_steps(backend):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 6, 6)
    optimizer = GCondFused(sgd(model, 0.0), {"a": 1.0}, momentum=0.5, backend=backend)
    for step in range(4):
        if step == 1:
            model.to(memory_format=torch.channels_last)
        optimizer.backward({"a": model(x).pow(2).mean()})
        optimizer.step()
        written = model.weight.grad.clone()
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        assert torch.allclose(written, model.weight.grad, rtol=1e-5, atol=1e-7), step
        optimizer.zero_grad()


def test_a_parameter_frozen_in_the_middle_of_a_window_gets_what_it_was_given(backend):
    model, x = model_of(), batches(3)
    optimizer = GCondFused(
        sgd(model, 1.0), TASKS, accumulation_steps=2, method=no_conflict(), backend=backend
    )
    weight, before = model[0].weight, model_of()
    optimizer.backward(losses_of(model, x[0]))
    weight.requires_grad_(False)
    optimizer.backward(losses_of(model, x[1]))
    # The second micro-batch counts as a gradient of zeros, as in a plain loop.
    expected = sum(of * task_gradient(before, x[:1], task) / 2 for task, of in TASKS.items())
    got = weight.grad.double().flatten()
    assert torch.allclose(got, expected[: got.numel()], rtol=1e-5, atol=1e-7)
    optimizer.step()
    assert torch.equal(weight, before[0].weight - weight.grad)
    after = weight.clone()
    for batch in x[:2]:
        optimizer.backward(losses_of(model, batch))
    optimizer.step()
    assert weight.grad is None
    assert torch.equal(weight, after)


def test_a_group_added_later_leaves_the_momentum_of_the_others(backend):
    p, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = GCondFused(torch.optim.SGD([p], lr=0.0), {"a": 1.0}, momentum=0.9, backend=backend)
    for step in range(4):
        if step == 3:
            optimizer.add_param_group({"params": [late]})
        optimizer.zero_grad()
        late.grad = None
        optimizer.backward({"a": p.sum() + late.sum()})
        optimizer.step()
    # A constant gradient has itself as bias-corrected average, if each counts its own steps.
    assert torch.allclose(p.grad, torch.ones(2))
    assert torch.allclose(late.grad, torch.ones(2))


def test_a_trust_ratio_is_one_where_the_parameter_is_zero(backend):
    p = nn.Parameter(torch.zeros(3))
    optimizer = GCondFused(
        torch.optim.SGD([p], lr=0.0),
        {"a": 1.0},
        update=LionLars(0.01),
        backend=backend,
    )
    optimizer.backward({"a": p @ torch.tensor([5.0, -3.0, 0.0])})
    optimizer.step()
    assert torch.allclose(p.grad, torch.tensor([0.01, -0.01, 0.0]))


def test_tensors_that_share_a_graph_beside_a_function(backend):
    model, x = model_of(), batches(1)[0]
    optimizer = GCondFused(sgd(model), dict.fromkeys("abc", 1.0), backend=backend)
    shared = losses_of(model, x)
    optimizer.backward({"a": lambda: losses_of(model, x)["a"], "b": shared["a"], "c": shared["b"]})
    # The last pass has freed its graph itself, and torch says so.
    errors = {"a": r"was given to GCondFused\.backward", "b": "backward through the graph a second"}
    for name, loss in shared.items():
        assert loss.item() > 0.0
        for again in (loss, loss + model[0].weight.sum()):
            with pytest.raises(RuntimeError, match=errors[name]):
                again.backward()


def test_the_report_of_three_tasks_with_momentum_and_clipping(backend):
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = GCondFused(
        torch.optim.SGD([p, q], lr=0.0),
        dict.fromkeys("abc", 1.0),
        momentum=0.9,
        max_norm=1.0,
        backend=backend,
    )
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    for _ in range(2):
        optimizer.backward({"a": p @ x + q @ x, "b": p @ y - q @ x, "c": p @ x + q @ y})
        optimizer.step()
    report = optimizer.report()
    assert report.tensor_cosines == pytest.approx({"parameter 0": 0.6, "parameter 1": -1.0})
    assert report.tensor_cosines["parameter 1"] >= -1.0
    assert report.cosines == pytest.approx({("a", "b"): -0.2, ("a", "c"): 0.8, ("b", "c"): 0.0})
    optimizer.backward({"a": p @ (x * math.nan), "b": p @ y, "c": p @ x})
    optimizer.step()
    assert optimizer.report().cosines == {("b", "c"): pytest.approx(0.6)}


def test_numbers_of_numpy_are_numbers(backend):
    model = model_of()
    optimizer = GCondFused(
        sgd(model),
        {"a": np.float32(1.0), "b": np.float64(0.5)},
        accumulation_steps=np.int64(1),
        max_norm=np.float32(2.0),
        method=GCond(max_iterations=np.int64(3)),
        backend=backend,
    )
    assert optimizer.backward(losses_of(model, batches(1)[0]))
    optimizer.step()


def test_mixed_dtypes_empty_and_scalar_parameters(backend):
    parameters = [
        nn.Parameter(torch.randn(3, 2, dtype=torch.bfloat16)),
        nn.Parameter(torch.randn(0, 5)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(7, dtype=torch.float64)),
        nn.Parameter(torch.randn(0)),
    ]
    optimizer = GCondFused(
        torch.optim.SGD(parameters, lr=0.1), TASKS, momentum=0.5, backend=backend
    )
    for _ in range(2):
        loss = sum(p.float().sum() for p in parameters)
        optimizer.backward({"a": loss, "b": loss * 2})
        optimizer.step()
    for p in parameters:
        assert p.grad.dtype == p.dtype
        assert p.grad.shape == p.shape
        assert torch.equal(p.grad, torch.full_like(p, 2.0))


def test_gradient_type_other_than_the_parameters(backend):
    p = nn.Parameter(torch.randn(3).bfloat16())
    p.grad_dtype = torch.float32
    optimizer = GCondFused(torch.optim.SGD([p], lr=0.0), {"a": 1.0}, backend=backend)
    optimizer.backward({"a": (p.float() * torch.tensor([1.0, 2.0, 3.0])).sum()})
    optimizer.step()
    assert p.grad.dtype == torch.float32


# Faults.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_gradient_that_is_not_finite_skips_the_step(backend, bad, place):
    p = nn.Parameter(torch.ones(5))
    base = torch.optim.AdamW([p], lr=0.1, betas=(0.0, 0.9))
    optimizer = GCondFused(base, TASKS, momentum=0.9, backend=backend)

    def step(direction):
        optimizer.backward({"a": p @ direction, "b": -(p @ torch.ones(5))})
        optimizer.step()

    step(torch.ones(5))
    before = copy.deepcopy(optimizer.state_dict())
    parameter = p.detach().clone()
    broken = torch.ones(5)
    broken[place] = bad
    step(broken)
    after = optimizer.state_dict()
    assert optimizer.report().skipped
    assert optimizer.report().skipped_steps == 1
    assert math.isnan(optimizer.report().gradient_norm)
    assert torch.equal(p, parameter)
    assert same(without_counters(before), without_counters(after))
    step(torch.ones(5))
    assert not optimizer.report().skipped
    assert not torch.equal(p, parameter)


ERRORS = [
    (lambda m, x: {"a": m(x).mean(), "c": m(x).mean()}, KeyError, "unknown task 'c'"),
    (lambda m, x: {"a": m(x).mean(), "b": m(x)}, ValueError, r"task 'b' must be a scalar.*16, 2"),
    (lambda m, x: {"a": m(x).mean(), "b": m(x).mean().detach()}, ValueError, "'b' has no graph"),
    (lambda m, x: {"a": m(x).mean(), "b": 1.0}, TypeError, "'b' must be a scalar tensor"),
    (lambda m, x: [m(x).mean()], TypeError, "losses must map"),
    (lambda m, x: {"a": m(x).mean(), 1: m(x).mean()}, TypeError, "must be a string, not 1"),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
@pytest.mark.parametrize("begun", [0, 1, 2, 3])
def test_bad_losses_change_nothing(backend, number, begun):
    """Neither before the first window nor in the middle of one."""
    make, error, words = ERRORS[number]
    model, x = model_of(), batches(6)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, momentum=0.9, backend=backend)
    train(model, optimizer, x[:begun])
    before = copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=words):
            optimizer.backward(make(model, x[0]))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert same(before, optimizer.state_dict())
    # And training goes on as if nothing had been.
    train(model, optimizer, x[begun:])
    twin = model_of()
    calm = GCondFused(sgd(twin), TASKS, accumulation_steps=2, momentum=0.9, backend=backend)
    train(twin, calm, x)
    assert torch.equal(flat_parameters(model), flat_parameters(twin))


def test_what_is_assigned_after_bad_losses_holds_for_the_window_that_follows():
    model, x = model_of(), batches(1)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, method=no_conflict())
    with pytest.raises(KeyError, match="unknown task 'c'"):
        optimizer.backward({"c": model(x[0]).mean()})
    optimizer.tasks["a"] = 3.0
    optimizer.accumulation_steps = 1
    assert optimizer.backward(losses_of(model, x[0]))
    expected = 3.0 * task_gradient(model, x, "a") + 0.5 * task_gradient(model, x, "b")
    assert torch.allclose(flat_gradients(model).double(), expected, rtol=1e-5, atol=1e-7)


FAILURES = [
    (lambda m, x: {"a": lambda: m(x).mean(), "b": lambda: m(x)}, ValueError, "'b' must be a sca"),
    (lambda m, x: {"a": lambda: m(x).mean(), "b": lambda: 1 / 0}, ZeroDivisionError, "zero"),
    (lambda m, x: {"a": lambda: m(x).mean(), "b": interrupted}, KeyboardInterrupt, None),
    (lambda m, x: {"a": lambda: 1.0, "b": lambda: m(x).mean()}, TypeError, "'a' must be a scalar"),
    (
        lambda m, x: {"a": lambda: (m(x).mean().backward(), m(x).mean())[1]},
        RuntimeError,
        "loss function of task 'a' ran a backward pass of its own, which left a gradient on param",
    ),
]


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", range(len(FAILURES)))
@pytest.mark.parametrize("begun", [0, 1, 4, 5])
def test_a_failure_voids_its_window_and_nothing_else(backend, number, begun):
    """Counts, sums and losses are gone; momentum, history and averages are as they were."""
    make, error, words = FAILURES[number]
    model, x = model_of(), batches(9)
    options = {"accumulation_steps": 2, "momentum": 0.9, "backend": backend}
    optimizer = GCondFused(sgd(model), TASKS, **options)
    train(model, optimizer, x[:begun])
    full = begun - begun % 2
    lost = "is dropped, " + "the 1 micro-batches before it are lost, " * (begun % 2) + "and"
    with pytest.warns(UserWarning, match=lost) as said, pytest.raises(error, match=words):
        optimizer.backward(make(model, x[0]))
    assert len(said) == 1
    assert all(p.grad is None for p in model.parameters())
    twin = model_of()
    calm = GCondFused(sgd(twin), TASKS, **options)
    train(twin, calm, x[:full])
    if full:
        assert same(optimizer.state_dict(), calm.state_dict())
    for m, o in ((model, optimizer), (twin, calm)):
        train(m, o, x[5:])
    assert torch.equal(flat_parameters(model), flat_parameters(twin))
    assert same(optimizer.state_dict(), calm.state_dict())


class Failing(GCond):
    def apply(self, *_):
        raise ArithmeticError


def test_micro_batches_that_a_failed_resolution_loses_are_counted_without_its_own(backend):
    model, x = model_of(), batches(3)
    options = {"method": Failing(), "accumulation_steps": 3, "backend": backend}
    optimizer = GCondFused(sgd(model), TASKS, **options)
    train(model, optimizer, x[:2])
    lost = "dropped, the 2 micro-batches before it are lost, and"
    with pytest.warns(UserWarning, match=lost), pytest.raises(ArithmeticError):
        optimizer.backward(losses_of(model, x[2]))
    optimizer.accumulation_steps = 1
    with pytest.warns(UserWarning, match="dropped, and"), pytest.raises(ArithmeticError):
        optimizer.backward(losses_of(model, x[2]))


class ZeroDecision(GCond):
    def decide(self, comparison, state):
        decision = super().decide(comparison, state)
        return decision._replace(weights=torch.zeros_like(decision.weights))


class ZeroGradient(GCond):
    def apply(self, gradients, destination, weights, decision, state):
        weights = torch.zeros_like(weights)
        return super().apply(gradients, destination, weights, decision, state)


@pytest.mark.parametrize("method", [ZeroDecision(), ZeroGradient()])
def test_what_a_subclass_of_gcond_overrides_is_used_in_every_window(backend, method):
    """Also in those of which all tensors are known to be shared, which GCond resolves at once."""
    model = model_of()
    optimizer = GCondFused(sgd(model), TASKS, method=method, backend=backend)
    for batch in batches(4):
        optimizer.backward(losses_of(model, batch))
        assert not flat_gradients(model).any()
        optimizer.step()


def test_the_backend_is_looked_up_once_for_a_resolution(backend):
    backends = []

    class Seen(GCond):
        def decide(self, comparison, state):
            backends.append(comparison.backend)
            return super().decide(comparison, state)

        def apply(self, gradients, destination, weights, decision, state):
            backends.append(destination.backend)
            return super().apply(gradients, destination, weights, decision, state)

    model = model_of()
    optimizer = GCondFused(sgd(model), TASKS, method=Seen(), backend=backend)
    train(model, optimizer, batches(1))
    expected = ops.backend_for(backend, torch.device("cpu"))
    assert len(backends) == 2
    assert all(seen is expected for seen in backends)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulation_steps": 3},
        {"mode": "stochastic"},
        {"method": PCGrad()},
        {"granularity": "tensor"},
        {"momentum": 0.9},
        {"update": LionLars(0.01, 3.0)},
        {"max_norm": 0.05},
        {"method": GCond(history_dtype=torch.float32)},
        {"backend": "python"},
    ],
    ids=str,
)
def test_an_option_that_is_assigned_holds_from_the_next_window_on(options):
    model, plain, x = model_of(), model_of(), batches(8)
    optimizer, calm = (GCondFused(sgd(m), TASKS, accumulation_steps=2) for m in (model, plain))
    optimizer.backward(losses_of(model, x[0]))
    for name, value in options.items():
        setattr(optimizer, name, value)
        assert getattr(optimizer, name) == value
    train(model, optimizer, x[1:2])
    train(plain, calm, x[:2])
    assert torch.equal(flat_parameters(model), flat_parameters(plain))
    for name, value in options.items():
        setattr(calm, name, value)
    made = GCondFused(sgd(model_of()), TASKS, **{"accumulation_steps": 2, **options})
    assert optimizer._options.current == calm._options.current == made._options.current
    for m, o in ((model, optimizer), (plain, calm)):
        train(m, o, x[2:])
    assert torch.equal(flat_parameters(model), flat_parameters(plain))
    assert same(optimizer.state_dict(), calm.state_dict())


def test_a_failing_backward_pass_leaves_no_gradient_behind(backend):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, __):
            raise ArithmeticError("in the middle")

    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GCondFused(torch.optim.SGD([first, second], lr=1.0), {"a": 1.0}, backend=backend)
    with (
        pytest.warns(UserWarning, match=r"failed \(ArithmeticError\): its window is dropped"),
        pytest.raises(ArithmeticError, match="in the middle"),
    ):
        optimizer.backward({"a": (Fails.apply(first) + second).sum()})
    assert first.grad is None
    assert second.grad is None
    optimizer.backward({"a": second.sum()})
    optimizer.step()
    assert first.grad is None
    assert torch.equal(second.grad, torch.ones(2))


def test_sparse_gradients_are_named(backend):
    table = nn.Embedding(5, 2, sparse=True)
    base = torch.optim.SGD(table.named_parameters(), lr=0.1)
    optimizer = GCondFused(base, {"a": 1.0}, backend=backend)
    with (
        pytest.warns(UserWarning, match="its window is dropped"),
        pytest.raises(ValueError, match=r"weight got a gradient with layout torch.sparse_coo"),
    ):
        optimizer.backward({"a": table(torch.tensor([1])).sum()})
    assert table.weight.grad is None


def test_a_parameter_on_another_device_is_named():
    cpu, meta = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    optimizer = GCondFused(torch.optim.SGD([cpu], lr=0.1), {"a": 1.0})
    optimizer.add_param_group({"params": [meta]})
    with pytest.raises(ValueError, match="parameter 1 is on meta, but the first parameter is on c"):
        optimizer.backward({"a": cpu.sum()})


def test_parameters_without_memory_yet_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].to_empty(device="cpu")
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device.*materialize the model"):
        GCondFused(sgd, {"a": 1.0})
    model.to_empty(device="cpu")
    GCondFused(torch.optim.SGD(model.named_parameters(), lr=0.1), {"a": 1.0})


def test_a_model_that_is_given_later_is_remembered_weakly():
    model = nn.Linear(2, 2)
    optimizer = GCondFused(torch.optim.SGD(model.parameters(), lr=0.1), {"a": 1.0})
    optimizer.module = None
    assert optimizer.module is None
    optimizer.module = model
    optimizer.module = model
    assert optimizer.module is model
    assert copy.deepcopy(optimizer).module is None
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, not 3"):
        optimizer.module = 3
    assert optimizer.module is model


def test_calls_out_of_order_are_refused(backend):
    model, x = model_of(), batches(4)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=1, backend=backend)
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="nothing to report"):
        optimizer.report()
    optimizer.backward(losses_of(model, x[0]))
    written = [p.grad for p in model.parameters()]
    full = r"the window is full and \.grad holds its result.*step\(\).*drop_window.*Accelerate"
    with pytest.raises(RuntimeError, match=full):
        optimizer.backward(losses_of(model, x[1]))
    with pytest.raises(TypeError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    optimizer.resolve()  # it is: nothing happens
    assert all(p.grad is g for p, g in zip(model.parameters(), written, strict=True))
    assert optimizer.report().step == 1
    with pytest.raises(RuntimeError, match=r"call step\(\) before saving"):
        optimizer.state_dict()
    optimizer.step()
    for call in (optimizer.step, optimizer.resolve):
        with pytest.raises(RuntimeError, match="nothing was accumulated"):
            call()


def test_a_closure_that_does_nothing_is_accepted_and_one_that_computes_is_not(backend):
    model, x = model_of(), batches(3)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, backend=backend)
    calls = []
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        optimizer.step(lambda: calls.append("too early"))
    before = flat_parameters(model)
    for full in (False, True):  # a window that is short, and one that is resolved
        optimizer.backward(losses_of(model, x[0]))
        with pytest.raises(TypeError, match="takes no closure that computes a loss"):
            optimizer.step(lambda: losses_of(model, x[0])["a"])
        if not full:
            with pytest.raises(TypeError, match="takes no closure that computes a loss"):
                optimizer.step(lambda: losses_of(model, x[0])["a"].backward())
    assert torch.equal(before, flat_parameters(model))
    optimizer.step(lambda: calls.append("called"))
    assert calls == ["too early", "called"]
    assert not torch.equal(before, flat_parameters(model))
    assert optimizer.report().step == 1
    assert optimizer.report().micro_batches == {"a": 2, "b": 2}


@pytest.mark.parametrize("at", [3, 4])
def test_copies_go_on_by_themselves(backend, at):
    """In the middle of a window, and between the last backward of one and step."""
    model, x = model_of(), batches(6)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, momentum=0.9, backend=backend)
    train(model, optimizer, x[:2])
    for batch in x[2:at]:
        optimizer.backward(losses_of(model, batch))
    before, results = flat_parameters(model), []
    clones = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for m, o in (*clones, (model, optimizer)):
        assert torch.equal(flat_parameters(model), before)
        for batch in x[at:4]:
            o.backward(losses_of(m, batch))
        o.step()
        train(m, o, x[4:])
        results.append(flat_parameters(m))
    assert not torch.equal(results[0], before)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])
    assert "GCondFused(tasks={'a': 1.0, 'b': 0.5}" in repr(optimizer)


def test_gradients_that_were_replaced_before_the_step_are_its_own(backend):
    model, x = model_of(), batches(2)
    optimizer = GCondFused(sgd(model, 1.0), TASKS, backend=backend)
    before = flat_parameters(model)
    optimizer.backward(losses_of(model, x[0]))
    for p in model.parameters():
        p.grad = p.grad.clamp(-1e-3, 1e-3)
    optimizer.step()
    assert (flat_parameters(model) - before).abs().max() <= 1.001e-3
    optimizer.backward(losses_of(model, x[1]))
    optimizer.step()


def test_the_winners_are_listed_oldest_first(backend):
    p = nn.Parameter(torch.zeros(2))
    method = GCond(tie_breaking_weights=(0.0, 1.0), dominance_window=2)
    optimizer = GCondFused(torch.optim.SGD([p], lr=0.0), TASKS, method=method, backend=backend)
    x = torch.tensor([1.0, 0.1])
    # The stronger one beside its own average wins.
    for of_a, of_b in ((1.0, 1.0), (1.0, 9.0), (9.0, 1.0), (1.0, 9.0)):
        optimizer.backward({"a": p @ x * of_a, "b": -(p @ x.flip(0) + 5 * p[0]) * of_b})
        optimizer.step()
    assert optimizer.report().winners == ["a", "b"]


def test_an_interrupt_in_resolve_ends_the_window(backend, monkeypatch):
    model, twin, x = model_of(), model_of(), batches(2)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=1, backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(ops.Backend, "gramian", lambda *_: interrupted())
        with pytest.warns(UserWarning, match="is lost"), pytest.raises(KeyboardInterrupt):
            optimizer.backward(losses_of(model, x[0]))
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        optimizer.step()
    calm = GCondFused(sgd(twin), TASKS, accumulation_steps=1, backend=backend)
    train(model, optimizer, x[1:])
    train(twin, calm, x[1:])
    assert torch.equal(flat_parameters(model), flat_parameters(twin))


def test_task_that_is_not_active_is_refused():
    model, x = model_of(), batches(1)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, mode="stochastic")
    with pytest.raises(KeyError, match="task 'b' is not active"):
        optimizer.backward(losses_of(model, x[0]))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tasks": {}}, ValueError, "at least one task"),
        ({"tasks": ["a"]}, TypeError, "tasks must map"),
        ({"tasks": {"a": -1.0}}, ValueError, "loss weight of 'a'"),
        ({"tasks": {"a": math.nan}}, ValueError, "loss weight of 'a'"),
        ({"tasks": {"a": "1"}}, ValueError, "loss weight of 'a'"),
        ({"tasks": {1: 1.0}}, TypeError, "must be a string"),
        ({"tasks": {"a": 0.0}}, ValueError, "at least one loss weight"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be"),
        ({"accumulation_steps": 1.5}, ValueError, "accumulation_steps must be"),
        ({"mode": "sequential"}, ValueError, "mode must be"),
        ({"mode": "stochastic"}, ValueError, "accumulation_steps=1 is too few for 2 tasks"),
        ({"method": "gcond"}, TypeError, "method must be"),
        ({"momentum": 1.0}, ValueError, "momentum must be"),
        ({"momentum": math.nan}, ValueError, "momentum must be"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be"),
        ({"max_norm": 1.0, "update": LionLars()}, ValueError, "max_norm does not go with"),
        ({"update": "lion_lars"}, TypeError, r"update must be None or LionLars\(\.\.\.\)"),
        ({"accumulator_dtype": torch.float16}, ValueError, "accumulator_dtype must be"),
        ({"backend": "jax"}, RuntimeError, "backend='jax' cannot be used on cpu"),
        ({"base": "adamw"}, TypeError, "base must be a torch optimizer"),
        (
            {"base": torch.optim.LBFGS(model_of().parameters())},
            TypeError,
            r"LBFGS\.step needs a closure",
        ),
    ],
)
def test_options_out_of_range_are_named(options, error, words):
    arguments = {"base": sgd(model_of()), "tasks": TASKS} | options
    with pytest.raises(error, match=words):
        GCondFused(arguments.pop("base"), arguments.pop("tasks"), **arguments)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("record_steps", r"recorder\.capacity"),
        ("sync", r"distributed=Distributed\(strategy"),
        ("process_group", r"distributed=Distributed\(process_group"),
        ("history_dtype", r"method=GCond\(history_dtype"),
        ("trust_ratio_coef", r"update=LionLars\(coefficient"),
        ("trust_ratio_clip", r"update=LionLars\(clip"),
    ],
)
def test_an_option_of_before_is_not_assigned_and_its_replacement_is_named(name, words):
    optimizer = GCondFused(sgd(model_of()), TASKS)
    with pytest.raises(AttributeError, match=words):
        setattr(optimizer, name, 1)
    setattr(optimizer.base, name, 1)  # what the base has of that name is its own
    setattr(optimizer, name, 2)
    assert getattr(optimizer.base, name) == 2


# As a torch optimizer.


def test_it_is_an_optimizer_that_schedulers_and_hooks_accept(backend):
    model = model_of()
    base = sgd(model, 1.0)
    optimizer = GCondFused(base, TASKS, backend=backend)
    assert isinstance(optimizer, torch.optim.Optimizer)
    with pytest.raises(TypeError, match="not another GCondFused"):
        GCondFused(optimizer, TASKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        optimizer.register_state_dict_post_hook(lambda _, state: state | {"mine": 1})
        optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append(state["mine"]))
        for batch in batches(3):
            optimizer.backward(losses_of(model, batch))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert base.param_groups[0]["lr"] == 0.125
    assert calls == ["pre", "post"] * 3 + [1]
    assert optimizer.defaults is base.defaults
    assert list(optimizer.state) == list(base.state)


def test_zero_grad_clears_grad_and_leaves_the_window(backend):
    model, twin, x = model_of(), model_of(), batches(4)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, backend=backend)
    quiet = GCondFused(sgd(twin), TASKS, accumulation_steps=2, backend=backend)
    for batch in x:
        optimizer.zero_grad()
        train(model, optimizer, [batch])
    train(twin, quiet, x)
    assert torch.equal(flat_parameters(model), flat_parameters(twin))
    optimizer.zero_grad()
    assert model[0].weight.grad is None
    optimizer.backward(losses_of(model, x[0]))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert (flat_gradients(model) == 0).all()
    optimizer.backward(losses_of(model, x[0]))


def test_the_models_mode_is_never_touched(backend):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].eval()
    optimizer = GCondFused(sgd(model), TASKS, backend=backend)
    for batch in batches(2):
        optimizer.backward(losses_of(model, batch))
        optimizer.step()
    assert [m.training for m in model] == [True, True, False, True]
    assert model[1].num_batches_tracked == 2


def test_names_of_parameters_come_from_the_optimizer(backend):
    model = model_of()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = GCondFused(base, TASKS, backend=backend)
    optimizer.backward(losses_of(model, batches(1)[0]))
    optimizer.step()
    names = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert optimizer.report().tensor_cosines.keys() == names


def test_the_written_gradients_are_freed_in_the_next_window(backend):
    model, x = model_of(), batches(2)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, backend=backend)
    for batch in x:
        optimizer.backward(losses_of(model, batch))
    optimizer.step()
    address = model[0].weight.grad
    optimizer.backward(losses_of(model, x[0]))
    assert model[0].weight.grad is None
    gc.collect()
    assert len(gc.get_referrers(address)) <= 2
    assert optimizer._assigned_gradients.ids() == set()


def test_a_parameter_that_changed_its_size_is_named(backend):
    p = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = GCondFused(
        torch.optim.SGD([p], lr=0.1), {"a": 1.0}, accumulation_steps=2, backend=backend
    )
    optimizer.backward({"a": p.sum()})
    p.data = torch.ones(2, 3)  # the same strides
    with (
        pytest.warns(UserWarning, match="the 1 micro-batches before it are lost"),
        pytest.raises(ValueError, match=r"parameter 0 got a gradient of shape \[2, 3\]"),
    ):
        optimizer.backward({"a": p.sum()})
    for _ in range(2):  # the next window has room for what it is now
        optimizer.backward({"a": p.sum()})
    optimizer.step()
    assert torch.equal(p.grad, torch.ones(2, 3))


def test_a_gradient_that_is_a_negated_view_keeps_its_sign(backend):
    b = torch.nn.Parameter(torch.tensor(0.5))
    optimizer = GCondFused(torch.optim.SGD([b], lr=1.0), {"a": 1.0}, backend=backend)
    z = torch.complex(torch.tensor(1.0), b)
    optimizer.backward({"a": (z.conj() * 1).sum().imag})
    assert b.grad.item() == -1.0
