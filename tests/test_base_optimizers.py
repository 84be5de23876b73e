"""GCondFused around each of the optimizers that people train with."""

import copy
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gcond_kernels import GCondFused
from gcond_kernels.storage.state_format import without_gcond
from tests.helpers.models import (
    TASKS,
    batches,
    flat_parameters,
    losses_of,
    no_conflict,
    same,
    through_a_file,
    train,
    without_counters,
)


def others():
    """The package that Lion and LARS are from."""
    return pytest.importorskip("pytorch_optimizer", reason="Lion and LARS are taken from there")


# Each takes parameters or groups; with weight decay, by which a step shows whatever the gradient.
BASES = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD foreach": lambda p: sgd(p, foreach=True),
    "SGD fused": lambda p: sgd(p, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "Lion": lambda p: others().Lion(p, lr=0.01, weight_decay=0.1),
    "LARS": lambda p: others().LARS(p, lr=1.0, weight_decay=0.1),
}
# What smooths the gradient in each; Adafactor has an average of squares alone.
SMOOTHING = {
    "AdamW foreach": r"betas=\(0.9, 0.999\) in AdamW",
    "AdamW fused": r"betas=\(0.9, 0.999\) in AdamW",
    "Adam": r"betas=\(0.9, 0.999\) in Adam\b",
    "SGD foreach": "momentum=0.9 in SGD",
    "SGD fused": "momentum=0.9 in SGD",
    "Adafactor": None,
    "Muon": "momentum=0.95 in Muon",
    "Lion": r"betas=\(0.9, 0.99\) in Lion",
    "LARS": "momentum=0.9 in LARS",
}

each_base = pytest.mark.parametrize("name", BASES)


@pytest.fixture(autouse=True)
def unfilled_memory_is_nan():
    """So that a state which a base optimizer has allocated and not filled cannot pass for zeros."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def sgd(p, **how):
    return torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1, **how)


def model_for(name) -> nn.Sequential:
    """Two layers; without biases for Muon, which takes matrices only."""
    torch.manual_seed(0)
    bias = name != "Muon"
    return nn.Sequential(nn.Linear(4, 8, bias), nn.Tanh(), nn.Linear(8, 2, bias))


def groups_of(model, lrs):
    layers = (model[0], model[2])
    return [
        {"params": list(layer.parameters()), "lr": lr}
        for layer, lr in zip(layers, lrs, strict=True)
    ]


def wrapped(name, model, **options) -> GCondFused:
    options = {"accumulation_steps": 2, "method": no_conflict()} | options
    return GCondFused(BASES[name](model.parameters()), TASKS, **options)


def gradients(optimizer):
    return [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]


def give(optimizer, values):
    """Sets the gradients; clones, since some optimizers write to them (LARS does)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, value in zip(parameters, values, strict=True):
        p.grad = value.clone()


def seen_by(base):
    """What the base optimizer finds in .grad in each of its steps, from now on."""
    seen = []
    base.register_step_pre_hook(lambda *_: seen.append(gradients(base)))
    return seen


def plain_gradients(model, x):
    """Of the weighted mean loss over the micro-batches, by autograd alone."""
    loss = sum(
        TASKS[task] * value for batch in x for task, value in losses_of(model, batch).items()
    )
    return torch.autograd.grad(loss / len(x), list(model.parameters()))


@each_base
def test_without_conflict_it_trains_as_the_base_alone(name):
    model, twin = model_for(name), model_for(name)
    optimizer, alone = wrapped(name, model), BASES[name](twin.parameters())
    x = batches(12)
    for window in range(6):
        pair = x[2 * window : 2 * window + 2]
        expected = plain_gradients(model, pair)
        for batch in pair:
            optimizer.backward(losses_of(model, batch))
        # Sums of float32 in another order: some units in the last place of the largest terms.
        for got, value in zip(gradients(optimizer), expected, strict=True):
            assert torch.allclose(got, value, rtol=1e-5, atol=1e-6)
        # From the same gradient it is the same step, to the bit: nothing else touches a parameter.
        give(alone, gradients(optimizer))
        optimizer.step()
        alone.step()
        assert torch.equal(flat_parameters(model), flat_parameters(twin))
    assert same(without_gcond(optimizer.base.state_dict()), alone.state_dict())
    assert not torch.equal(flat_parameters(model), flat_parameters(model_for(name)))


@each_base
def test_schedulers_and_groups_with_their_own_rates(name):
    model, twin = model_for(name), model_for(name)
    base = BASES[name](groups_of(model, (0.02, 0.005)))
    optimizer = GCondFused(base, TASKS, accumulation_steps=2, method=no_conflict())
    factors = [lambda step: 0.5**step, lambda step: 1.0 + step]
    scheduler = LambdaLR(optimizer, factors)
    alone = BASES[name](groups_of(twin, (0.02, 0.005)))
    seen, x = seen_by(base), batches(8)
    for step in range(4):
        rates = [0.02 * 0.5**step, 0.005 * (1 + step)]
        assert [group["lr"] for group in base.param_groups] == pytest.approx(rates)
        assert scheduler.get_last_lr() == pytest.approx(rates)
        for group, set_by_scheduler in zip(alone.param_groups, base.param_groups, strict=True):
            group["lr"] = float(set_by_scheduler["lr"])
        train(model, optimizer, x[2 * step : 2 * step + 2])
        scheduler.step()
        give(alone, seen[step])
        alone.step()
        assert torch.equal(flat_parameters(model), flat_parameters(twin))
    assert len(seen) == 4


@each_base
def test_what_is_clipped_after_backward_is_what_the_base_steps_with(name):
    model, twin = model_for(name), model_for(name)
    optimizer, alone = wrapped(name, model), BASES[name](twin.parameters())
    seen, x = seen_by(optimizer.base), batches(6)
    for window in range(3):
        for batch in x[2 * window : 2 * window + 2]:
            optimizer.backward(losses_of(model, batch))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert norm > 0.1  # so clipping changed something
        clipped = gradients(optimizer)
        optimizer.step()
        assert same(seen[window], clipped)
        # 1e-3: clip_grad_norm_ divides by the norm and 1e-6 more, which is 1e-5 of it at most.
        assert math.sqrt(sum(g.square().sum() for g in clipped)) == pytest.approx(0.01, rel=1e-3)
        give(alone, clipped)
        alone.step()
        assert torch.equal(flat_parameters(model), flat_parameters(twin))


@each_base
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_state_from_the_middle_of_a_window_goes_on_to_the_same_bits(name, at):
    model, x = model_for(name), batches(10)
    optimizer = wrapped(name, model)
    train(model, optimizer, x[:at])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, x[at:])

    resumed = model_for(name)
    other = wrapped(name, resumed)
    train(resumed, other, batches(2, seed=7))  # a state of its own, to be replaced
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert same(other.state_dict()["state"], saved["optimizer"]["state"])
    train(resumed, other, x[at:])
    assert torch.equal(flat_parameters(model), flat_parameters(resumed))
    assert same(optimizer.state_dict(), other.state_dict())


def all_tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else ()
    return [tensor for value in values for tensor in all_tensors(value)]


@each_base
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_might_as_well_not_have_been(name, value, steps_before):
    model, twin = model_for(name), model_for(name)
    optimizer, calm = wrapped(name, model), wrapped(name, twin)
    x = batches(2 * steps_before + 8)
    start = 2 * steps_before
    train(model, optimizer, x[:start])
    train(twin, calm, x[:start])
    before = flat_parameters(model), copy.deepcopy(optimizer.base.state_dict())

    optimizer.backward(losses_of(model, x[0]))
    losses = losses_of(model, x[1])
    # One element of one task's gradient, in the second micro-batch of two.
    optimizer.backward({"a": losses["a"], "b": losses["b"] + model[2].weight[0, 0] * value})
    optimizer.step()
    assert optimizer.report().skipped
    assert torch.equal(flat_parameters(model), before[0])
    after = optimizer.base.state_dict()
    if name == "AdamW fused" and not steps_before:
        # Its own step makes the state that it starts from before it leaves the update out.
        assert all(not tensor.any() for tensor in all_tensors(after["state"]))
        after = {**after, "state": {}}
    assert same(after, before[1])

    train(model, optimizer, x[start:])
    train(twin, calm, x[start:])
    assert torch.equal(flat_parameters(model), flat_parameters(twin))
    assert same(without_counters(optimizer.state_dict()), without_counters(calm.state_dict()))
    assert optimizer.report().skipped_steps == 1


@each_base
def test_smoothing_twice_is_warned_of_where_the_base_smooths(name):
    model, words = model_for(name), SMOOTHING[name]
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        wrapped(name, model, momentum=0.9)
    assert len(log) == (words is not None)
    for one in log:
        assert re.search(f"smoothed twice: by momentum in .* {words}", str(one.message))
    base = BASES[name](model.parameters())
    off = {"betas": (0.0, 0.9), "momentum": 0.0}
    base.param_groups[0].update({k: off[k] for k in off.keys() & base.param_groups[0].keys()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(name, model)
        GCondFused(base, TASKS, momentum=0.9)


def test_muon_beside_adamw_in_one_optimizer():
    """A model with biases: torch's Muon refuses those, this one steps them with AdamW."""
    x, models, steps = batches(8), [], []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others_ = [p for p in model.parameters() if p.ndim < 2]
        base = others().Muon(
            [{"params": matrices, "use_muon": True}, {"params": others_, "use_muon": False}]
        )
        if by_hand:
            for gradient in steps:
                give(base, gradient)
                base.step()
        else:
            steps = seen_by(base)
            train(model, GCondFused(base, TASKS, accumulation_steps=2), x)
        models.append(flat_parameters(model))
    assert len(steps) == 4
    assert torch.equal(*models)
