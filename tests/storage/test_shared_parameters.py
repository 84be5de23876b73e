"""What is compared and what is not: heads, granularity, masks, methods in training."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from gcond_kernels import (
    FAMO,
    IMTLG,
    MGDA,
    RLW,
    AlignedMTL,
    CAGrad,
    ConFIG,
    FairGrad,
    GCond,
    GCondFused,
    GradDrop,
    GradNorm,
    GradVac,
    LionLars,
    NashMTL,
    NonConflicting,
    NormBalancing,
    PCGrad,
    Sum,
    UPGrad,
    ops,
)
from gcond_kernels.methods.method import Known, Method, fresh_state
from gcond_kernels.storage.shared_parameters import SharedParameters, shared_tensors
from tests import conftest
from tests.helpers import models
from tests.helpers.models import flat_gradients, flat_parameters, through_a_file

TASKS = {"a": 1.0, "b": 0.5, "c": 2.0}
WITH_WEIGHTS = [
    Sum(),
    PCGrad(seed=3),
    CAGrad(c=0.4),
    MGDA(),
    GradNorm(lr=0.1),
    UPGrad(),
    GradVac(),
    AlignedMTL(),
    IMTLG(),
    NashMTL(),
    NonConflicting(PCGrad(seed=3)),
    FAMO(),  # of the weightings by losses, which differ in the weights alone
    RLW(),
    NormBalancing(),  # ConFIG and FairGrad are as IMTLG and NashMTL, ExcessMTL as this
    GCond(),
]
ALL = [*WITH_WEIGHTS, GradDrop(seed=5)]
EVERY = [(m, g) for m in WITH_WEIGHTS for g in ("model", "tensor")] + [(GradDrop(seed=5), "model")]
# What the kernels see of methods are the shapes of weights and masks: of those one of each sort.
FEW = [(CAGrad(c=0.4), "model"), (GCond(), "model"), (GCond(), "tensor")]
FEW_AND_DROP = [*FEW, (GradDrop(seed=5), "model")]
AB = {"a": 1.0, "b": 1.0}
# Of a float32 sum of a few products, relative to the largest of them.
ROUNDING = 2e-5


def half_of_both(gramian):
    return gramian.new_full((len(gramian),), 0.5)


def on_backends(every, few):
    """Methods and granularities of a test: every one with the reference, few with others."""
    cases = [
        pytest.param(*on.values, *case, marks=on.marks)
        for on in conftest.PRESENT
        for case in (every if on.values == ("python",) else few)
    ]
    names = ("backend", "method", "granularity")
    return pytest.mark.parametrize(names, cases, indirect=["backend"])


class Net(nn.Module):
    """Two layers that all tasks share, and a head of each task's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in TASKS})

    def forward(self, x):
        shared = self.body(x)
        return {task: head(shared) for task, head in self.heads.items()}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def inputs(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(seed))


def losses_of(model: Net, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses that pull the shared layers apart."""
    y = model(x)
    return {
        "a": (y["a"] - 1).square().mean(),
        "b": (y["b"] + y["a"].detach() + 2).square().mean(),
        "c": (y["c"] + x[:, :2]).abs().mean(),
    }


def optimizer_of(model: nn.Module, **options) -> GCondFused:
    base = torch.optim.SGD(model.named_parameters(), lr=0.05)
    return GCondFused(base, TASKS, **({"accumulation_steps": 2} | options))


def optimizer_over(*parameters, lr=0.0, tasks=AB, **options) -> GCondFused:
    return GCondFused(torch.optim.SGD(parameters, lr=lr), tasks, **options)


train = functools.partial(models.train, losses_of=losses_of)


def task_gradients(model: Net, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """λ_k times the mean gradient of each task, in float64 by autograd alone."""
    twin = copy.deepcopy(model).double()
    gradients = []
    for task, weight in TASKS.items():
        twin.zero_grad()
        for batch in x.double():
            (weight / len(x) * losses_of(twin, batch)[task]).backward()
        named = twin.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    return gradients


def mean_losses(model: Net, x: torch.Tensor) -> torch.Tensor:
    losses = [losses_of(model, batch) for batch in x]
    return torch.stack([torch.stack([one[t] for one in losses]).mean() for t in TASKS]).double()


def product(one: dict, other: dict, names) -> float:
    return sum(float((one[n] * other[n]).sum()) for n in names if n in one and n in other)


def gramian_of(gradients, names) -> torch.Tensor:
    products = [[product(one, other, names) for other in gradients] for one in gradients]
    return torch.tensor(products, dtype=torch.float64)


def assert_close(found: torch.Tensor, expected: torch.Tensor, size: float) -> None:
    assert (found.double() - expected).abs().max() <= ROUNDING * size


SHARED = [name for name, _ in Net().named_parameters() if name.startswith("body")]


# Heads.


@on_backends([*EVERY[:-1], (half_of_both, "model"), (half_of_both, "tensor")], FEW)
def test_heads_keep_their_gradient_and_take_no_part(backend, method, granularity):
    """Against autograd in float64 and the method on Gramians of the shared parameters alone."""
    model, x = net(), inputs(2)
    optimizer = optimizer_of(model, method=method, granularity=granularity, backend=backend)
    gradients, losses = task_gradients(model, x), mean_losses(model, x)
    for batch in x:
        optimizer.backward(losses_of(model, batch))

    together = [SHARED] if granularity == "model" else [[name] for name in SHARED]
    # The random orders of a batch are drawn for the whole of it: the heads are in it too.
    names = [name for name, _ in model.named_parameters()]
    by_tensor = torch.stack([gramian_of(gradients, [name]) for name in names])
    if method is half_of_both:
        weights = torch.full((len(names), 3), 0.5, dtype=torch.float64)
    elif granularity == "tensor":
        weights = method(by_tensor, losses)
    else:
        weights = method(gramian_of(gradients, SHARED), losses).expand(len(names), 3)
    size = max(float(g.abs().max()) for one in gradients for g in one.values())
    size *= float(weights[: len(SHARED)].abs().max().clamp(min=1.0))
    for t, (name, parameter) in enumerate(model.named_parameters()):
        if name in SHARED:
            expected = sum(w * g[name] for w, g in zip(weights[t], gradients, strict=True))
        else:
            (expected,) = [g[name] for g in gradients if name in g]
        assert_close(parameter.grad, expected, size)

    report = optimizer.report()
    assert len(together) == len(report.tensor_weights) or granularity == "model"
    total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert report.gradient_norm == pytest.approx(total, rel=1e-5)
    norms = gramian_of(gradients, names).diagonal().sqrt().tolist()
    assert list(report.norms.values()) == pytest.approx(norms, rel=1e-5)
    S = gramian_of(gradients, SHARED)
    cosine = float(S[0, 1] / (S[0, 0] * S[1, 1]).sqrt())
    assert report.cosines["a", "b"] == pytest.approx(cosine, abs=1e-5)
    assert set(report.tensor_cosines) == set(SHARED)


def test_sign_dropout_leaves_heads_alone(backend):
    model, x = net(), inputs(2)
    optimizer = optimizer_of(model, method=GradDrop(), backend=backend)
    gradients = task_gradients(model, x)
    for batch in x:
        optimizer.backward(losses_of(model, batch))
    size = max(float(g.abs().max()) for one in gradients for g in one.values())
    for name, parameter in model.named_parameters():
        if name not in SHARED:
            (expected,) = [g[name] for g in gradients if name in g]
            assert_close(parameter.grad, expected, size)
            continue
        # Every element is the sum of what is positive, or of what is negative.
        each = torch.stack([g[name] for g in gradients])
        positive, negative = each.clamp(min=0.0).sum(0), each.clamp(max=0.0).sum(0)
        found = parameter.grad.double()
        off = torch.minimum((found - positive).abs(), (found - negative).abs())
        assert off.max() <= ROUNDING * size
    report = optimizer.report()
    assert all(math.isnan(weight) for weight in report.weights.values())
    assert math.isnan(report.gradient_norm)
    assert optimizer.recorder.rows()[0]["weight/a"] is None


def test_what_a_task_once_had_a_gradient_for_stays_shared():
    """A parameter is a task's own until another has a gradient for it, and never again after."""
    p = nn.Parameter(torch.ones(2))
    optimizer = optimizer_over(p, method=MGDA())
    none = p.new_zeros(()).requires_grad_()
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    for first, second, expected in (
        (a, None, a),  # b has no gradient: a's own
        (a, b, 0.9 * a + 0.1 * b),
        (a, None, a),  # MGDA of one
        (None, b, b),
    ):
        losses = {
            "a": none * 1 if first is None else (p * first).sum(),
            "b": none * 1 if second is None else (p * second).sum(),
        }
        optimizer.backward(losses)
        torch.testing.assert_close(p.grad, expected)
        optimizer.step()
    assert optimizer._storage.parameter_tasks.tolist() == [[True, True]]


def test_a_step_that_overflows_does_not_make_a_task_use_a_parameter():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    weight = 1.0
    optimizer = optimizer_over(p, q, lr=0.1, method=lambda S: torch.full_like(S[0], weight))
    optimizer.backward({"a": p.sum(), "b": p.sum()})
    optimizer.step()
    weight = math.inf
    optimizer.backward({"a": (p + q).sum()})
    optimizer.step()
    assert optimizer.report().skipped
    assert p.tolist() == pytest.approx([0.8, 0.8])
    assert q.tolist() == [1.0, 1.0]
    weight = 1.0
    optimizer.backward({"a": p.sum() + (0.0 * q).sum()})
    assert q.grad is None


def test_history_starts_anew_where_tasks_come_to_share_more():
    """Else its norms would be of other parameters than its products."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = optimizer_over(p, q)
    d = torch.tensor([1.0, 0.0])
    seen = []
    for b_uses_q in (False, False, True, True):
        loss_b = -(p * d).sum() + (q.sum() if b_uses_q else 0.0)
        optimizer.backward({"a": (p * d).sum() + 5 * q.sum(), "b": loss_b})
        seen.append(optimizer._resolver.method_state["history_gramian"].clone())
        optimizer.step()
    assert [float(S[0, 0]) for S in seen] == [1.0, 1.0, 51.0, 51.0]
    assert optimizer._storage.was_shared.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("tasks", "active", "shared"),
    [
        (["ab", "a", "b"], 2, [True, False, False]),
        (["ab", "a", ""], 1, [True, False, False]),
        (["a", "a", ""], 1, [True, True, True]),  # one task alone so far, of GCond
        (["a", "b", ""], 2, [False, False, False]),  # they share nothing
        (["ac", "abc", "c"], 3, [True, True, False]),
    ],
)
def test_which_tensors_are_shared(tasks, active, shared):
    tasks = torch.tensor([[task in of_tensor for task in "abc"] for of_tensor in tasks])
    assert shared_tensors(tasks, active <= 1).tolist() == shared
    if active == 1 and all(shared):
        shared = [False] * 3
    assert shared_tensors(tasks, False).tolist() == shared


def test_a_gradient_of_zeros_does_not_make_a_parameter_shared():
    """Autograd gives zeros instead of None, where losses are indexed from one tensor, say."""
    model, twin, x = net(), net(), inputs(4)
    optimizer, plain = optimizer_of(model, method=MGDA()), optimizer_of(twin, method=MGDA())
    for batch in x:
        losses = losses_of(model, batch)
        zero = 0.0 * sum(p.sum() for p in model.parameters())
        if optimizer.backward({task: loss + zero for task, loss in losses.items()}):
            optimizer.step()
    train(twin, plain, x)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    names = [segment.name for segment in optimizer._storage.segments]
    tasks = dict(zip(names, optimizer._storage.parameter_tasks.tolist(), strict=True))
    assert tasks["body.0.weight"] == [True] * 3
    assert tasks["heads.b.weight"] == [False, True, False]
    assert torch.equal(optimizer._storage.parameter_tasks, plain._storage.parameter_tasks)
    assert optimizer.report().tensor_cosines.keys() == set(SHARED)


@pytest.mark.parametrize("by_tensor", [False, True])
def test_resolution_does_not_depend_on_what_the_host_knows(by_tensor):
    """`all_shared` saves work where all is shared; the numbers are those of the device."""
    G = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    per_tensor = G @ G.mT
    total = per_tensor.sum(0)
    products = ops.Gramians(total, total, per_tensor, per_tensor)
    known = SharedParameters(by_tensor, torch.ones(4, dtype=torch.bool), True)
    unknown = known._replace(all_shared=False)
    for one, other in zip(known.gramians(products, 3), unknown.gramians(products, 3), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(known.shared_gramian(products, 3), unknown.shared_gramian(products, 3))
    weights = torch.rand((4, 3) if by_tensor else (3,), dtype=torch.float64)
    assert torch.equal(known.weights(weights).expand(4, 3), unknown.weights(weights))
    some = unknown._replace(flags=torch.tensor([True, False, True, False]))
    assert torch.equal(some.weights(weights)[[1, 3]], torch.ones(2, 3, dtype=torch.float64))
    assert torch.allclose(some.shared_gramian(products, 3), per_tensor[[0, 2]].sum(0))


# Granularity.


@pytest.mark.slow_interpreted
def test_each_tensor_is_resolved_as_if_it_were_the_only_one(backend):
    """GCond by tensor, with its own state, to the bit; `winners` and averages included."""
    torch.manual_seed(0)
    shapes, steps = [(40,), (3, 5), (7,)], 7
    directions = [[torch.randn(steps, *shape) - 0.4 for shape in shapes] for _ in range(3)]
    for k, of_task in enumerate(directions):
        for d in of_task:
            d *= (-1.0) ** k

    def run(which, granularity):
        parameters = [nn.Parameter(torch.zeros(shapes[t])) for t in which]
        options = {"momentum": 0.5, "backend": backend, "method": GCond(dominance_window=2)}
        optimizer = optimizer_over(
            *parameters, lr=0.1, tasks=TASKS, granularity=granularity, **options
        )
        written = []
        for step in range(steps):
            losses = {}
            for task, of_task in zip(TASKS, directions, strict=True):
                products = [p * of_task[t][step] for p, t in zip(parameters, which, strict=True)]
                losses[task] = sum(product.sum() for product in products)
            optimizer.backward(losses)
            written.append([p.grad.clone() for p in parameters])
            optimizer.step()
        return written, optimizer

    together, optimizer = run([0, 1, 2], "tensor")
    state = optimizer._resolver.method_state
    assert optimizer.report().conflicts
    assert {c.parameter for c in optimizer.report().conflicts} <= {
        f"parameter {t}" for t in range(3)
    }
    for t in range(3):
        alone, other = run([t], "model")
        for step in range(steps):
            assert torch.equal(together[step][t], alone[step][0])
        own = other._resolver.method_state
        for key in ("norm_ema", "winners", "history_gramian"):
            assert torch.equal(state[key][t], own[key]), key
    row = optimizer.recorder.rows()[-1]
    assert row["winner"] is None
    assert row["conflicts"] == len(optimizer.report().conflicts)


def test_max_norm_and_signs_use_the_weights_of_each_tensor(backend):
    x = inputs(2)
    for options in ({"max_norm": 0.1}, {"update": LionLars(), "momentum": 0.9}):
        written = []
        for backend_ in {backend, "python"}:
            model = net()
            optimizer = optimizer_of(
                model, method=CAGrad(), granularity="tensor", backend=backend_, **options
            )
            for batch in x:
                optimizer.backward(losses_of(model, batch))
            written.append(flat_gradients(model))
        torch.testing.assert_close(written[0], written[-1], rtol=1e-4, atol=1e-7)
        if "max_norm" in options:
            assert float(written[0].norm()) == pytest.approx(0.1, rel=1e-5)


# Steps that are not finite.


@pytest.mark.parametrize(("method", "granularity"), EVERY)
@pytest.mark.parametrize("where", ["body.2.bias", "heads.b.weight"])
def test_a_gradient_that_is_not_finite_leaves_all_as_it_was(method, granularity, where):
    """Also where it is in a head, which the method never sees."""
    model = net()
    optimizer = optimizer_of(model, method=method, granularity=granularity, momentum=0.9)
    train(model, optimizer, inputs(4))
    before = through_a_file([model.state_dict(), optimizer._resolver.method_state])
    momentum = optimizer._storage.momentum.clone()
    for batch in inputs(2, seed=9):
        losses = losses_of(model, batch)
        parameter = dict(model.named_parameters())[where]
        losses["b"] = losses["b"] + (parameter * math.nan).sum()
        optimizer.backward(losses)
    optimizer.step()
    assert optimizer.report().skipped
    assert optimizer.report().nonfinite_tasks == ["b"]
    after = [model.state_dict(), optimizer._resolver.method_state]
    assert models.same(before, after)
    assert torch.equal(momentum, optimizer._storage.momentum)


@on_backends(EVERY, FEW_AND_DROP)
def test_a_task_that_is_dropped_is_as_if_it_were_not_there(backend, method, granularity):
    found = {}
    for bad in (True, False):
        model, x = net(), inputs(2)
        optimizer = optimizer_of(
            model,
            method=method,
            granularity=granularity,
            on_nonfinite="drop_task",
            backend=backend,
        )
        for batch in x:
            losses = losses_of(model, batch)
            # A gradient of zeros for the same parameters, or one that is not finite.
            losses["b"] = losses["b"] * (math.nan if bad else 0.0)
            optimizer.backward(losses)
        found[bad] = [p.grad for p in model.parameters()]
        assert optimizer.report().nonfinite_tasks == (["b"] if bad else [])
        assert not optimizer.report().skipped
    for dropped, absent in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(dropped, absent, rtol=1e-5, atol=1e-7)


# Masks.


def masks_of(model: nn.Module, seed: int = 3) -> dict[nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        p: torch.rand(p.shape, generator=generator) < 0.4
        for name, p in model.named_parameters()
        if name in ("body.0.weight", "body.2.weight", "heads.a.weight")
    }


@on_backends(EVERY, FEW_AND_DROP)
def test_a_mask_is_as_if_the_gradients_were_masked(backend, method, granularity):
    """Before the inner products, and exactly zero in the write."""
    x, found = inputs(4), []
    for by_hook in (False, True):
        model = net()
        masks = masks_of(model)
        options = {"method": method, "granularity": granularity, "backend": backend}
        if by_hook:
            for p, mask in masks.items():
                p.register_hook(lambda g, mask=mask: g * mask)
        else:
            options["mask"] = masks
        optimizer = optimizer_of(model, momentum=0.9, **options)
        train(model, optimizer, x)
        for p, mask in masks.items():
            assert (p.grad[~mask] == 0.0).all()
            assert (p.grad[mask] != 0.0).any()
        found.append(([p.grad for p in model.parameters()], optimizer.report()))
    for masked, by_hand in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(masked, by_hand)
    assert found[0][1].cosines == found[1][1].cosines
    assert found[0][1].norms == found[1][1].norms


def test_a_mask_hides_what_is_not_finite(backend):
    p = nn.Parameter(torch.ones(3))
    mask = {p: torch.tensor([True, False, True])}
    optimizer = optimizer_over(p, lr=1.0, mask=mask, backend=backend)
    d = torch.tensor([1.0, math.nan, 2.0])
    optimizer.backward({"a": (p * d).sum(), "b": (p * d).sum()})
    optimizer.step()
    assert not optimizer.report().skipped
    assert p.tolist() == [-1.0, 1.0, -3.0]


def test_a_mask_follows_the_memory_of_its_parameter(backend):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    mask = {conv.weight: torch.rand(5, 3, 3, 3) < 0.5}
    optimizer = optimizer_over(*conv.parameters(), lr=1.0, mask=mask, backend=backend)
    y = conv(torch.randn(2, 3, 6, 6))
    optimizer.backward({"a": y.square().sum(), "b": y.sum()})
    optimizer.step()
    assert torch.equal(conv.weight.grad != 0.0, mask[conv.weight])
    storage = optimizer._storage
    assert torch.equal(storage.mask_of(storage.segments[0]), mask[conv.weight])


def test_parameters_that_come_later_have_their_mask_or_none():
    model = net()
    masks = masks_of(model)
    for p in model.body[2].parameters():
        p.requires_grad_(False)
    optimizer = optimizer_of(model, mask=masks)
    train(model, optimizer, inputs(2))
    for p in model.body[2].parameters():
        p.requires_grad_(True)
    extra = nn.Parameter(torch.ones(40))
    optimizer.add_param_group({"params": [("extra", extra)]})
    for batch in inputs(2):
        losses = losses_of(model, batch)
        losses["a"] = losses["a"] + extra.sum()
        optimizer.backward(losses)
    optimizer.step()
    weight = model.body[2].weight
    assert (weight.grad[~masks[weight]] == 0.0).all()
    assert (weight.grad[masks[weight]] != 0.0).any()
    assert (extra.grad == 1.0).all()


def test_masks_that_do_not_fit_are_refused_by_name():
    model = net()
    weight = model.body[0].weight
    for mask, error, match in (
        ([weight], TypeError, "neuron_mask"),
        ({"body.0.weight": torch.ones(40, 4) > 0}, TypeError, "must be a parameter"),
        ({nn.Parameter(torch.ones(2)): torch.ones(2) > 0}, ValueError, r"\[2\] that base does not"),
        ({weight: torch.ones(40, 4)}, TypeError, r"mask of body.0.weight must be a bool"),
        ({weight: torch.ones(4, 40) > 0}, ValueError, r"body.0.weight has shape \[4, 40\]"),
    ):
        with pytest.raises(error, match=match):
            optimizer_of(model, mask=mask)


# Methods as an option.


def test_what_is_no_method_is_refused():
    model = net()
    with pytest.raises(TypeError, match=r"PCGrad\(...\), not the class"):
        optimizer_of(model, method=PCGrad)
    for wrong in ("pcgrad", 3, int):
        with pytest.raises(TypeError, match="method must be one of"):
            optimizer_of(model, method=wrong)
    with pytest.raises(ValueError, match="granularity must be 'model' or 'tensor'"):
        optimizer_of(model, granularity="layer")
    with pytest.raises(ValueError, match="granularity='tensor' does not go with GradDrop"):
        optimizer_of(model, method=GradDrop(), granularity="tensor")
    for options in ({"max_norm": 1.0}, {"update": LionLars()}):
        with pytest.raises(ValueError, match="before it is written"):
            optimizer_of(model, method=GradDrop(), **options)
    with pytest.raises(ValueError, match=r"parameters=\('body',\) of GradNorm"):
        optimizer_of(model, method=GradNorm(parameters=("body",)), granularity="tensor")
    with pytest.raises(ValueError, match=r"'spine'.*'body.0.weight'"):
        optimizer_of(model, method=GradNorm(parameters=("spine",)))


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda S: S, r"one weight for each of the 3 tasks, a tensor \[3\], not \[3, 3\]"),
        (lambda _: [1.0, 1.0, 1.0], r"not \[1.0, 1.0, 1.0\]"),
        (lambda _: torch.ones(2), r"not \[2\]"),
    ],
)
def test_a_function_that_returns_no_weights_changes_nothing(function, error):
    model = net()
    optimizer = optimizer_of(model, method=function, accumulation_steps=1)
    before = flat_parameters(model)
    with pytest.raises(ValueError, match=error), pytest.warns(match="its window is dropped"):
        optimizer.backward(losses_of(model, inputs(1)[0]))
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(flat_parameters(model), before)
    optimizer.method = torch.diag
    optimizer.backward(losses_of(model, inputs(1)[0]))
    optimizer.step()


def test_gradnorm_may_compare_one_layer():
    model, x = net(), inputs(2)
    method = GradNorm(lr=0.5, parameters=("body.2",))
    optimizer = optimizer_of(model, method=method)
    gradients, losses = task_gradients(model, x), mean_losses(model, x)
    train(model, optimizer, x)
    names = [name for name in SHARED if name.startswith("body.2")]
    state = fresh_state(method, 3, (), torch.device("cpu"))
    method.weights(gramian_of(gradients, names), state, Known(losses=losses))
    found = optimizer._resolver.method_state["task_weights"]
    torch.testing.assert_close(found, state["task_weights"], rtol=1e-4, atol=1e-6)
    assert (found - 1.0).abs().max() > 0.1


def test_losses_are_means_over_the_micro_batches_that_count():
    """In stochastic mode, in short windows, after one that failed, with a scale, and resumed."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, x = net(), inputs(12)
    optimizer = optimizer_of(
        model, method=GradNorm(), mode="stochastic", accumulation_steps=6, grad_scaler=scaler
    )
    expected: dict[str, list[float]] = {task: [] for task in TASKS}

    def micro_batch(batch):
        (task,) = optimizer.active_tasks
        loss = losses_of(model, batch)[task]
        expected[task].append(loss.item())
        optimizer.backward({task: loss})

    for batch in x[5:8]:
        micro_batch(batch)
    with pytest.warns(UserWarning, match="dropped"), pytest.raises(ZeroDivisionError):
        optimizer.backward({"b": lambda: 1 / 0})
    expected = {task: [] for task in TASKS}
    for batch in x[:5]:
        micro_batch(batch)
    means = [sum(values) / len(values) for values in expected.values()]
    twin = copy.deepcopy(model)
    other = optimizer_of(
        twin,
        method=GradNorm(),
        mode="stochastic",
        accumulation_steps=6,
        grad_scaler=copy.deepcopy(scaler),
    )
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for one in (optimizer, other):
        one.step()  # the last task has one micro-batch of its two
        first = one._resolver.method_state["initial_losses"].tolist()
        assert first == pytest.approx(means, rel=1e-6)
        assert one._resolver.losses.tolist() == [0.0] * 3


def test_a_loss_that_gradnorm_cannot_use_is_refused_before_a_state_changes():
    model, (x,) = net(), inputs(1)
    optimizer = optimizer_of(model, method=GradNorm(lr=0.1), accumulation_steps=1)
    train(model, optimizer, [x])
    before = copy.deepcopy(optimizer._resolver.method_state)
    parameters = flat_parameters(model)
    losses = losses_of(model, x)
    with pytest.raises(ValueError, match=r"GradNorm .* the loss of task 'b' is -.* constant"):
        optimizer.backward({**losses, "b": losses["b"] - 100.0})
    assert models.same(optimizer._resolver.method_state, before)
    assert torch.equal(flat_parameters(model), parameters)


def test_the_mean_loss_of_a_task_without_a_micro_batch_is_unknown():
    model = net()
    optimizer = optimizer_of(model, method=GradNorm(), mode="stochastic", accumulation_steps=3)
    optimizer.backward({"a": losses_of(model, inputs(1)[0])["a"]})
    optimizer.step()
    first = optimizer._resolver.method_state["initial_losses"]
    assert first[0] > 0.0
    assert first[1:].tolist() == [0.0, 0.0]


def test_random_orders_go_on_where_they_were():
    """The random counter is the state: two runs with the same seed are the same run."""
    runs = []
    for seed in (0, 0, 1):
        model = net()
        optimizer = optimizer_of(model, method=PCGrad(seed=seed))
        train(model, optimizer, inputs(20))
        assert int(optimizer._resolver.method_state["counter"]) == 10
        runs.append(flat_parameters(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_one_task_and_every_method(backend):
    for method in ALL:
        model = nn.Linear(3, 1)
        options = {"tasks": {"a": 1.0}, "method": method, "backend": backend}
        optimizer = optimizer_over(*model.parameters(), lr=0.1, **options)
        optimizer.backward({"a": model(torch.ones(3)).sum() + 10.0})  # GradNorm: above 0
        optimizer.step()
        assert not optimizer.report().skipped
        assert model.weight.grad.tolist() == [[1.0] * 3]  # CAGrad alone would make 1 + c of it
        assert optimizer.report().weights == {"a": 1.0}


def test_reports_contain_the_incidence_of_conflict():
    model = net()
    optimizer = optimizer_of(model, method=PCGrad())
    train(model, optimizer, inputs(2))
    report = optimizer.report()
    below = [cosine < 0.0 for cosine in report.cosines.values()]
    assert report.incidence == sum(below) / 3 == optimizer.recorder.incidence()
    assert report.conflicts == report.winners == []
    assert report.norm_ema == {}


def test_the_operations_of_a_step_of_graddrop_are_two(monkeypatch):
    """No Gramian is needed for the write, but for what is not finite and for the report."""
    calls = []
    model = net()
    optimizer = optimizer_of(model, method=GradDrop(), accumulation_steps=1)
    losses = losses_of(model, inputs(1)[0])

    def counted(name, function):
        return lambda *args, **options: calls.append(name) or function(*args, **options)

    backend = optimizer._resolver.backend
    for name in ("gramian", "graddrop", "combine", "arbitrate"):
        monkeypatch.setattr(backend, name, counted(name, getattr(backend, name)))
    optimizer.backward(losses)
    assert calls == ["gramian", "graddrop"]


# What float32 leaves of gradients that depend on each other.


def written_for(method, rows: torch.Tensor) -> torch.Tensor:
    """The result of a step whose task gradients are these rows [K, n], of one parameter."""
    p = nn.Parameter(torch.zeros(rows.shape[1]))
    tasks = {f"t{k}": 1.0 for k in range(len(rows))}
    optimizer = optimizer_over(p, tasks=tasks, method=method)
    losses = zip(tasks, rows.float(), strict=True)
    optimizer.backward({task: (p * row).sum() for task, row in losses})
    assert not optimizer.report().skipped
    return p.grad.double()


DEPENDENT = [CAGrad(), MGDA(), UPGrad(), AlignedMTL(), IMTLG(), ConFIG(), NonConflicting(Sum())]


@pytest.mark.parametrize("method", DEPENDENT, ids=repr)
@pytest.mark.parametrize("kind", ["a multiple", "a sum", "one element", "two elements"])
def test_rounding_of_dependent_gradients_decides_nothing(method, kind):
    """Their Gramian is singular but for the rounding of float32, which is another in every step."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
        rows = {
            "a multiple": torch.stack([a, 0.3 * a]),
            "a sum": torch.stack([a, b, a + b]),
            "one element": torch.rand(3, 1, generator=generator).double() + 0.1,
            "two elements": torch.randn(4, 2, generator=generator).double(),
        }[kind]
        rows = rows.float().double()
        found = written_for(method, rows)
        expected = method((rows @ rows.T).float()).double() @ rows
        # Where a pair barely agrees or not, an active set may turn; the result moves little then.
        # (The weights of IMTL-G may sum to nearly 0, and the result then be long.)
        size = max(float(rows.norm(dim=1).max()), float(expected.norm()))
        assert (found - expected).norm() <= 2e-3 * size


@pytest.mark.parametrize("method", [*DEPENDENT, NashMTL(), FairGrad()], ids=repr)
def test_gradients_that_cancel_out_make_no_noise(method):
    """Large weights would leave the rounding of the sum, and nothing else."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        a = torch.randn(1000, generator=generator, dtype=torch.float64)
        found = written_for(method, torch.stack([a, -0.3 * a]))
        # It is along a, or nothing: what is across is noise.
        along = (found @ a) / (a @ a) * a
        assert (found - along).norm() <= 2e-3 * a.norm()


def test_gradnorm_weights_a_task_that_does_not_reach_the_chosen_layer():
    """It keeps its weight of 1, and its gradient."""
    torch.manual_seed(0)
    first, second = nn.Linear(3, 5), nn.Linear(5, 2)
    model = nn.ModuleDict({"first": first, "second": second})
    method = GradNorm(lr=0.1, parameters=(name for name in ["second"]))
    optimizer = optimizer_of(model, method=method, accumulation_steps=1)
    for x in torch.randn(5, 8, 3):
        z = first(x)
        y = second(z)
        losses = {"a": y[:, 0].square().mean(), "b": (y[:, 1] - 1).square().mean()}
        optimizer.backward({**losses, "c": z.abs().mean()})
        optimizer.step()
    weights = optimizer.report().weights
    assert weights["c"] == 1.0
    assert weights["a"] != 1.0
    for p in second.parameters():
        p.requires_grad_(False)
    z = first(torch.randn(8, 3))
    y = second(z)
    optimizer.backward({"a": y.abs().sum(), "b": y.square().sum(), "c": z.abs().sum()})
    optimizer.step()  # what was shared stays so, also while it is frozen


def test_gradnorm_asks_for_a_layer_that_tasks_share():
    model = net()
    optimizer = optimizer_of(model, method=GradNorm(parameters=("heads.a",)))
    first, last = inputs(2)
    optimizer.backward(losses_of(model, first))
    with pytest.raises(ValueError, match=r"parameters=\('heads.a',\).*more than one task"):
        optimizer.backward(losses_of(model, last))
    for wrong in ((), "body", 3, (1,)):
        with pytest.raises(ValueError, match="parameters must be names"):
            GradNorm(parameters=wrong)


def test_names_go_without_what_wrappers_add():
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = optimizer_of(compiled, method=GradNorm(parameters=("body.2",)))
    for batch in inputs(2):
        optimizer.backward(losses_of(compiled, batch))
    optimizer.step()
    assert {row["layer"] for row in optimizer.recorder.layers()} == {"body.0", "body.2"}


def test_weights_of_tasks_that_share_nothing_are_one():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for granularity in ("model", "tensor"):
        optimizer = optimizer_over(p, q, method=MGDA(), granularity=granularity)
        optimizer.backward({"a": p.sum(), "b": 3 * q.sum()})
        optimizer.step()
        report = optimizer.report()
        assert report.weights == {"a": 1.0, "b": 1.0}
        assert report.incidence is None
        assert report.zone == "none"
        assert q.grad.tolist() == [3.0, 3.0]
        optimizer.zero_grad()


class Slowed(Method):
    """A user's own method with a state: weights that grow from 0 to 1, by a count of steps."""

    def new_state(self, _tasks, device):
        return {"steps": torch.zeros((), dtype=torch.int64, device=device)}

    def weights(self, gramian, state, _known):
        state["steps"] += 1
        share = 1.0 - 0.5 ** state["steps"].double()
        return share[..., None].expand(gramian.shape[:-1])


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_a_method_of_the_users_own_may_keep_a_state(granularity):
    model = net()
    optimizer = optimizer_of(model, method=Slowed(), granularity=granularity)
    train(model, optimizer, inputs(4))
    assert list(optimizer.report().weights.values()) == [0.75] * 3
    other = optimizer_of(copy.deepcopy(model), method=Slowed(), granularity=granularity)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert (other._resolver.method_state["steps"] == 2).all()
    assert repr(Slowed()) == "Slowed()"  # no address: ranks compare it
    assert Slowed()(torch.eye(2)).tolist() == [0.5, 0.5]


def test_a_method_that_returns_no_weights_says_so():
    class Wrong(Slowed):
        def weights(self, gramian, *_):
            return gramian.new_ones(1)

    with pytest.raises(ValueError, match=r"Wrong.weights must return .* \[2\], not \[1\]"):
        Wrong()(torch.eye(2))
