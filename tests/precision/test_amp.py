"""Low precision: bfloat16 parameters, autocast, and loss scaling with torch's GradScaler."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from gcond_kernels import GCondFused, LionLars
from gcond_kernels.storage import collect
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
)

# A power of two: products with it are exact, so that unscaling restores the bits.
SCALE = 2.0**12
# Bytes of a bucket: for one gradient, or for all of them.
BUCKETS = [8, 32 << 20]


def scaler_of(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **({"init_scale": SCALE, "growth_interval": 1000} | options))


def fused(model, **options) -> GCondFused:
    return GCondFused(sgd(model), TASKS, **options)


# bfloat16 and autocast.


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("bucket", BUCKETS)
def test_bfloat16_parameters_lose_no_small_gradients(backend, bucket, monkeypatch):
    monkeypatch.setattr(collect, "BUCKET_BYTES", bucket)
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    base = torch.optim.SGD([p], lr=0.0)
    steps = 1024
    optimizer = GCondFused(base, {"a": float(steps)}, accumulation_steps=steps, backend=backend)
    # In a bfloat16 buffer the sum of these would stop at 0.5.
    for _ in range(steps):
        optimizer.backward({"a": (p * 2.0**-9).sum()})
    optimizer.step()
    assert p.grad.dtype == torch.bfloat16
    assert optimizer._storage.accumulators.dtype == torch.float32
    assert torch.equal(p.grad.float(), torch.full((3,), 2.0))


def test_bfloat16_models_get_gradients_of_their_type_or_of_grad_dtype(backend):
    model = model_of().bfloat16()
    model[0].weight.grad_dtype = torch.float32
    optimizer = GCondFused(sgd(model, 0.0), TASKS, accumulation_steps=2, backend=backend)
    for batch in batches(2):
        optimizer.backward(losses_of(model, batch.bfloat16()))
    optimizer.step()
    kinds = [p.grad.dtype for p in model.parameters()]
    assert kinds == [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16]


def test_autocast(backend):
    model, x = model_of(), batches(4)
    optimizer = fused(model, accumulation_steps=4, method=no_conflict(), backend=backend)
    for batch in x:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(model, batch)
        optimizer.backward(losses)
    expected = sum(weight * task_gradient(model, x, task) for task, weight in TASKS.items())
    got = flat_gradients(model)
    assert got.dtype == torch.float32
    # Activations have 8 bits: relative errors of 2^-8 each, over a handful of operations.
    assert (got - expected).norm() <= 0.03 * expected.norm()


class Normalized(nn.Module):
    """Layers whose statistics mixed precision must not spoil."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.LayerNorm(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_normalization_under_autocast_with_a_scaler(backend):
    model, twin, scaler = Normalized(), Normalized(), scaler_of()
    options = {"accumulation_steps": 2, "method": no_conflict(), "backend": backend}
    optimizer, plain = fused(model, grad_scaler=scaler, **options), sgd(twin)
    for batch in batches(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, same_losses = losses_of(model, batch), losses_of(twin, batch)
        (sum(TASKS[task] * loss for task, loss in same_losses.items()) / 2).backward()
        if optimizer.backward(losses):
            optimizer.step()
            scaler.update()
            plain.step()
            plain.zero_grad()
    assert model.body[1].num_batches_tracked == 8
    assert torch.allclose(model.body[1].running_var, twin.body[1].running_var, rtol=0.01)
    # The tasks' gradients are rounded to bfloat16 one by one here, and as their sum there.
    assert torch.allclose(flat_parameters(model), flat_parameters(twin), atol=0.01)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("update", [None, LionLars()])
def test_a_users_default_type_changes_nothing(backend, default, update):
    results = []
    for used in (torch.float32, default):
        model, scaler, x = model_of(), scaler_of(), batches(4)
        options = {"momentum": 0.5, "update": update, "grad_scaler": scaler, "backend": backend}
        torch.set_default_dtype(used)
        try:
            train(model, fused(model, **options), x, scaler)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(flat_parameters(model))
    assert torch.equal(*results)


# GradScaler.


@pytest.mark.parametrize(
    ("by_scaler", "mode", "bucket"),
    [
        (False, "exact", BUCKETS[0]),
        (False, "stochastic", BUCKETS[1]),
        (True, "exact", BUCKETS[1]),
        (True, "stochastic", BUCKETS[0]),
    ],
)
def test_scaled_training_has_the_bits_of_training_without_a_scale(
    backend, by_scaler, mode, bucket, monkeypatch
):
    monkeypatch.setattr(collect, "BUCKET_BYTES", bucket)
    x = batches(12)
    options = {"accumulation_steps": 3, "momentum": 0.5, "mode": mode, "backend": backend}
    plain, model, scaler = model_of(), model_of(), scaler_of(growth_interval=2)
    train(plain, fused(plain, **options), x)
    train(model, fused(model, grad_scaler=scaler, **options), x, scaler, by_scaler)
    assert torch.equal(flat_parameters(plain), flat_parameters(model))
    assert scaler.get_scale() == 4 * SCALE  # four steps without overflow


def test_a_scale_that_changes_inside_a_window(backend):
    plain, model, scaler, x = model_of(), model_of(), scaler_of(), batches(4)
    options = {"accumulation_steps": 4, "backend": backend}
    train(plain, fused(plain, **options), x)
    optimizer = fused(model, grad_scaler=scaler, **options)
    for number, batch in enumerate(x):
        optimizer.backward(losses_of(model, batch))
        scaler.update(new_scale=2.0 ** (number + 3))
    optimizer.step()
    assert torch.equal(flat_parameters(plain), flat_parameters(model))


def test_small_gradients_in_float16_survive_by_the_scale(backend):
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    p.grad_dtype = torch.float32
    written = []
    for scaler in (None, scaler_of(init_scale=2.0**16)):
        base = torch.optim.SGD([p], lr=0.0)
        optimizer = GCondFused(base, {"a": 1.0}, grad_scaler=scaler, backend=backend)
        q = p.clone()  # its gradient is float16
        optimizer.backward({"a": (q * 2.0**-10).float().sum() * 2.0**-16})
        optimizer.step()
        written.append(p.grad.clone())
        optimizer.zero_grad()
    assert torch.equal(written[0], torch.zeros(3))  # 2^-26 is below float16
    assert torch.equal(written[1], torch.full((3,), 2.0**-26))


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task"])
@pytest.mark.parametrize("by_scaler", [False, True])
def test_an_overflow_is_reported_to_the_scaler(backend, on_nonfinite, by_scaler):
    model, x = model_of(), batches(6)
    scaler = scaler_of()
    base = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.0, 0.9))
    optimizer = GCondFused(
        base, TASKS, momentum=0.9, on_nonfinite=on_nonfinite, grad_scaler=scaler, backend=backend
    )
    train(model, optimizer, x[:2], scaler, by_scaler)
    assert scaler.get_scale() == SCALE
    before = flat_parameters(model), copy.deepcopy(base.state_dict())
    losses = losses_of(model, x[2])
    optimizer.backward({"a": losses["a"] * math.inf, "b": losses["b"]})
    scaler.step(optimizer) if by_scaler else optimizer.step()
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    report = optimizer.report()
    assert report.nonfinite_tasks == ["a"]
    assert report.skipped == (on_nonfinite == "skip")
    assert same(before, (flat_parameters(model), base.state_dict())) == report.skipped
    train(model, optimizer, x[3:], scaler, by_scaler)
    assert scaler.get_scale() == SCALE / 2


def test_a_scale_that_is_too_large_shrinks(backend):
    """Training starts from a scale at which float16 overflows."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    p.grad_dtype = torch.float32
    scaler = scaler_of(init_scale=2.0**20)
    optimizer = GCondFused(
        torch.optim.SGD([p], lr=0.5), {"a": 1.0}, grad_scaler=scaler, backend=backend
    )
    for _ in range(6):
        optimizer.backward({"a": (p.clone() * 1.0).float().sum()})
        optimizer.step()
        scaler.update()
    assert optimizer.report().skipped_steps == 5  # 2^16 is the first power beyond float16
    assert scaler.get_scale() == 2.0**15
    assert torch.equal(p, torch.full((4,), 0.5, dtype=torch.float16))


def test_a_disabled_scaler_does_nothing(backend):
    plain, model, x = model_of(), model_of(), batches(4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    options = {"accumulation_steps": 2, "backend": backend}
    train(plain, fused(plain, **options), x)
    optimizer = fused(model, grad_scaler=scaler, on_nonfinite="raise", **options)
    train(model, optimizer, x, scaler, by_scaler=True)
    assert torch.equal(flat_parameters(plain), flat_parameters(model))


def test_resuming_inside_a_window(backend):
    x = batches(8)
    options = {"accumulation_steps": 4, "momentum": 0.5, "backend": backend}
    model, scaler = model_of(), scaler_of(growth_interval=1)
    optimizer = fused(model, grad_scaler=scaler, **options)
    train(model, optimizer, x[:6], scaler)
    resumed, other_scaler = copy.deepcopy(model), scaler_of(growth_interval=1)
    other = fused(resumed, grad_scaler=other_scaler, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_scaler.load_state_dict(scaler.state_dict())
    train(model, optimizer, x[6:], scaler)
    train(resumed, other, x[6:], other_scaler)
    assert torch.equal(flat_parameters(model), flat_parameters(resumed))
    assert scaler.get_scale() == other_scaler.get_scale() == 4 * SCALE


def test_a_process_that_has_scaled_nothing_can_end_a_window(backend):
    model, x, scaler = model_of(), batches(1)[0], scaler_of(growth_interval=1)
    options = {"accumulation_steps": 2, "backend": backend}
    optimizer = fused(model, grad_scaler=scaler, **options)
    optimizer.backward(losses_of(model, x))
    other_scaler = scaler_of(growth_interval=1)
    other = fused(model, grad_scaler=other_scaler, **options)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    other_scaler.update()
    assert other_scaler.get_scale() == 2 * SCALE


def test_clipping_needs_no_unscaling(backend):
    model, x, scaler = model_of(), batches(1)[0], scaler_of()
    before = flat_parameters(model)
    optimizer = GCondFused(sgd(model, 1.0), TASKS, grad_scaler=scaler, backend=backend)
    optimizer.backward(losses_of(model, x))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(optimizer)
    scaler.update()
    assert (flat_parameters(model) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("by_scaler", [False, True])
@pytest.mark.parametrize("short", [False, True])
def test_unscale_changes_nothing(backend, by_scaler, short):
    """Loops that clip call it; in a short window it comes before there is a `.grad`."""
    model, twin, scaler = model_of(), model_of(), scaler_of(growth_interval=1)
    options = {"accumulation_steps": 1 + short, "backend": backend}
    optimizer = fused(model, grad_scaler=scaler, **options)
    plain = fused(twin, **options)
    for batch in batches(3):
        optimizer.backward(losses_of(model, batch))
        plain.backward(losses_of(twin, batch))
        scaler.unscale_(optimizer)
        for each in () if short else (model, twin):
            nn.utils.clip_grad_norm_(each.parameters(), 0.1)
        scaler.step(optimizer) if by_scaler else optimizer.step()
        scaler.update()
        plain.step()
    assert scaler.get_scale() == 8 * SCALE
    assert torch.equal(flat_parameters(model), flat_parameters(twin))


def test_a_base_step_that_fails_can_be_made_again(backend):
    model, scaler = model_of(), scaler_of(growth_interval=1)
    base = sgd(model)
    optimizer = GCondFused(base, TASKS, grad_scaler=scaler, backend=backend)
    failing = base.register_step_pre_hook(lambda *_: 1 / 0)
    optimizer.backward(losses_of(model, batches(1)[0]))
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    failing.remove()
    optimizer.step()
    scaler.update()
    assert scaler.get_scale() == 2 * SCALE
    assert not torch.equal(flat_parameters(model), flat_parameters(model_of()))


def test_misuse_is_an_error_that_changes_nothing(backend):
    model, x, scaler = model_of(), batches(3), scaler_of()
    optimizer = fused(model, grad_scaler=scaler, backend=backend)
    optimizer.backward(losses_of(model, x[0]))
    optimizer.step()
    optimizer.backward(losses_of(model, x[1]))
    before = flat_parameters(model)
    with pytest.raises(RuntimeError, match=r"call scaler\.update\(\) after each step"):
        optimizer.step()  # update() was forgotten
    assert torch.equal(before, flat_parameters(model))
    scaler.update()
    optimizer.step()
    scaler.update()
    assert not torch.equal(before, flat_parameters(model))

    other = fused(model, backend=backend)  # without the scaler
    model.zero_grad()
    losses = losses_of(model, x[2])
    other.backward({task: scaler.scale(loss) for task, loss in losses.items()})
    before = flat_parameters(model)
    with pytest.raises(RuntimeError, match=r"give GCondFused\(\.\.\., grad_scaler=scaler\)"):
        scaler.step(other)
    assert torch.equal(before, flat_parameters(model))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"grad_scaler": 65536.0}, TypeError, r"grad_scaler must be a torch\.amp\.GradScaler"),
        ({"grad_scaler": scaler_of(), "on_nonfinite": "raise"}, ValueError, "does not go with"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be 'skip' or 'drop_task' or"),
        ({"distributed": "shard"}, TypeError, r"distributed must be a Distributed\(\.\.\.\)"),
    ],
)
def test_options_out_of_range_are_named(options, error, words):
    with pytest.raises(error, match=words):
        fused(model_of(), **options)


def test_raise_cannot_be_set_with_a_scaler():
    optimizer = fused(model_of(), grad_scaler=scaler_of())
    with pytest.raises(ValueError, match="does not go with grad_scaler"):
        optimizer.on_nonfinite = "raise"
    assert optimizer.on_nonfinite == "skip"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.on_nonfinite = "drop_task"
