"""Models in float64: everything is computed in float64, and never in less without being asked."""

import copy
import math

import pytest
import torch
from torch import nn

from gcond_kernels import (
    MGDA,
    CAGrad,
    GCond,
    GCondFused,
    GradDrop,
    LionLars,
    NashMTL,
    PCGrad,
    Sum,
    gramian,
    ops,
    resolve_gradients,
)
from gcond_kernels.methods.method import fresh_state
from tests.helpers.gramians import CPU, METHODS, name_of, resolve
from tests.helpers.models import through_a_file

TASKS = {"a": 1.0, "b": 0.3, "c": 2.0}
# Relative to the largest element of the gradient: a sum of a few products.
EXACT = 1e-13
DOUBLE = torch.float64

every_backend = pytest.mark.parametrize(
    "backend", [name for name in ops.BACKENDS if not ops.unavailable(name, CPU)]
)


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})

    def losses(self, x):
        y = self.trunk(x)
        goals = {"a": 3.0, "b": -4.0, "c": 1.0}
        return {k: (self.heads[k](y) - goals[k] + y.sum(1, True)).square().mean() for k in TASKS}


def inputs(steps, micro_batches=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, micro_batches, 5, 6, generator=generator, dtype=DOUBLE)


def optimizer_of(model, **options):
    options = {"accumulation_steps": 2} | options
    return GCondFused(torch.optim.SGD(model.named_parameters(), lr=0.01), TASKS, **options)


def by_autograd(model, window):
    """λ_k times the mean gradient of each task, [K] of T; zeros for none. And the mean losses."""
    means = {k: sum(model.losses(x)[k] for x in window) / len(window) for k in TASKS}
    parameters = list(model.parameters())
    gradients = [
        [
            torch.zeros_like(p) if g is None else TASKS[k] * g
            for p, g in zip(
                parameters,
                torch.autograd.grad(means[k], parameters, retain_graph=True, allow_unused=True),
                strict=True,
            )
        ]
        for k in TASKS
    ]
    return gradients, torch.stack([loss.detach() for loss in means.values()])


def shared(model):
    return [name.startswith("trunk") for name, _ in model.named_parameters()]


def gramian_of(gradients, chosen):
    each = [[g.flatten() for g, c in zip(one, chosen, strict=True) if c] for one in gradients]
    J = torch.stack([torch.cat(one) for one in each])
    return J @ J.T


def largest(gradients):
    return max(float(g.abs().max()) for g in gradients)


def assert_exact(found, expected, of=EXACT):
    size = largest(expected)
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == DOUBLE
        assert (gradient - wanted).abs().max() <= of * size


# ---- Which type is accumulated in.


@pytest.mark.parametrize(
    ("dtypes", "given", "expected"),
    [
        ((DOUBLE, DOUBLE), None, DOUBLE),
        ((DOUBLE, torch.float32), None, torch.float32),
        ((torch.float32, torch.float32), None, torch.float32),
        ((torch.bfloat16, torch.bfloat16), None, torch.float32),
        ((DOUBLE, DOUBLE), torch.float32, torch.float32),
        ((DOUBLE, DOUBLE), torch.bfloat16, torch.bfloat16),
        ((torch.float32, DOUBLE), DOUBLE, DOUBLE),
    ],
)
def test_the_parameters_decide_unless_it_is_given(dtypes, given, expected):
    parameters = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    base = torch.optim.SGD(parameters, lr=0.1)
    options = {} if given is None else {"accumulator_dtype": given}
    optimizer = GCondFused(base, {"a": 1.0, "b": 1.0}, momentum=0.5, **options)
    assert optimizer.accumulator_dtype == expected
    optimizer.backward({k: sum((p.double() ** 2).sum() for p in parameters) for k in "ab"})
    storage = optimizer._storage
    assert storage.accumulators.dtype == expected
    assert storage.momentum.dtype == (DOUBLE if expected == DOUBLE else torch.float32)
    assert [p.grad.dtype for p in parameters] == list(dtypes)


@every_backend
def test_the_reference_serves_float64_whatever_the_backend(backend):
    found = ops.backend_for(backend, CPU, DOUBLE)
    assert found.name == backend
    for operation in ("accumulate", "gramian", "combine", "graddrop", "multi_tensor_dot"):
        assert found.serves(operation) == "python"
    own = ops.backend_for(backend, CPU)
    assert found.serves("arbitrate") == own.serves("arbitrate")
    assert own.serves("accumulate") == backend
    # One that was found for another type is not used for this one.
    assert ops.backend_for(own, CPU, DOUBLE) is found
    assert ops.backend_for(found, CPU) is own


# ---- Against autograd.


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_the_gradient_is_that_of_autograd(method, granularity):
    model = Headed().double()
    optimizer = optimizer_of(model, method=method, granularity=granularity)
    names = [name for name, _ in model.named_parameters()]
    for step, window in enumerate(inputs(2)):
        gradients, losses = by_autograd(model, window)
        for x in window:
            optimizer.backward(model.losses(x))
        report = optimizer.report()
        of_model = list(report.weights.values())
        expected = []
        for t, name in enumerate(names):
            w = [1.0] * 3
            if shared(model)[t]:
                by_tensor = granularity == "tensor"
                w = list(report.tensor_weights[name].values()) if by_tensor else of_model
            expected.append(sum(w[k] * gradients[k][t] for k in range(3)))
        assert_exact([p.grad for p in model.parameters()], expected)
        if granularity == "model" and step == 0:
            # The weights are those of the Gramian by autograd.
            S, state = gramian_of(gradients, shared(model)), fresh_state(method, 3, (), CPU)
            wanted = resolve(method, S, state, losses).weights
            assert of_model == pytest.approx(wanted.tolist(), rel=1e-10, abs=1e-12)
        optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "python"])
def test_averages_bounds_and_masks(backend):
    """Momentum, a bound of the norm, and elements that are not trained; three steps."""
    model = Headed().double()
    weight = model.trunk[0].weight
    trained = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    optimizer = optimizer_of(
        model,
        method=PCGrad(),
        momentum=0.9,
        max_norm=0.5,
        mask={weight: trained},
        backend=backend,
    )
    average = [torch.zeros_like(p) for p in model.parameters()]
    for t, window in enumerate(inputs(3), start=1):
        gradients, _ = by_autograd(model, window)
        for one in gradients:
            one[0] *= trained
        for x in window:
            optimizer.backward(model.losses(x))
        w = list(optimizer.report().weights.values())
        hats = []
        for i, own in enumerate(shared(model)):
            g = sum((w[k] if own else 1.0) * gradients[k][i] for k in range(3))
            average[i] = 0.9 * average[i] + 0.1 * g
            hats.append(average[i] / (1.0 - 0.9**t))
        norm = math.sqrt(sum(float(h.square().sum()) for h in hats))
        assert norm > 0.5
        assert_exact([p.grad for p in model.parameters()], [0.5 / norm * h for h in hats])
        assert (weight.grad[~trained] == 0.0).all()
        optimizer.step()


def test_an_update_by_signs():
    model = Headed().double()
    optimizer = optimizer_of(model, method=Sum(), update=LionLars(1e-3, clip=3.0))
    (window,) = inputs(1)
    gradients, _ = by_autograd(model, window)
    for x in window:
        optimizer.backward(model.losses(x))
    expected = []
    for p, *each in zip(model.parameters(), *gradients, strict=True):
        g = sum(each)
        expected.append(g.sign() * 1e-3 * min(float(p.detach().norm() / g.norm()), 3.0))
    for p, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, wanted, rtol=EXACT, atol=0.0)


def test_sign_dropout_adds_up_in_float64():
    model = Headed().double()
    optimizer = optimizer_of(model, method=GradDrop(seed=1))
    (window,) = inputs(1)
    gradients, _ = by_autograd(model, window)
    for x in window:
        optimizer.backward(model.losses(x))
    size = largest([g for one in gradients for g in one])
    for p, *each in zip(model.parameters(), *gradients, strict=True):
        signs = [sum(g.clamp(min=0.0) for g in each), sum(g.clamp(max=0.0) for g in each)]
        off = torch.stack([(p.grad - one).abs() for one in (*signs, sum(each))]).amin(0)
        assert off.max() <= EXACT * size


def test_many_small_gradients_add_up():
    p = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
    base = torch.optim.SGD([p], lr=0.1)
    optimizer = GCondFused(base, {"a": 1.0, "b": 1.0}, accumulation_steps=1000, method=Sum())
    for step in range(1000):  # in float32 what is below 6e-8 of the first would be lost
        size = 1.0 if step == 0 else 1e-9
        optimizer.backward({k: size * p.sum() for k in "ab"})
    assert torch.allclose(p.grad, torch.full_like(p, 2.0 * (1.0 + 999e-9) / 1000.0), rtol=1e-13)


# ---- What float32 would not know.


def two_tasks(a, b, method, dtype=DOUBLE, **options):
    """The optimizer after a step in which two tasks have these gradients, and the parameter."""
    p = nn.Parameter(torch.zeros(len(a), dtype=dtype))
    base = torch.optim.SGD([p], lr=0.1)
    optimizer = GCondFused(base, {"a": 1.0, "b": 1.0}, method=method, **options)
    optimizer.backward({"a": (p * a).sum(), "b": (p * b).sum()})
    return optimizer, p


@pytest.mark.parametrize("method", [MGDA(), CAGrad(c=0.4), NashMTL()], ids=name_of)
def test_gradients_that_nearly_cancel_out(method):
    """Opposite to 1e-5: their cosine is −1 + 5e-11, which a sum of float32 products cannot tell."""
    a = torch.tensor([1.0, 2.0, -0.7], dtype=DOUBLE)
    b = -a + 1e-5 * torch.tensor([0.3, 0.1, 0.8], dtype=DOUBLE)
    optimizer, p = two_tasks(a, b, method)
    J = torch.stack([a, b])
    w = method(J @ J.T)
    assert list(optimizer.report().weights.values()) == pytest.approx(w.tolist(), rel=1e-4)
    assert (p.grad - w @ J).norm() <= 1e-4 * (w @ J).norm() + 1e-10
    q = nn.Parameter(torch.zeros_like(a))
    without = resolve_gradients([q], [[a], [b]], method)
    assert without.tolist() == pytest.approx(w.tolist(), rel=1e-4)
    _, other = two_tasks(a, b, method, accumulator_dtype=torch.float32)
    assert (other.grad - w @ J).norm() > 1e-2 * (w @ J).norm()


@pytest.mark.parametrize("size", [1e25, 1e-40, 1e120])
def test_gradients_whose_squares_float32_does_not_hold(size):
    a, b = (size * torch.tensor(v, dtype=DOUBLE) for v in ([1.0, 2.0], [-3.0, 1.0]))
    optimizer, p = two_tasks(a, b, PCGrad())
    assert not optimizer.report().skipped
    one_a = a + size * torch.tensor([-3.0, 1.0], dtype=DOUBLE) * 0.1
    one_b = b + size * torch.tensor([1.0, 2.0], dtype=DOUBLE) * 0.2
    assert torch.allclose(p.grad, one_a + one_b, rtol=1e-13)
    optimizer, _ = two_tasks(a, b, PCGrad(), accumulator_dtype=torch.float32)
    report = optimizer.report()  # skipped, or without a gradient
    assert report.skipped or report.weights == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("size", [1e30, 1e120, 1e-60])
def test_a_history_that_its_type_does_not_hold(size):
    """Of values beyond its range it keeps the largest, and none that is not finite."""
    p = nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    q, state = nn.Parameter(torch.zeros(2, dtype=DOUBLE)), {}
    base = torch.optim.SGD([p], lr=0.1)
    optimizer = GCondFused(base, {"a": 1.0, "b": 1.0}, method=GCond(max_iterations=0))
    a, b = size * torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=DOUBLE)
    for _ in range(3):
        optimizer.backward({"a": (p * a).sum(), "b": (p * b).sum()})
        assert torch.allclose(p.grad, a + b, rtol=EXACT)
        optimizer.step()
        assert not optimizer.report().skipped
        assert resolve_gradients([q], [[a], [b]], GCond(max_iterations=0), state).isfinite().all()
    assert optimizer._storage.history.isfinite().all()


@pytest.mark.parametrize("method", [Sum(), GCond(), GradDrop()], ids=name_of)
def test_what_leaves_the_range_of_a_float32_gradient_skips_the_step(method):
    a = torch.full((2,), 3e38)
    optimizer, p = two_tasks(a, a, method, torch.float32, accumulator_dtype=DOUBLE)
    assert optimizer.report().skipped
    assert p.grad.tolist() == [0.0, 0.0]
    optimizer, p = two_tasks(a / 4.0, a / 4.0, method, torch.float32, accumulator_dtype=DOUBLE)
    assert not optimizer.report().skipped
    assert torch.allclose(p.grad, a / 2.0)


def test_a_task_that_is_not_finite_is_dropped():
    a, b = torch.tensor([[1.0, math.inf], [1e30, 2.0]], dtype=DOUBLE)
    optimizer, p = two_tasks(a, b, Sum(), on_nonfinite="drop_task")
    assert p.grad.tolist() == [1e30, 2.0]
    assert not optimizer.report().skipped


# ---- Without the optimizer.


def test_resolving_and_products_without_the_optimizer():
    model = Headed().double()
    (window,) = inputs(1)
    gradients, _ = by_autograd(model, window)
    S = gramian_of(gradients, [True] * len(gradients[0]))
    found = gramian(gradients)
    assert ((found - S).abs() <= 1e-14 * float(S.abs().max())).all()
    mixed = [[g.float() if t else g for t, g in enumerate(one)] for one in gradients]
    assert ((gramian(mixed) - S).abs() <= 1e-6 * float(S.abs().max())).all()

    w = resolve_gradients(model.parameters(), gradients, MGDA())
    wanted = MGDA()(gramian_of(gradients, shared(model)))
    assert w.tolist() == pytest.approx(wanted.tolist(), rel=1e-10)
    expected = [
        sum((w[k] if own else 1.0) * gradients[k][t] for k in range(3))
        for t, own in enumerate(shared(model))
    ]
    assert_exact([p.grad for p in model.parameters()], expected)


@every_backend
@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_norms_and_cosines_of_float64_tensors(backend, size):
    a = size * torch.linspace(1.0, 2.0, 7, dtype=DOUBLE) / 3.0
    b = size * torch.linspace(-1.0, 1.0, 7, dtype=DOUBLE)
    norm = float(ops.multi_tensor_norm([a, b], backend=backend))
    assert norm == pytest.approx(float(torch.cat([a, b]).norm()), rel=1e-14)
    cosine = float(a @ b / (a.norm() * b.norm()))
    found = ops.multi_tensor_cosine_similarity([a], [b], backend=backend)
    assert float(found) == pytest.approx(cosine, rel=1e-13)


# ---- Saved and copied.


def test_training_goes_on_from_the_middle_of_a_window():
    def train(optimizer, model, x):
        for one in x:
            if optimizer.backward(model.losses(one)):
                optimizer.step()

    x = inputs(4).flatten(0, 1)
    model = Headed().double()
    optimizer = optimizer_of(model, momentum=0.9)
    train(optimizer, model, x[:3])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    kept = saved["optimizer"]["state"][0]["gcond"]
    assert kept["momentum"].dtype == kept["accumulators"]["0"].dtype == DOUBLE
    twin = Headed().double()
    other = optimizer_of(twin, momentum=0.9)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    copied = copy.deepcopy((model, optimizer))
    for one, its_model in ((optimizer, model), (other, twin), copied[::-1]):
        assert one.accumulator_dtype == DOUBLE
        train(one, its_model, x[3:])
    for ours, loaded, theirs in zip(
        *(m.parameters() for m in (model, twin, copied[0])), strict=True
    ):
        assert torch.equal(ours, loaded)
        assert torch.equal(ours, theirs)


def test_a_state_in_float32_is_taken_over():
    saved = optimizer_of(Headed(), momentum=0.9)
    model = saved.base.param_groups[0]["params"]
    saved.backward({k: sum(p.square().sum() for p in model) for k in TASKS})
    saved.resolve()
    saved.step()
    twin = Headed().double()
    optimizer = optimizer_of(twin, momentum=0.9)
    optimizer.load_state_dict(saved.state_dict())
    storage, before = optimizer._storage, saved._storage
    assert storage.momentum.dtype == DOUBLE
    assert torch.equal(storage.momentum, before.momentum.double())
