"""Collecting gradients during or after a backward pass: the same bits, no trace of failures."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from gcond_kernels import GCondFused
from gcond_kernels.storage import collect
from tests.helpers.models import (
    TASKS,
    batches,
    flat_gradients,
    flat_parameters,
    losses_of,
    model_of,
    same,
    sgd,
    train,
)

# Bytes of a bucket: gradients are added after the backward pass, or during it, one at a time.
BUCKETS = {"after": 32 << 20, "during": 8}


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    monkeypatch.setattr(collect, "BUCKET_BYTES", BUCKETS["during"])


def trained(model, loss_of, when, backend="python", steps=3, **options):
    """Parameters and the optimizer's state after some windows."""
    options = {"accumulation_steps": 2, "momentum": 0.5} | options
    optimizer = GCondFused(sgd(model), TASKS, backend=backend, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "BUCKET_BYTES", BUCKETS[when])
        train(model, optimizer, batches(2 * steps), losses_of=loss_of)
    return flat_parameters(model), optimizer.state_dict()


class Launches:
    """Counts how many tensors each launch of accumulate was of."""

    def __init__(self, monkeypatch):
        self.sizes = []
        original = collect.BackwardPass._launch

        def launch(backward_pass, places, overwrite):
            self.sizes.append(len(places))
            original(backward_pass, places, overwrite)

        monkeypatch.setattr(collect.BackwardPass, "_launch", launch)


@pytest.mark.parametrize("mode", ["exact", "stochastic"])
def test_during_and_after_the_pass_give_the_same_bits(backend, mode):
    results = [trained(model_of(), losses_of, when, backend, mode=mode) for when in BUCKETS]
    assert same(*results)


def test_buckets_are_added_during_the_pass(monkeypatch):
    launches = Launches(monkeypatch)
    trained(model_of(), losses_of, "during", steps=1)
    # Four parameters: three buckets of one during the pass, and the last after it.
    assert launches.sizes == [1, 1, 1, 1] * 4
    launches.sizes.clear()
    trained(model_of(), losses_of, "after", steps=1)
    assert launches.sizes == [4] * 4


def test_gradients_are_freed_during_the_pass():
    alive, most = set(), []
    first, second, third = (nn.Linear(4, 4, bias=False) for _ in range(3))
    model = nn.Sequential(first, second, third)
    optimizer = GCondFused(sgd(model), {"a": 1.0})
    optimizer.backward({"a": model(torch.ones(4)).sum()})
    optimizer.step()
    optimizer.zero_grad()

    def watch(p):
        alive.add(id(p))
        most.append(sum(q.grad is not None for q in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)
    optimizer.backward({"a": model(torch.ones(4)).sum()})
    assert most == [1, 1, 1]
    assert len(alive) == 3


def with_layers_through(call):
    """Losses with the same layer twice: of reentrant checkpoints a gradient of two parts."""

    def losses(model, x):
        hidden = call(model[0], x.clone().requires_grad_(True))
        y = call(model[2], call(model[0], hidden[:, :4]).tanh())
        return {"a": (y[:, 0] - 1).pow(2).mean(), "b": (y.sum(1) + 1).pow(2).mean()}

    return losses


def as_functions(losses_of):
    return lambda *given: {task: lambda task=task: losses_of(*given)[task] for task in TASKS}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["exact", "stochastic"])
def test_activation_checkpointing(backend, use_reentrant, mode):
    loss_of = with_layers_through(functools.partial(checkpoint, use_reentrant=use_reentrant))
    if use_reentrant and mode == "exact":
        loss_of = as_functions(loss_of)  # reentrant checkpoints go through one backward pass alone
    plain = with_layers_through(lambda layer, x: layer(x))
    expected = trained(model_of(), plain, "after", backend, mode=mode)
    for when in BUCKETS:
        result = trained(model_of(), loss_of, when, backend, mode=mode)
        # In parts the gradient is summed in another order.
        assert torch.allclose(result[0], expected[0], rtol=1e-5, atol=1e-6)


def test_parts_of_a_gradient_are_added_up(monkeypatch):
    launches = Launches(monkeypatch)
    x = batches(1)[0].requires_grad_(True)
    model = model_of()
    optimizer = GCondFused(sgd(model, 0.0), {"a": 1.0})

    def loss():
        parts = [checkpoint(model[k], y, use_reentrant=True) for k, y in ((0, x), (0, 2 * x))]
        between = checkpoint(model[2], parts[0] + parts[1], use_reentrant=True)
        return between.pow(2).mean()

    optimizer.backward({"a": loss})
    assert len(launches.sizes) > 4
    optimizer.step()
    written = flat_gradients(model)
    optimizer.zero_grad()
    loss().backward()
    assert torch.allclose(written, flat_gradients(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("when", BUCKETS)
def test_compiled_models(compiler, when):
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, backend=compiler)
    got = trained(model, lambda _, x: losses_of(compiled, x), when)
    expected = trained(model_of(), losses_of, when)
    # The compiler may fuse what eager rounds twice.
    assert torch.allclose(got[0], expected[0], rtol=1e-5, atol=1e-6)


@functorch_config.patch(enable_autograd_cache=False)  # what other tests compiled
def test_compiled_for_one_pass_and_passed_through_twice():
    """Losses that share a graph; without them the compiler may use a graph's memory again."""
    torch._dynamo.reset()
    model, x = model_of(), batches(2)
    compiled = torch.compile(model, backend="inductor")
    losses_of(compiled, x[0])["a"].backward()
    model.zero_grad()
    optimizer = GCondFused(sgd(model), TASKS)
    with (
        pytest.warns(UserWarning, match="its window is dropped"),
        pytest.raises(RuntimeError, match="give the losses as functions"),
    ):
        optimizer.backward(losses_of(compiled, x[0]))
    assert optimizer.backward(as_functions(losses_of)(compiled, x[1]))
    optimizer.step()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
@pytest.mark.parametrize("when", BUCKETS)
def test_a_model_whose_wrapper_replaces_gradients_after_the_pass(when, tmp_path):
    """DistributedDataParallel; of one process, which must train as without it."""
    expected = trained(model_of(), losses_of, when)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        model = model_of()
        wrapped = nn.parallel.DistributedDataParallel(model)
        got = trained(model, as_functions(lambda _, x: losses_of(wrapped, x)), when)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.allclose(got[0], expected[0], rtol=1e-5, atol=1e-6)


def test_other_backward_passes_keep_their_gradients():
    model = model_of()
    optimizer = GCondFused(sgd(model), TASKS)
    optimizer.backward(losses_of(model, batches(1)[0]))
    optimizer.step()
    optimizer.zero_grad()
    losses_of(model, batches(1)[0])["a"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_of_others_see_and_may_replace_the_gradient(backend):
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = GCondFused(
        torch.optim.SGD([p, q], lr=0.0), {"a": 1.0}, accumulation_steps=2, backend=backend
    )
    optimizer.backward({"a": p.sum() + q.sum()})

    def double(parameter):  # registered after this optimizer's own
        parameter.grad = 2 * parameter.grad

    p.register_post_accumulate_grad_hook(double)
    optimizer.backward({"a": p.sum() + q.sum()})
    optimizer.step()
    assert torch.equal(p.grad, torch.full((4,), 1.5))
    assert torch.equal(q.grad, torch.ones(4))


def test_a_hook_of_others_may_remove_the_gradient(backend):
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    for parameter in (p, q):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    q.register_post_accumulate_grad_hook(lambda q: setattr(q, "grad", torch.full((4,), 3.0)))
    optimizer = GCondFused(torch.optim.SGD([p, q], lr=0.0), {"a": 1.0}, backend=backend)
    optimizer.backward({"a": p.sum() + q.sum()})
    optimizer.step()
    assert p.grad is None
    assert torch.equal(q.grad, torch.full((4,), 3.0))


class Fails(torch.autograd.Function):
    """The identity, whose backward pass may fail."""

    broken = False

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient):
        if Fails.broken:
            raise ArithmeticError("in the middle")
        return gradient


def fragile(model, x):
    """Fails, if it does, after the gradients of the last layer are there."""
    y = model[2](Fails.apply(model[0](x)).tanh())
    return {"a": (y[:, 0] - 1).pow(2).mean(), "b": (y[:, 0] + y[:, 1] + 1).pow(2).mean()}


@pytest.fixture
def fail(monkeypatch):
    """Breaks the backward passes from now on."""
    return lambda broken=True: monkeypatch.setattr(Fails, "broken", broken)


functions = as_functions(fragile)


@pytest.mark.parametrize("when", BUCKETS)
@pytest.mark.parametrize("before", [0, 1])
def test_a_pass_that_fails_leaves_nothing_of_its_window(backend, fail, monkeypatch, when, before):
    """Though some buckets of it were added by then."""
    monkeypatch.setattr(collect, "BUCKET_BYTES", BUCKETS[when])
    launches = Launches(monkeypatch)
    x = batches(8)
    model, twin = model_of(), model_of()
    options = {"accumulation_steps": 2, "momentum": 0.5, "backend": backend}
    optimizer, calm = (GCondFused(sgd(m), TASKS, **options) for m in (model, twin))
    for m, o in ((model, optimizer), (twin, calm)):
        train(m, o, x[:2], losses_of=functions)
    for batch in x[2 : 2 + before]:
        optimizer.backward(functions(model, batch))
    launches.sizes.clear()
    fail()
    with (
        pytest.warns(UserWarning, match=r"failed \(ArithmeticError\): its window is dropped"),
        pytest.raises(ArithmeticError),
    ):
        optimizer.backward(functions(model, x[3]))
    fail(False)
    assert launches.sizes == ([1] if when == "during" else [])
    assert optimizer._storage.counts == [0, 0]
    assert all(p.grad is None for p in model.parameters())
    for m, o in ((model, optimizer), (twin, calm)):
        train(m, o, x[4:], losses_of=functions)
    assert torch.equal(flat_parameters(model), flat_parameters(twin))


def test_parameters_of_a_failed_window_alone_get_no_gradient(backend, fail):
    trunk, head, rest = (nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer = GCondFused(
        torch.optim.SGD([rest, head, trunk], lr=0.1), TASKS, accumulation_steps=2, backend=backend
    )
    optimizer.backward({"a": trunk.sum(), "b": (trunk * head).sum()})
    fail()
    with pytest.warns(UserWarning, match="1 micro-batches"), pytest.raises(ArithmeticError):
        # The gradients of two parameters are there, and one is launched, before the pass fails.
        optimizer.backward(
            {"a": lambda: trunk.sum(), "b": lambda: (trunk + Fails.apply(rest) * head).sum()}
        )
    fail(False)
    for _ in range(2):
        optimizer.backward({"a": trunk.sum()})
    assert optimizer.report().micro_batches == {"a": 2, "b": 0}
    assert head.grad is None
    assert rest.grad is None
    assert torch.equal(trunk.grad, torch.ones(4))


def test_optimizers_that_are_gone_leave_no_hooks():
    model = model_of()
    for _ in range(3):
        optimizer = GCondFused(sgd(model), TASKS)
        optimizer.backward(losses_of(model, batches(1)[0]))
        optimizer.step()
        gone = weakref.ref(optimizer._storage)
        del optimizer
        gc.collect()
        assert gone() is None
        model.zero_grad()
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_parameters_that_are_frozen_when_a_state_is_loaded(backend):
    model, x = model_of(), batches(3)
    optimizer = GCondFused(sgd(model), TASKS, accumulation_steps=3, backend=backend)
    optimizer.backward(losses_of(model, x[0]))
    model_2 = copy.deepcopy(model)
    model_2[0].weight.requires_grad_(False)
    other = GCondFused(sgd(model_2), TASKS, accumulation_steps=3, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    model[0].weight.requires_grad_(False)
    for number, batch in enumerate(x[1:]):
        for m, o in ((model, optimizer), (model_2, other)):
            m[0].weight.requires_grad_(number > 0)  # and thawed again
            o.backward(losses_of(m, batch))
    optimizer.step()
    other.step()
    assert torch.equal(flat_parameters(model), flat_parameters(model_2))
    assert not torch.equal(model[0].weight, model_of()[0].weight)


def test_copies_have_hooks_of_their_own(monkeypatch):
    model, x = model_of(), batches(2)
    optimizer = GCondFused(sgd(model), TASKS)
    optimizer.backward(losses_of(model, x[0]))
    optimizer.step()
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    launches = Launches(monkeypatch)
    optimizer_2.backward(losses_of(model_2, x[1]))
    assert launches.sizes == [1] * 8
    optimizer_2.step()
    optimizer.backward(losses_of(model, x[1]))
    optimizer.step()
    assert torch.equal(flat_parameters(model), flat_parameters(model_2))


def test_a_parameter_without_gradient_in_a_first_micro_batch_is_cleared(backend):
    p, q = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    sgd = torch.optim.SGD([p, q], lr=0.0)
    optimizer = GCondFused(sgd, {"a": 1.0}, accumulation_steps=2, backend=backend)
    for window in range(2):
        optimizer.backward({"a": p.sum() + (q.sum() if window == 0 else 0.0)})
        optimizer.backward({"a": p.sum() + q.sum()})
        optimizer.step()
        assert torch.equal(p.grad, torch.ones(8))
        assert torch.equal(q.grad, torch.full((8,), 1.0 if window == 0 else 0.5))
