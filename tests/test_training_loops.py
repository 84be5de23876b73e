"""Training loops as people write them; the right value is computed beside each, by plain torch."""

import copy
import enum
import gc
import math
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gcond_kernels import MGDA, CAGrad, GCond, GCondFused, GradNorm, PCGrad, Sum
from tests.helpers.models import through_a_file

TASKS = {"a": 1.0, "b": 0.5}
# Sums in float32 in another order.
ROUNDING = 1e-5


def inputs(count, seed=1, width=4):
    return torch.randn(count, 16, width, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A body that all tasks share, and a head of each task's own."""

    def __init__(self, tasks="ab"):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 8)
        # Heads that read the body alike, towards targets of other signs: a conflict in the body.
        head = nn.Linear(8, 1)
        self.heads = nn.ModuleDict({task: copy.deepcopy(head) for task in tasks})

    def forward(self, x):
        hidden = self.body(x).tanh()
        return {task: head(hidden) for task, head in self.heads.items()}


def losses_of(model, x):
    """Losses that conflict in the body."""
    return {
        task: (y - (-1) ** k * (k + 1)).square().mean()
        for k, (task, y) in enumerate(model(x).items())
    }


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def off(got, wanted):
    """Relative distance of two lists of tensors."""
    got, wanted = flat(got).double(), flat(wanted).double()
    return ((got - wanted).norm() / wanted.norm()).item()


def plain(model, x, weights=TASKS):
    """Gradients of the weighted mean loss over micro-batches, by autograd alone."""
    loss = sum(weights[k] * v for batch in x for k, v in losses_of(model, batch).items())
    grads = torch.autograd.grad(loss / len(x), list(model.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(model.parameters(), grads, strict=True)
    ]


def step_plainly(model, optimizer, x, clip=lambda _: None):
    """A step with the gradient of the weighted mean, by autograd alone."""
    for p, g in zip(model.parameters(), plain(model, x), strict=True):
        p.grad = g
    clip(list(model.parameters()))
    optimizer.step()


# Between the last backward of a window and step.


@pytest.mark.parametrize("how", ["clip_grad_norm_", "clip_grad_value_", "in a step hook", "scaled"])
def test_what_clips_before_step_clips(how):
    model, twin, x = Net(), Net(), inputs(2)
    optimizer = GCondFused(sgd(model, 1.0), TASKS, accumulation_steps=2, method=Sum())

    def clip(parameters):
        if how == "clip_grad_value_":
            nn.utils.clip_grad_value_(parameters, 0.01)
        elif how == "scaled":
            for p in parameters:
                p.grad = p.grad * 0.25
        else:
            nn.utils.clip_grad_norm_(parameters, 0.01)

    if how == "in a step hook":
        optimizer.register_step_pre_hook(lambda *_: clip(list(model.parameters())))
    for batch in x:
        full = optimizer.backward(losses_of(model, batch))
    assert full
    if how != "in a step hook":
        clip(list(model.parameters()))
    optimizer.step()
    step_plainly(twin, sgd(twin, 1.0), x, clip)
    assert off(model.parameters(), twin.parameters()) < ROUNDING


@pytest.mark.parametrize("alone", [False, True])
def test_an_auxiliary_loss_adds_to_the_gradient(alone):
    """Also where it alone reaches a parameter of the base."""
    x = inputs(1)
    model = Net()
    model.extra = nn.Parameter(torch.ones(3))

    def auxiliary():
        body = 0.0 if alone else model.body.weight.square().sum()
        return body + model.extra.square().sum()

    wanted = plain(model, x)
    extra = torch.autograd.grad(auxiliary(), list(model.parameters()), allow_unused=True)
    wanted = [w if e is None else w + e for w, e in zip(wanted, extra, strict=True)]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = GCondFused(sgd(model), TASKS, method=Sum())
    optimizer.backward(losses_of(model, x[0]))
    auxiliary().backward()
    assert off(gradients(model), wanted) < ROUNDING
    optimizer.step()
    moved = [(b - p) / 0.1 for b, p in zip(before, model.parameters(), strict=True)]
    assert off(moved, wanted) < ROUNDING


def test_between_two_backward_calls_of_a_window_it_is_an_error_that_loses_nothing():
    model, x = Net(), inputs(2)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, method=Sum())
    optimizer.backward(losses_of(model, x[0]))
    model.body.weight.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 has a \.grad that this .* zero_grad"):
        optimizer.backward(losses_of(model, x[1]))
    assert model.body.weight.grad is not None
    optimizer.zero_grad()
    assert optimizer.backward(losses_of(model, x[1]))
    assert off(gradients(model), plain(model, x)) < ROUNDING


# What a loss function may do.


@pytest.mark.parametrize("call", ["backward", "step", "resolve", "drop_window"])
def test_no_call_within_backward(call):
    model, x = Net(), inputs(2)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2)

    def loss():
        getattr(optimizer, call)(*([losses_of(model, x[0])] if call == "backward" else []))
        return losses_of(model, x[0])["a"]

    with (
        pytest.raises(RuntimeError, match=rf"{call}\(\) was called within backward"),
        pytest.warns(UserWarning, match="its window is dropped"),
    ):
        optimizer.backward({"a": loss})
    for batch in x:
        optimizer.backward(losses_of(model, batch))
    optimizer.step()
    assert optimizer.report().micro_batches == {"a": 2, "b": 2}


def test_a_loss_function_may_call_autograd_grad():
    model, x = Net(), inputs(1)
    optimizer = GCondFused(sgd(model), TASKS, method=Sum())

    def probing():
        torch.autograd.grad(losses_of(model, x[0])["b"], model.body.weight)
        return losses_of(model, x[0])["a"]

    optimizer.backward({"a": probing, "b": losses_of(model, x[0])["b"]})
    assert off(gradients(model), plain(model, x)) < ROUNDING


@pytest.mark.parametrize("then", ["step", "backward"])
def test_a_window_that_raises_as_it_is_resolved(then):
    model, x = Net(), inputs(2)
    optimizer = GCondFused(sgd(model), TASKS, on_nonfinite="raise", method=Sum())
    losses = losses_of(model, x[0])
    with pytest.raises(FloatingPointError, match="task 'b'"):
        optimizer.backward({"a": losses["a"], "b": losses["b"] * math.inf})
    before = flat(model.parameters())
    if then == "step":
        optimizer.on_nonfinite = "drop_task"
        optimizer.step()
        assert optimizer.report().nonfinite_tasks == ["b"]
        assert not torch.equal(before, flat(model.parameters()))
    else:
        with pytest.warns(UserWarning, match="could not be resolved, and is dropped"):
            optimizer.backward(losses_of(model, x[1]))
        assert off(gradients(model), plain(model, x[1:])) < ROUNDING


# Which parameters a task has.


def ways_to_zeros(tasks):
    def stacked(model, x):
        return dict(zip(tasks, torch.stack(list(losses_of(model, x).values())), strict=True))

    def from_one_tensor(model, x):
        y = torch.cat(list(model(x).values()), 1)
        target = torch.tensor([(-1.0) ** k * (k + 1) for k in range(len(tasks))])
        means = (y - target).square().mean(0)
        return {task: means[k] for k, task in enumerate(tasks)}

    def reentrant(model, x):
        def one(task):
            z = x.clone().requires_grad_()
            outputs = checkpoint(lambda z: tuple(model(z).values()), z, use_reentrant=True)
            k = list(tasks).index(task)
            return (outputs[k] - (-1) ** k * (k + 1)).square().mean()

        return {task: lambda task=task: one(task) for task in tasks}

    def compiled(model, x):
        run = torch.compile(model, backend="aot_eager")
        return {
            task: lambda k=k, task=task: (run(x)[task] - (-1) ** k * (k + 1)).square().mean()
            for k, task in enumerate(tasks)
        }

    return {
        "stacked": stacked,
        "one tensor": from_one_tensor,
        "reentrant": reentrant,
        "compiled": compiled,
    }


@pytest.mark.parametrize("way", ["stacked", "one tensor", "reentrant", "compiled"])
@pytest.mark.parametrize(
    ("method", "granularity"),
    [
        (GCond(), "model"),
        (GCond(), "tensor"),
        (PCGrad(), "model"),
        (MGDA(), "tensor"),
        (CAGrad(), "model"),
    ],
)
def test_zeros_of_autograd_are_no_gradients(way, method, granularity):
    tasks, x = "abc", inputs(3)
    weights = dict.fromkeys(tasks, 1.0)
    got = {}
    for name, losses in (("none", losses_of), (way, ways_to_zeros(tasks)[way])):
        torch._dynamo.reset()
        model = Net(tasks)
        optimizer = GCondFused(sgd(model, 0.01), weights, method=method, granularity=granularity)
        for batch in x:
            optimizer.backward(losses(model, batch))
            optimizer.step()
        got[name] = gradients(model), optimizer.report()
    assert min(got["none"][1].cosines.values()) < -0.5
    assert off(got[way][0], got["none"][0]) < 1e-4  # three steps on
    for pair, cosine in got["none"][1].cosines.items():
        assert got[way][1].cosines[pair] == pytest.approx(cosine, abs=1e-5)
    assert got[way][1].tensor_cosines.keys() == got["none"][1].tensor_cosines.keys()


def test_a_head_whose_task_had_nothing_gets_no_gradient_of_zeros():
    """A compiled model gives its head zeros: a step with those would follow stale momentum."""
    torch._dynamo.reset()
    model, x = Net(), inputs(4)
    losses = ways_to_zeros("ab")["compiled"]
    adam = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = GCondFused(adam, TASKS)
    for batch in x[:2]:
        optimizer.backward(losses(model, batch))
        optimizer.step()
    before = flat(model.heads["b"].parameters()).clone()
    for batch in x[2:]:
        optimizer.backward({"a": losses(model, batch)["a"]})
        assert all(p.grad is None for p in model.heads["b"].parameters())
        assert all(p.grad is not None for p in model.heads["a"].parameters())
        optimizer.step()
    assert torch.equal(before, flat(model.heads["b"].parameters()))


# Tasks as they come.


@pytest.mark.parametrize("empty", ["left out", "None"])
def test_one_task_in_each_micro_batch(empty):
    model, x, drawn = Net(), inputs(5), ["a", "b", "a", None, "a"]
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=5, method=Sum())
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for task, batch in zip(drawn, x, strict=True):
        share = {k: (k == task) * w / drawn.count(k) for k, w in TASKS.items()}
        wanted = [w + g for w, g in zip(wanted, plain(model, [batch], share), strict=True)]
        given = {k: loss for k, loss in losses_of(model, batch).items() if k == task}
        if empty != "left out":
            given = {**dict.fromkeys(TASKS), **given}
        full = optimizer.backward(given)
    assert full
    assert off(gradients(model), wanted) < ROUNDING
    assert optimizer.report().micro_batches == {"a": 3, "b": 1}


def test_a_window_without_any_loss_is_no_step():
    model, x = Net(), inputs(1)
    optimizer = GCondFused(
        torch.optim.AdamW(model.parameters(), lr=0.1), TASKS, accumulation_steps=2
    )
    for batch in (x[0], x[0]):
        optimizer.backward(losses_of(model, batch))
    optimizer.step()
    before, steps = flat(model.parameters()), optimizer.report().step
    assert not optimizer.backward({})
    assert optimizer.backward(dict.fromkeys(TASKS))
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert torch.equal(before, flat(model.parameters()))
    assert optimizer.report().step == steps


@pytest.mark.parametrize("way", ["left out", "None"])
def test_a_task_that_is_away_for_a_while(way):
    tasks = {"a": 1.0, "b": 1.0, "c": 1.0}
    model, x = Net("abc"), inputs(8)
    adam = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = GCondFused(adam, tasks)
    for batch in x[:4]:
        optimizer.backward(losses_of(model, batch))
        optimizer.step()
    average = optimizer.report().norm_ema["c"]
    history = optimizer._storage.history[2].clone()
    before = flat(model.heads["c"].parameters()).clone()
    for batch in x[4:]:
        losses = losses_of(model, batch)
        del losses["c"]
        if way == "None":
            losses["c"] = None
        optimizer.backward(losses)
        optimizer.step()
    assert torch.equal(before, flat(model.heads["c"].parameters()))
    assert optimizer.report().norm_ema["c"] == average
    assert torch.equal(history, optimizer._storage.history[2])
    optimizer.backward(losses_of(model, x[0]))
    assert optimizer.report().micro_batches == {"a": 1, "b": 1, "c": 1}


def test_stochastic_mode_takes_none_for_a_task_that_has_nothing():
    model, x = Net(), inputs(4)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=4, mode="stochastic", method=Sum())
    for position, batch in enumerate(x):
        (task,) = optimizer.active_tasks
        loss = losses_of(model, batch)[task]
        optimizer.backward({task: None if position == 1 else loss})
    assert optimizer.report().micro_batches == {"a": 1, "b": 2}
    of_a, of_b = plain(model, x[:1], {**TASKS, "b": 0.0}), plain(model, x[2:], {**TASKS, "a": 0.0})
    assert off(gradients(model), [a + b for a, b in zip(of_a, of_b, strict=True)]) < ROUNDING


# GCond's bound on the number of projections is 2K else.
@pytest.mark.parametrize("method", [GCond(max_iterations=4), GradNorm(), PCGrad()])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_a_task_added_in_training(method, granularity):
    """The others keep all they have: the first window after it is that without the new task."""
    x, runs = inputs(6), []
    for adds in (False, True):
        model = Net("abc")
        optimizer = GCondFused(
            sgd(model), TASKS, method=method, granularity=granularity, momentum=0.5
        )
        for number, batch in enumerate(x):
            losses = losses_of(model, batch)
            if adds and number == 3:
                optimizer.add_task("c", 2.0)
            optimizer.backward({task: losses[task] for task in "ab"})
            optimizer.step()
        runs.append((model, optimizer))
    (calm, _), (model, optimizer) = runs
    assert torch.equal(flat(model.parameters()), flat(calm.parameters()))
    assert dict(optimizer.tasks) == {**TASKS, "c": 2.0}
    optimizer.backward(losses_of(model, x[0]))
    optimizer.step()
    report = optimizer.report()
    assert set(report.cosines) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert all(p.grad is not None for p in model.heads["c"].parameters())
    again = GCondFused(
        sgd(model), {**TASKS, "c": 2.0}, method=method, granularity=granularity, momentum=0.5
    )
    again.load_state_dict(through_a_file(optimizer.state_dict()))


def test_a_task_is_not_added_within_a_window_nor_twice():
    model, x = Net(), inputs(2)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2)
    optimizer.backward(losses_of(model, x[0]))
    with pytest.raises(RuntimeError, match="between two windows"):
        optimizer.add_task("c", 1.0)
    optimizer.drop_window()
    with pytest.raises(ValueError, match="there is a task 'a'"):
        optimizer.add_task("a", 1.0)
    with pytest.raises(ValueError, match="weight of 'c'"):
        optimizer.add_task("c", -1.0)
    assert dict(optimizer.tasks) == TASKS


@pytest.mark.parametrize("new", [0.25, torch.tensor([0.25]), np.float32(0.25), torch.tensor(0.25)])
def test_loss_weights_change_from_the_next_window_on(new):
    model, x = Net(), inputs(4)
    optimizer = GCondFused(sgd(model, 0.0), TASKS, accumulation_steps=2, method=Sum())
    optimizer.backward(losses_of(model, x[0]))
    optimizer.tasks["a"] = new
    optimizer.backward(losses_of(model, x[1]))
    assert off(gradients(model), plain(model, x[:2])) < ROUNDING
    optimizer.step()
    for batch in x[2:]:
        optimizer.backward(losses_of(model, batch))
    assert off(gradients(model), plain(model, x[2:], {"a": 0.25, "b": 0.5})) < ROUNDING
    with pytest.raises(KeyError, match="add_task"):
        optimizer.tasks["z"] = 1.0
    with pytest.raises(ValueError, match="must be 0 or more"):
        optimizer.tasks["a"] = math.nan


def test_a_window_is_dropped():
    model, x = Net(), inputs(6)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=4, method=Sum())
    for batch in x[:2]:
        optimizer.backward(losses_of(model, batch))
    optimizer.drop_window()
    full = [optimizer.backward(losses_of(model, batch)) for batch in x[2:]]
    assert full == [False, False, False, True]
    assert off(gradients(model), plain(model, x[2:])) < ROUNDING
    optimizer.drop_window()  # of a window that is resolved: the step is not made
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(losses_of(model, x[0]))


# `.grad` is the user's.


def change(model, what):
    """Convert a model, or do to its gradients what only their owner may do."""
    if what == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif what == "float64":
        model.double()
    for p in model.parameters():
        if what == "data":
            p.grad.data = torch.full_like(p, 7.0)
        elif what == "replaced":
            p.grad = torch.full_like(p, 7.0)
            p.grad = None
        elif what == "resized":
            p.grad.data = p.grad.data.clone()
            p.grad.resize_(0)
            p.grad = None
        elif what == "transposed" and p.dim() == 2:
            p.grad.data.t_()


@pytest.mark.parametrize(
    "what", ["channels_last", "float64", "data", "replaced", "resized", "transposed"]
)
def test_what_becomes_of_a_gradient_does_not_matter_later(what):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    optimizer = GCondFused(sgd(model), TASKS, method=GCond(tie_breaking_weights=(0.5, 0.5)))
    assert not optimizer.backward({}) or optimizer.step() is None
    x = torch.randn(5, 8, 3, 6, 6)

    def losses(batch):
        y = model(batch.to(model[0].weight))
        return {"a": y[:, 0].square().mean(), "b": (y.sum(1) - 1).square().mean()}

    for number, batch in enumerate(x):
        loss = losses(batch)
        wanted = torch.autograd.grad(
            loss["a"] + 0.5 * loss["b"], list(model.parameters()), retain_graph=True
        )
        optimizer.backward(loss)
        report = optimizer.report()
        if report.cosines["a", "b"] >= 0.0:
            assert off([p.grad for p in model.parameters()], wanted) < ROUNDING
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
        w = {k: 1.0 * v for k, v in report.weights.items()}
        again = losses(batch)
        resolved = torch.autograd.grad(
            w["a"] * again["a"] + 0.5 * w["b"] * again["b"], list(model.parameters())
        )
        assert off([p.grad for p in model.parameters()], resolved) < ROUNDING
        optimizer.step()
        if number == 1:
            change(model, what)
    assert model[0].weight.is_contiguous() == (what != "channels_last")


def test_a_parameter_takes_part_as_its_gradient_comes_frozen_or_not():
    """A GAN freezes D for G's losses and thaws it before the step, or after it."""
    model, twin, x = Net(), Net(), inputs(4)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=2, method=Sum())
    reference = sgd(twin)
    for pair in x.view(2, 2, 16, 4):
        for batch in pair:
            model.requires_grad_(True)
            full = optimizer.backward(losses_of(model, batch))
            model.requires_grad_(False)
        assert full
        optimizer.step()
        step_plainly(twin, reference, pair)
    assert off(model.parameters(), twin.parameters()) < ROUNDING


# Parameters that come and go, and those of others.


def test_a_trunk_here_and_heads_elsewhere():
    for mode, steps in (("exact", 4), ("stochastic", 4), ("exact", 1)):
        model, x = Net(), inputs(steps)
        heads = sgd(model.heads)
        optimizer = GCondFused(
            sgd(model.body), TASKS, accumulation_steps=steps, mode=mode, method=Sum()
        )
        wanted = [torch.zeros_like(p) for p in model.parameters()]
        for batch in x:
            active, losses = optimizer.active_tasks, losses_of(model, batch)
            share = 1 / steps if mode == "exact" else 2 / steps
            total = {task: share * (task in active) * TASKS[task] for task in TASKS}
            wanted = [w + g for w, g in zip(wanted, plain(model, [batch], total), strict=True)]
            optimizer.backward({task: losses[task] for task in active})
        assert off(gradients(model), wanted) < ROUNDING, mode
        optimizer.step()
        heads.step()


def densified(optimizer):
    """As 3D Gaussian splatting does it: a group's parameter and its state are replaced.

    joeyan/gaussian_splatting#32
    """
    (group,) = optimizer.param_groups
    old = group["params"][0]
    state = optimizer.state.get(old)
    del optimizer.state[old]
    new = nn.Parameter(torch.cat([old.detach(), old.detach()[:2]]))
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.cat([state[name], torch.zeros_like(state[name][:2])])
    group["params"][0] = new
    optimizer.state[new] = state
    return new


@pytest.mark.parametrize("method", [Sum(), GCond()])
def test_a_parameter_that_is_replaced(method):
    start = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    adam = torch.optim.Adam([p], lr=0.01)
    optimizer = GCondFused(torch.optim.Adam([q], lr=0.01), {"a": 1.0, "b": 1.0}, method=method)
    for step in range(12):
        adam.zero_grad()
        (p.square().mean() + (p + 0.1).square().mean()).backward()
        adam.step()
        optimizer.backward({"a": q.square().mean(), "b": (q + 0.1).square().mean()})
        optimizer.step()
        if step % 4 == 3:
            p, q = densified(adam), densified(optimizer)
    assert off([q], [p]) < ROUNDING
    optimizer.backward({"a": q.square().mean(), "b": (q + 0.1).square().mean()})
    assert optimizer._storage.layout.sizes == (q.numel(),)
    assert optimizer._storage.accumulators.shape[1] < 2 * q.numel()
    optimizer.step()
    again = GCondFused(torch.optim.Adam([q], lr=0.01), {"a": 1.0, "b": 1.0}, method=method)
    again.load_state_dict(optimizer.state_dict())


def test_a_group_that_is_removed_leaves_what_others_have():
    model, twin, x = Net("abc"), Net("abc"), inputs(4)

    def wrapped(m):
        parts = (m.heads["c"], m.body, m.heads["a"], m.heads["b"])
        base = torch.optim.SGD([{"params": part.parameters()} for part in parts], lr=0.1)
        tasks = dict.fromkeys("abc", 1.0)
        return GCondFused(base, tasks, momentum=0.9, granularity="tensor")

    optimizer, calm = wrapped(model), wrapped(twin)
    for number, batch in enumerate(x):
        if number == 2:
            del optimizer.param_groups[0]
        for o, m in ((optimizer, model), (calm, twin)):
            losses = losses_of(m, batch)
            o.backward({task: losses[task] for task in "ab"} if number >= 2 else losses)
            o.step()
            m.zero_grad()
    for name in ("a", "b"):
        assert torch.equal(
            flat(model.heads[name].parameters()), flat(twin.heads[name].parameters())
        )
    assert torch.equal(flat(model.body.parameters()), flat(twin.body.parameters()))
    assert len(optimizer._storage.segments) == 6
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("how", ["assign", "a model made anew", "parametrized"])
def test_an_optimizer_of_another_models_parameters(how):
    model, x = Net(), inputs(1)
    optimizer = GCondFused(sgd(model), TASKS)
    if how == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    elif how == "a model made anew":
        model = Net()
    else:
        for layer in (model.body, *model.heads.values()):
            for name, p in list(layer.named_parameters(recurse=False)):
                layer.register_parameter(name, nn.Parameter(p.detach().clone()))
    with (
        pytest.raises(RuntimeError, match=r"no loss has reached.*make both optimizers after"),
        pytest.warns(),
    ):
        optimizer.backward(losses_of(model, x[0]))


def test_frozen_parameters_are_not_taken_for_those_of_another_model():
    """A trunk that has its own optimizer and is frozen while the heads warm up."""
    model, x = Net(), inputs(2)
    trunk, heads = GCondFused(sgd(model.body), TASKS), sgd(model.heads)
    model.body.requires_grad_(False)
    before = flat(model.parameters()).clone()
    assert trunk.backward(losses_of(model, x[0]))
    trunk.step()
    heads.step()
    assert torch.equal(before[: 4 * 8 + 8], flat(model.body.parameters()))
    model.zero_grad()
    model.body.requires_grad_(True)
    trunk.backward(losses_of(model, x[1]))
    assert all(p.grad is not None for p in model.body.parameters())


# What is assigned.


@pytest.mark.parametrize("mode", ["exact", "stochastic"])
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_accumulation_steps_that_change(mode, before, after):
    model, x = Net(), inputs(before + after)
    optimizer = GCondFused(
        sgd(model, 0.0), TASKS, accumulation_steps=before, mode=mode, method=Sum()
    )
    for window in (x[:before], x[before:]):
        if len(window) == after:
            optimizer.accumulation_steps = np.int64(after)
        for number, batch in enumerate(window):
            losses = losses_of(model, batch)
            full = optimizer.backward({task: losses[task] for task in optimizer.active_tasks})
            assert full == (number == len(window) - 1)
        share = len(window) if mode == "exact" else len(window) // 2
        assert optimizer.report().micro_batches == {"a": share, "b": share}
        optimizer.step()
    assert type(optimizer.accumulation_steps) is int


def test_a_method_assigned_is_that_of_an_optimizer_made_with_it():
    model, twin, x = Net(), Net(), inputs(4)
    optimizer = GCondFused(sgd(model, 0.0), TASKS, method=Sum(), momentum=0.5)
    other = GCondFused(sgd(twin, 0.0), TASKS, method=GCond(dominance_window=2))
    for number, batch in enumerate(x):
        if number == 1:
            optimizer.method = GCond(dominance_window=2)
            optimizer.momentum = 0.0
        optimizer.backward(losses_of(model, batch))
        optimizer.step()
        if number:
            other.backward(losses_of(twin, batch))
            other.step()
            assert all(map(torch.equal, gradients(model), gradients(twin)))
    assert optimizer._storage.momentum is None
    # Of the same method the state stays where it fits.
    average = optimizer.report().norm_ema
    optimizer.thresholds = (-0.9, -0.6, -0.1)
    assert optimizer.method == GCond(dominance_window=2, thresholds=(-0.9, -0.6, -0.1))
    assert optimizer._resolver.method_state["norm_ema"].tolist() == list(average.values())
    optimizer.momentum = 0.9
    optimizer.granularity = "tensor"
    optimizer.backward(losses_of(model, x[0]))
    optimizer.step()
    assert optimizer.report().tensor_weights


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("accumulation_steps", 0, ValueError, "whole number above 0"),
        ("mode", "both", ValueError, "mode must be"),
        ("mode", "stochastic", ValueError, "too few for 2 tasks"),
        ("method", "pcgrad", TypeError, "method must be"),
        ("momentum", 1.0, ValueError, "momentum must be"),
        ("max_norm", -1.0, ValueError, "max_norm must be"),
        ("backend", "fast", RuntimeError, "no such backend"),
        ("thresholds", (0.5, 0.0, 0.0), ValueError, "thresholds must be"),
        ("tasks", {"a": 1.0}, ValueError, "add_task"),
        ("accumulator_dtype", torch.bfloat16, AttributeError, "make a new GCondFused"),
        ("grad_scaler", None, AttributeError, "make a new GCondFused"),
        ("distributed", None, AttributeError, "make a new GCondFused"),
    ],
)
def test_what_cannot_be_assigned_says_so_and_changes_nothing(name, value, error, words):
    model = Net()
    optimizer = GCondFused(sgd(model), TASKS)
    before = repr(optimizer), optimizer.max_norm, optimizer.momentum
    with pytest.raises(error, match=words):
        setattr(optimizer, name, value)
    assert (repr(optimizer), optimizer.max_norm, optimizer.momentum) == before
    assert optimizer.backward(losses_of(model, inputs(1)[0]))


def test_options_of_a_method_say_how_they_are_changed():
    for method in (GCond(), PCGrad(), CAGrad()):
        option = next(iter(vars(method)))
        with pytest.raises(AttributeError, match=rf"optimizer\.method = {type(method).__name__}\("):
            setattr(method, option, 1)


class WithModes(torch.optim.SGD):
    """As schedule-free optimizers are: with methods and attributes of its own."""

    warmup = 7

    def eval(self):
        return "eval of the base"


def test_attributes_of_the_base_are_reached_and_assigned():
    model = Net()
    optimizer = GCondFused(WithModes(model.parameters(), lr=0.1), TASKS)
    assert optimizer.eval() == "eval of the base"
    assert optimizer.warmup == 7
    assert not hasattr(optimizer, "train")
    with pytest.raises(AttributeError, match=r"neither GCondFused nor WithModes has .* 'trian'"):
        optimizer.trian()
    assert copy.deepcopy(optimizer).warmup == 7
    optimizer.warmup = 3
    assert optimizer.base.warmup == optimizer.warmup == 3
    optimizer.note = "mine"
    assert optimizer.note == "mine"
    assert not hasattr(optimizer.base, "note")


# Names and numbers as people have them.


class Task(str, enum.Enum):
    LEFT = "left"
    RIGHT = "right"


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


@pytest.mark.parametrize(
    "names", [[Task.LEFT, Task.RIGHT], [Kind.ONE, Kind.TWO], list(np.array(["x", "y"]))]
)
def test_names_of_enumerations_and_numpy(names):
    model, x = Net(), inputs(1)
    optimizer = GCondFused(
        sgd(model), dict.fromkeys(names, np.float64(1.0)), accumulation_steps=np.int32(1)
    )
    losses = dict(zip(names, losses_of(model, x[0]).values(), strict=True))
    assert list(optimizer.active_tasks) == names
    optimizer.backward({task: losses[task] for task in optimizer.active_tasks})
    optimizer.step()
    assert all(type(name) is str for name in optimizer.report().norms)
    optimizer.tasks[names[0]] = 0.5
    assert optimizer.tasks[names[0]] == 0.5
    again = GCondFused(sgd(model), dict.fromkeys(names, 1.0))
    again.load_state_dict(through_a_file(optimizer.state_dict()))


def test_parameters_of_two_models_with_equal_names():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    groups = [{"params": list(m.named_parameters())} for m in (first, second)]
    optimizer = GCondFused(torch.optim.SGD(groups, lr=0.1), TASKS, granularity="tensor")
    y = second(torch.randn(4, 3)) + first(torch.randn(4, 3))
    optimizer.backward({"a": y.square().mean(), "b": (y - 3).square().mean()})
    names = {"group0.weight", "group0.bias", "group1.weight", "group1.bias"}
    assert set(optimizer.report().tensor_cosines) == names
    assert {row["layer"] for row in optimizer.recorder.layers()} == {"group0", "group1"}


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_full_step_within_autocast(dtype):
    runs = []
    for cast in (False, True):
        model, x = Net(), inputs(4)
        optimizer = GCondFused(sgd(model), TASKS, momentum=0.9)
        for batch in x:
            losses = losses_of(model, batch)  # in float32 either way
            with torch.autocast("cpu", dtype=dtype, enabled=cast):
                optimizer.backward(losses)
                optimizer.step()
        runs.append((flat(model.parameters()), optimizer.report().cosines))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_steps_within_inference_mode_leave_nothing_that_cannot_be_changed_later():
    model, twin, x = Net(), Net(), inputs(5)
    options = {"accumulation_steps": 2, "momentum": 0.9}
    optimizer, calm = (GCondFused(sgd(m), TASKS, **options) for m in (model, twin))
    for o, m, within in ((optimizer, model, True), (calm, twin, False)):
        for batch in x:
            o.backward(losses_of(m, batch))
            with torch.inference_mode(within):
                o.resolve()  # short windows
                o.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("choice", ["skip", "drop_task", "raise"])
@pytest.mark.parametrize("method", [Sum(), GCond(), lambda S: S.new_full((2,), 2.0)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_sum_that_leaves_float16_is_no_step(choice, method, momentum):
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = GCondFused(
        torch.optim.SGD([p], lr=1e-4),
        {"a": 1.0, "b": 1.0},
        method=method,
        on_nonfinite=choice,
        momentum=momentum,
    )
    optimizer.backward({"a": (p * 100).sum(), "b": (p * 200).sum()})
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer._resolver.method_state.items()}
    momentum_before = copy.deepcopy(optimizer._storage.momentum)
    before = p.detach().clone()
    losses = {"a": (p * 40000).sum(), "b": (p * 40000).sum()}
    if choice == "raise":
        with pytest.raises(FloatingPointError, match=r"range of \.grad's type"):
            optimizer.backward(losses)
        optimizer.on_nonfinite = "skip"
    else:
        optimizer.backward(losses)
    optimizer.step()
    assert optimizer.report().skipped
    assert torch.equal(p, before)
    for name, value in state.items():
        assert torch.equal(value, optimizer._resolver.method_state[name]), name
    if momentum:
        assert torch.equal(momentum_before, optimizer._storage.momentum)


def test_a_long_gradient_of_small_elements_fits_into_float16():
    p = nn.Parameter(torch.ones(100_000, dtype=torch.float16))
    optimizer = GCondFused(torch.optim.SGD([p], lr=0.0), {"a": 1.0, "b": 1.0}, method=Sum())
    optimizer.backward({"a": (p * 30000).sum(), "b": (p * 30000).sum()})
    assert torch.equal(p.grad, torch.full_like(p, 60000.0))
    optimizer.step()
    assert not optimizer.report().skipped
    optimizer.max_norm = 1.0  # and what is clipped fits whatever it was
    optimizer.backward({"a": (p * 40000).sum(), "b": (p * 40000).sum()})
    assert p.grad.isfinite().all()
    optimizer.step()
    assert not optimizer.report().skipped


def test_weights_that_leave_float32_are_no_step():
    model, x = Net(), inputs(1)
    optimizer = GCondFused(sgd(model), TASKS, method=lambda S: S.new_full((2,), 1e300))
    before = flat(model.parameters()).clone()
    optimizer.backward(losses_of(model, x[0]))
    optimizer.step()
    assert optimizer.report().skipped
    assert torch.equal(before, flat(model.parameters()))


def test_unscale_is_part_of_recipes_and_does_nothing():
    model, twin, x = Net(), Net(), inputs(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = GCondFused(sgd(model, 1.0), TASKS, method=Sum(), grad_scaler=scaler)
    reference, clip = sgd(twin, 1.0), partial(nn.utils.clip_grad_norm_, max_norm=0.05)
    for batch in x:
        optimizer.backward(losses_of(model, batch))
        scaler.unscale_(optimizer)
        clip(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        step_plainly(twin, reference, batch[None], clip)
    assert off(model.parameters(), twin.parameters()) < ROUNDING


# Memory, and graphs that cannot be passed back through twice.


def activations_alive(backward, shared, hold):
    """Bytes of saved activations that are alive after a backward pass, and of all."""
    saved = []

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        # Detached: a box that held the graph would keep itself alive by it.
        box = Box(tensor.detach())
        saved.append((weakref.ref(box), tensor.numel()))
        return box

    trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
    heads = nn.ModuleDict({k: nn.Sequential(nn.Linear(32, 64), nn.Tanh()) for k in "abcd"})
    x = torch.randn(64, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        features = trunk(x)
        outputs = {k: heads[k](features if shared else trunk(x)) for k in "abcd"}
        losses = {k: y.square().mean() for k, y in outputs.items()}
    del features
    if not hold:
        del outputs
    backward([*trunk.parameters(), *heads.parameters()], losses)
    gc.collect()
    return sum(n for box, n in saved if box() is not None), sum(n for _, n in saved)


@pytest.mark.parametrize("shared", [True, False])
def test_graphs_are_freed_though_the_losses_are_kept(shared):
    def backward(parameters, losses):
        base = torch.optim.SGD(parameters, lr=0.1)
        GCondFused(base, dict.fromkeys("abcd", 1.0)).backward(losses)

    alive, total = activations_alive(backward, shared, hold=False)
    assert alive == 0 < total


def test_losses_that_are_made_of_each_other():
    """Saved tensors of one loss may be another loss; one tensor may be the loss of two tasks."""
    model, x = Net(), inputs(1)[0]
    optimizer = GCondFused(sgd(model, 0.0), dict.fromkeys("abcd", 1.0), method=Sum())
    loss = losses_of(model, x)["a"]
    parameters = [*model.body.parameters(), *model.heads["a"].parameters()]
    wanted = torch.autograd.grad(
        loss + loss.square() + loss + 3 * loss, parameters, retain_graph=True
    )
    optimizer.backward(
        {"a": loss, "b": loss.square(), "c": loss, "d": lambda: 3 * losses_of(model, x)["a"]}
    )
    assert off([p.grad for p in parameters], wanted) < ROUNDING


def test_a_parameter_may_be_a_loss():
    model, x = Net(), inputs(1)
    model.scale = nn.Parameter(torch.ones(()))
    optimizer = GCondFused(sgd(model), TASKS, method=Sum())
    optimizer.backward({"a": losses_of(model, x[0])["a"], "b": model.scale})
    assert model.scale.requires_grad
    assert model.scale.grad.item() == 0.5
    optimizer.step()
    assert model.scale.item() == pytest.approx(0.95)


def test_selective_checkpoints_are_passed_back_through_once():
    def policy(_, op, *__, **___):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def logits():
        return checkpoint(
            block,
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 5))
    optimizer = GCondFused(sgd(block), TASKS, method=Sum())
    x, y = torch.randn(4, 8), torch.randint(0, 5, (4,))
    z = logits()
    losses = {"a": functional.cross_entropy(z, y), "b": z.logsumexp(-1).square().mean()}
    with pytest.raises(RuntimeError, match="give the losses as functions"), pytest.warns():
        optimizer.backward(losses)
    optimizer.backward(
        {
            "a": lambda: functional.cross_entropy(logits(), y),
            "b": lambda: logits().logsumexp(-1).square().mean(),
        }
    )
    z = block(x)
    total = functional.cross_entropy(z, y) + 0.5 * z.logsumexp(-1).square().mean()
    assert off(gradients(block), torch.autograd.grad(total, list(block.parameters()))) < ROUNDING


class OverwritesWhatItSaved(torch.autograd.Function):
    """Multiplies a saved gradient in place in its backward pass, as fused cross entropies do."""

    @staticmethod
    def forward(ctx, logits, target):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = functional.cross_entropy(leaf, target)
            (gradient,) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx, above):
        gradient = ctx.saved_tensors[0].data
        gradient.mul_(above)
        return gradient, None


def test_a_fused_loss_that_overwrites_what_it_saved_is_refused_and_right_as_a_function():
    torch.manual_seed(0)
    model, x, target = nn.Linear(8, 4), torch.randn(8, 8), torch.randint(0, 4, (8,))
    optimizer = GCondFused(sgd(model, 0.0), TASKS, method=Sum())

    def losses(cross_entropy):
        ce = cross_entropy(model(x), target)
        return {"a": 2 * ce, "b": 0.5 * ce + model(x).square().mean()}

    plain_losses = losses(functional.cross_entropy)
    wanted = torch.autograd.grad(
        plain_losses["a"] + 0.5 * plain_losses["b"], list(model.parameters())
    )
    fused = OverwritesWhatItSaved.apply
    with pytest.raises(RuntimeError, match="of OverwritesWhatItSaved overwrites"), pytest.warns():
        optimizer.backward(losses(fused))
    # One that two tasks do not share is right as a tensor.
    ce = fused(model(x), target)
    optimizer.backward(
        {
            "a": 2 * ce,
            "b": 0.5 * functional.cross_entropy(model(x), target) + model(x).square().mean(),
        }
    )
    assert off(gradients(model), wanted) < ROUNDING
    optimizer.step()
    optimizer.backward({k: lambda k=k: losses(fused)[k] for k in TASKS})
    assert off(gradients(model), wanted) < ROUNDING


def test_a_bfloat16_loss_rounds_no_weight():
    """Within the sums a weight of 0.85 / 24 is exact, though a bfloat16 loss has no such number."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = GCondFused(
        torch.optim.SGD([p], lr=0.0), {"a": 0.85}, accumulation_steps=24, method=Sum()
    )
    p.grad_dtype = torch.float32
    for _ in range(24):
        optimizer.backward({"a": p.sum()})
    # One rounding of each gradient to bfloat16 is left, and those of the factor are made up for.
    assert p.grad.dtype == torch.float32
    assert torch.allclose(p.grad, torch.full_like(p.grad, 0.85), rtol=1e-6)


# What came out when others read it.


@pytest.mark.parametrize("end", ["resolve", "step"])
def test_a_short_window_does_not_replace_the_gradient_of_another_loss(end):
    model, x = Net(), inputs(1)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=4, method=Sum())
    optimizer.backward(losses_of(model, x[0]))
    model.body.weight.sum().backward()
    with pytest.raises(RuntimeError, match=r"from another backward pass.*resolve\(\) first"):
        getattr(optimizer, end)()
    optimizer.zero_grad()
    optimizer.resolve()
    model.body.weight.sum().backward()
    wanted = plain(model, x)
    wanted[0] = wanted[0] + 1.0
    assert off(gradients(model), wanted) < ROUNDING


@pytest.mark.parametrize(("mode", "steps"), [("exact", 1), ("exact", 2), ("stochastic", 2)])
def test_the_usual_loop_goes_on_after_a_window_that_was_not_finite(mode, steps):
    model, x = Net(), inputs(3 * steps)
    optimizer = GCondFused(
        sgd(model, 0.0), TASKS, accumulation_steps=steps, mode=mode, on_nonfinite="raise"
    )
    seen = []
    for number, batch in enumerate(x):
        losses = losses_of(model, batch * (math.nan if number == steps - 1 else 1.0))
        losses = {task: losses[task] for task in optimizer.active_tasks}
        assert losses
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                full = optimizer.backward(losses)
        except FloatingPointError:
            seen.append("raised")
        else:
            if full:
                seen.append(all(p.grad is not None for p in model.parameters()))
                optimizer.step()
    assert seen == ["raised", True, True]


def test_a_method_that_raises_voids_the_window():
    model, x = Net(), inputs(2)
    broken = [True]

    def method(S):
        if broken[0]:
            raise ArithmeticError("no weights")
        return S.new_ones(len(S))

    optimizer = GCondFused(sgd(model), TASKS, method=method)
    with pytest.warns(UserWarning, match="its window is dropped"), pytest.raises(ArithmeticError):
        optimizer.backward(losses_of(model, x[0]))
    assert optimizer.active_tasks == ("a", "b")
    broken[0] = False
    optimizer.backward(losses_of(model, x[1]))
    assert off(gradients(model), plain(model, x[1:])) < ROUNDING


def test_a_head_whose_task_has_not_come_yet_stays_where_it_is():
    model, x = Net(), inputs(1)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = GCondFused(adam, TASKS)
    before = flat(model.heads["a"].parameters()).clone()
    stacked = torch.stack(list(losses_of(model, x[0]).values()))
    optimizer.backward({"b": stacked[1]})
    assert all(p.grad is None for p in model.heads["a"].parameters())
    optimizer.step()
    assert torch.equal(before, flat(model.heads["a"].parameters()))


@pytest.mark.parametrize("when", ["another subset", "a later window"])
def test_a_fused_loss_that_comes_later_is_refused_too(when):
    torch.manual_seed(0)
    model, x, target = nn.Linear(8, 4), torch.randn(8, 8), torch.randint(0, 4, (8,))
    tasks, steps = {"a": 1.0, "b": 0.5, "c": 1.0}, 2 if when == "another subset" else 1
    optimizer = GCondFused(sgd(model, 0.0), tasks, accumulation_steps=steps, method=Sum())
    y = model(x)
    if optimizer.backward({"a": y.square().mean(), "c": y.mean()}):
        optimizer.step()
    ce = OverwritesWhatItSaved.apply(model(x), target)
    with pytest.raises(RuntimeError, match="of OverwritesWhatItSaved overwrites"), pytest.warns():
        optimizer.backward({"a": 3 * ce, "b": 0.5 * ce + model(x).square().mean()})


def test_a_fused_loss_is_refused_where_many_micro_batches_had_another_in_its_place():
    torch.manual_seed(0)
    model, x, target = nn.Linear(8, 4), torch.randn(8, 8), torch.randint(0, 4, (8,))
    optimizer = GCondFused(sgd(model, 0.0), TASKS, method=Sum())

    def losses(cross_entropy):
        ce = cross_entropy(model(x), target)
        return {"a": 3 * ce, "b": 0.5 * ce + model(x).square().mean()}

    for _ in range(20):
        optimizer.backward(losses(functional.cross_entropy))
        optimizer.step()
    with pytest.raises(RuntimeError, match="of OverwritesWhatItSaved overwrites"), pytest.warns():
        optimizer.backward(losses(OverwritesWhatItSaved.apply))


def test_a_state_after_a_group_with_a_state_was_removed():
    model, x = Net(), inputs(2)
    groups = [{"params": model.body.parameters()}, {"params": model.heads.parameters()}]
    optimizer = GCondFused(torch.optim.AdamW(groups, lr=0.1), TASKS)
    optimizer.backward(losses_of(model, x[0]))
    optimizer.step()
    del optimizer.param_groups[1]
    state = optimizer.state_dict()
    assert set(state["state"]) == {0, 1}
    optimizer.load_state_dict(state)
    model.zero_grad()
    optimizer.backward(losses_of(model, x[1]))
