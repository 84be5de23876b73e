"""resolve_gradients and gramian: conflict resolution for those who own their training loop."""

import copy

import pytest
import torch

import gcond_kernels as gk
from gcond_kernels import GCond, GCondFused, gramian, resolve_gradients

METHODS = [
    *(method() for method in (gk.Sum, gk.PCGrad, gk.GradVac, gk.CAGrad, gk.MGDA, gk.UPGrad)),
    *(method() for method in (gk.AlignedMTL, gk.IMTLG, gk.NashMTL, GCond, GCond.published)),
    *(gk.ConFIG(), gk.FairGrad(), gk.NormBalancing(), gk.ExcessMTL(), gk.NonConflicting(GCond())),
    gk.GradDrop(leak=0.1),
    lambda S: S.diagonal().rsqrt(),
]


def model_of(dtype=torch.float32):
    """A trunk, and a head for each of two tasks."""
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    return torch.nn.ModuleDict(
        {"trunk": trunk, "a": torch.nn.Linear(8, 1), "b": torch.nn.Linear(8, 1)}
    ).to(dtype)


def losses_of(model, step):
    torch.manual_seed(100 + step)
    x = torch.randn(16, 6, dtype=next(model.parameters()).dtype)
    hidden = model["trunk"](x)
    target = x.sum(1, keepdim=True)
    return [
        (model["a"](hidden) - target).square().mean(),
        (model["b"](hidden) + 2 * target).square().mean(),
        (hidden.sum(1) - target.abs().squeeze(1)).square().mean(),
    ]


def gradients_of(losses, parameters):
    return [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in losses
    ]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: getattr(m, "__name__", None) or repr(m))
def test_five_steps_are_those_of_the_optimizer_to_the_bit(method):
    mine, theirs = model_of(), model_of()
    base = torch.optim.SGD(mine.parameters(), lr=0.05)
    fused = GCondFused(
        torch.optim.SGD(theirs.parameters(), lr=0.05), {"a": 1.0, "b": 1.0, "c": 1.0}, method=method
    )
    state = {}
    for step in range(5):
        parameters = list(mine.parameters())
        weights = resolve_gradients(
            parameters, gradients_of(losses_of(mine, step), parameters), method, state
        )
        base.step()
        fused.backward(dict(zip("abc", losses_of(theirs, step), strict=True)))
        if not weights.isnan().all():  # GradDrop has none
            assert weights.tolist() == list(fused.report().weights.values())
        fused.step()
        for p, q in zip(parameters, theirs.parameters(), strict=True):
            assert torch.equal(p, q)


def test_the_gramian_is_that_of_the_flat_gradients():
    parameters = list(model_of().parameters())
    torch.manual_seed(1)
    tasks = [[torch.randn_like(p) for p in parameters] for _ in range(3)]
    tasks[0][2] = tasks[1][2] = None  # one task alone has a gradient
    tasks[0][3] = tasks[1][3] = tasks[2][3] = None
    S = gramian(tasks)
    flat = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).double().flatten()
                    for p, g in zip(parameters, task, strict=True)
                ]
            )
            for task in tasks
        ]
    )
    assert S.dtype == torch.float64
    # Sums of some hundred products in float32.
    assert torch.allclose(S, flat @ flat.T, rtol=1e-5, atol=1e-4)


def test_jacobians_are_taken_as_vmap_returns_them():
    model = model_of()
    parameters = list(model.parameters())
    losses = torch.stack(losses_of(model, 0))
    options = {"is_grads_batched": True, "allow_unused": True, "retain_graph": True}
    jacobians = torch.autograd.grad(losses, parameters, torch.eye(3), **options)
    by_task = list(zip(*jacobians, strict=True))
    weights = resolve_gradients(parameters, by_task, gk.UPGrad())
    written = [p.grad.clone() for p in parameters]
    again = resolve_gradients(parameters, gradients_of(losses, parameters), gk.UPGrad())
    assert torch.allclose(weights, again, rtol=1e-5)  # autograd sums batches in another order
    for gradient, p in zip(written, parameters, strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(gramian(by_task), gramian(gradients_of(losses, parameters)), rtol=1e-5)


def test_jacobians_are_taken_as_torchjd_leaves_them():
    autojac = pytest.importorskip("torchjd.autojac", reason="TorchJD is not installed")
    model = model_of()
    parameters = list(model["trunk"].parameters())
    autojac.backward(losses_of(model, 0), inputs=parameters)
    by_task = list(zip(*(p.jac for p in parameters), strict=True))
    weights = resolve_gradients(parameters, by_task, gk.UPGrad())
    assert weights.shape == (3,)
    expected = [torch.tensordot(weights.float(), p.jac, 1) for p in parameters]
    for p, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-5, atol=1e-6)


def test_a_parameter_of_one_task_keeps_its_gradient_and_one_of_none_has_none():
    a, b, c = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    c.grad = torch.ones(3)
    shared = [torch.tensor([1.0, 0, 0]), torch.tensor([-2.0, 1, 0])]
    own = torch.tensor([5.0, 6, 7])
    weights = resolve_gradients(
        [a, b, c], [[shared[0], own, None], [shared[1], None, None]], gk.MGDA()
    )
    assert c.grad is None
    assert torch.equal(b.grad, own)
    assert torch.allclose(a.grad, weights[0].float() * shared[0] + weights[1].float() * shared[1])
    assert weights.tolist() == gk.MGDA()(gramian([[shared[0]], [shared[1]]])).tolist()


@pytest.mark.parametrize("method", [GCond(), gk.PCGrad(), gk.GradDrop()], ids=repr)
def test_what_is_not_finite_is_seen_in_grad_and_leaves_the_state(method):
    model, state = model_of(), {}
    parameters = list(model.parameters())
    resolve_gradients(parameters, gradients_of(losses_of(model, 0), parameters), method, state)
    before = copy.deepcopy(state)
    bad = [list(task) for task in gradients_of(losses_of(model, 1), parameters)]
    bad[1][0] = torch.full_like(bad[1][0], float("inf"))
    weights = resolve_gradients(parameters, bad, method, state)
    assert weights.isnan().all()
    assert all(p.grad.isnan().all() for p in parameters)
    if not isinstance(method, gk.GradDrop):  # whose counter of random numbers goes on
        assert all(
            torch.equal(before["method_state"][k], v) for k, v in state["method_state"].items()
        )
    if method.needs_history:
        assert torch.equal(before["history"], state["history"])


def test_grad_has_the_type_and_memory_order_of_its_parameter():
    parameters = [
        torch.nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
    ]
    torch.manual_seed(0)
    tasks = [[torch.randn(2, 3, 4, 4), torch.randn(5).bfloat16()] for _ in range(2)]
    weights = resolve_gradients(parameters, tasks, gk.Sum())
    assert weights.tolist() == [1.0, 1.0]
    assert parameters[0].grad.stride() == parameters[0].stride()
    assert torch.equal(parameters[0].grad, tasks[0][0] + tasks[1][0])
    assert parameters[1].grad.dtype == torch.bfloat16


def two():
    return [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]


GRADIENTS = {
    "none at all": ([], "gradients are empty"),
    "too few": ([[torch.ones(2)]], "task 0 has 1 gradients for 2 parameters"),
    "not as many": ([[torch.ones(2), torch.ones(3)], [None]], r"as many gradients .*\[2, 1\]"),
    "other shape": ([[torch.ones(2)] * 2], r"parameter 1 for task 0 has shape \[2\], not \[3\]"),
    "sparse": ([[torch.ones(2).to_sparse(), None]], r"gradients\[0\]\[0\] has layout"),
    "a matrix": (torch.ones(2, 5), "a sequence for each task, not .*Tensor"),
    "one task's": ([torch.ones(2), torch.ones(3)], r"gradients\[0\] is a tensor"),
    "by name": ({"a": [torch.ones(2)]}, "a sequence for each task, not .*dict"),
    "named": ([{"w": torch.ones(2)}], r"gradients\[0\] must be a sequence of tensors"),
    "numbers": ([[1.0, 2.0]], r"gradients\[0\]\[0\] must be a tensor or None"),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_that_do_not_go_with_the_parameters(case):
    parameters = two()
    gradients, message = GRADIENTS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        resolve_gradients(parameters, gradients, gk.Sum())
    assert all(p.grad is None for p in parameters)
    if case not in ("too few", "other shape"):  # which a Gramian alone may be of
        with pytest.raises((TypeError, ValueError), match=message):
            gramian(gradients)


def test_parameters_that_cannot_be_resolved():
    p = torch.nn.Parameter(torch.ones(2))
    cases = {"listed twice": [p, p], "not a leaf": [p * 2], "must be a tensor": [("w", p)]}
    for message, parameters in cases.items():
        with pytest.raises((TypeError, ValueError), match=message):
            resolve_gradients(parameters, [[torch.ones(2)] * len(parameters)], gk.Sum())


def test_random_numbers_need_a_state():
    with pytest.raises(ValueError, match=r"PCGrad draws random numbers, .*give state=\{\}"):
        resolve_gradients(two(), [[torch.ones(2), torch.ones(3)]] * 2, gk.PCGrad())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", [GCond(), gk.MGDA()], ids=repr)
def test_a_gradient_that_comes_and_goes_is_shared_as_in_the_optimizer(method, seed):
    """A parameter that two tasks ever used stays shared, and a history of others is forgotten."""
    torch.manual_seed(seed)
    start = [torch.randn(n) for n in (5, 4, 6)]
    mine, theirs = ([torch.nn.Parameter(s.clone()) for s in start] for _ in range(2))
    base = torch.optim.SGD(mine, lr=0.1)
    fused = GCondFused(torch.optim.SGD(theirs, lr=0.1), {"a": 1.0, "b": 1.0}, method=method)
    state = {}
    for step in range(5):
        factors = [[torch.randn(n) for n in (5, 4, 6)] for _ in range(2)]
        absent = {(1, 0)} if step in (0, 3) else set()

        def loss(parameters, k, factors=factors, absent=absent):
            used = [t for t in range(3) if (k, t) not in absent]
            return sum((parameters[t] * factors[k][t]).sum() for t in used)

        gradients = gradients_of([loss(mine, k) for k in range(2)], mine)
        resolve_gradients(mine, gradients, method, state)
        base.step()
        fused.backward({"a": loss(theirs, 0), "b": loss(theirs, 1)})
        fused.step()
        for p, q in zip(mine, theirs, strict=True):
            assert torch.equal(p, q), step


def test_a_method_that_needs_what_only_the_optimizer_knows():
    gradients = [[torch.ones(2), torch.ones(3)]] * 2
    with pytest.raises(ValueError, match=r"names, for parameters=\('trunk',\)"):
        resolve_gradients(two(), gradients, gk.GradNorm(parameters=("trunk",)))


def test_a_state_of_other_tasks_is_refused_and_stays():
    parameters, state = two(), {}
    resolve_gradients(parameters, [[torch.ones(2), torch.ones(3)]] * 2, GCond(), state)
    with pytest.raises(ValueError, match="state has tasks=2, and this call 3"):
        resolve_gradients(parameters, [[torch.ones(2), torch.ones(3)]] * 3, GCond(), state)
    others = {
        "PCGrad": (gk.PCGrad(), gk.NonConflicting(gk.PCGrad())),
        "other options": (GCond(history_dtype=torch.float32), GCond(dominance_window=9)),
    }
    for said, methods in others.items():
        for method in methods:
            with pytest.raises(ValueError, match=f"state has method=GCond, and this call {said}:"):
                resolve_gradients(parameters, [[torch.ones(2), torch.ones(3)]] * 2, method, state)
    with pytest.raises(TypeError, match="state must be a dict"):
        resolve_gradients(parameters, [[torch.ones(2), torch.ones(3)]] * 2, GCond(), [])


def test_a_state_goes_on_where_nonconflicting_is_put_around_the_method():
    parameters, state = two(), {}
    tasks = [[torch.tensor([1.0, -2]), torch.ones(3)], [torch.tensor([-1.0, 0]), -torch.ones(3)]]
    around = gk.NonConflicting(gk.NonConflicting(GCond()))
    for method in (GCond(), around, GCond()):
        resolve_gradients(parameters, tasks, method, state)
    alone = {}
    for _ in range(3):
        resolve_gradients(parameters, tasks, GCond(), alone)
    assert torch.equal(state["history"], alone["history"])
    for name, value in alone["method_state"].items():
        assert torch.equal(state["method_state"][name], value)


def test_a_state_goes_through_a_file(tmp_path):
    parameters, state = two(), {}
    tasks = [[torch.tensor([1.0, -2]), torch.ones(3)], [torch.tensor([-1.0, 0]), -torch.ones(3)]]
    resolve_gradients(parameters, tasks, GCond(), state)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    first = resolve_gradients(parameters, tasks, GCond(), state)
    assert torch.equal(first, resolve_gradients(parameters, tasks, GCond(), loaded))
