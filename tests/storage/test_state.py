"""state_dict and load_state_dict: training goes on to the same bits."""

import copy

import pytest
import torch
from torch import nn

from gcond_kernels import GCond, GCondFused, neuron_mask
from gcond_kernels.methods import (
    DWA,
    FAMO,
    STCH,
    ExcessMTL,
    GradDrop,
    GradNorm,
    GradVac,
    NonConflicting,
    NormBalancing,
    PCGrad,
    UncertaintyWeighting,
)
from tests.helpers.models import (
    TASKS,
    batches,
    flat_parameters,
    losses_of,
    model_of,
    same,
    through_a_file,
    train,
)

OPTIONS = {"accumulation_steps": 3, "momentum": 0.9}
METHODS = {
    "PCGrad": {"method": PCGrad(seed=1)},
    "GradNorm": {"method": GradNorm(lr=0.05)},
    "GradDrop": {"method": GradDrop(leak=0.1)},
    "NormBalancing": {"method": NormBalancing()},
    "NonConflicting": {"method": NonConflicting(GCond())},
    "by tensor": {"granularity": "tensor"},
    "GradVac by tensor": {"granularity": "tensor", "method": GradVac(beta=0.3)},
    "DWA": {"method": DWA(steps_per_epoch=1)},
    "STCH": {"method": STCH(mu=0.5, warmup_steps=2)},
    "UncertaintyWeighting": {"method": UncertaintyWeighting(lr=0.05)},
    "FAMO by tensor": {"granularity": "tensor", "method": FAMO(lr=0.1)},
    "ExcessMTL by tensor": {"granularity": "tensor", "method": ExcessMTL(step_size=0.3)},
    "GradNorm by tensor": {"granularity": "tensor", "method": GradNorm(lr=0.05)},
}


def optimizer_of(model, **options) -> GCondFused:
    base = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.0, 0.9))
    return GCondFused(base, TASKS, **(OPTIONS | options))


def masked_optimizer_of(model, **options) -> GCondFused:
    return optimizer_of(model, mask=neuron_mask(model, 2), **options)


def check_training_goes_on(model, optimizer, twin, other, x, rtol=0.0) -> None:
    """Both to the same bits, or but for rounding where sums are in another order."""
    train(model, optimizer, x)
    train(twin, other, x)
    found, expected = flat_parameters(twin), flat_parameters(model)
    assert torch.allclose(found, expected, rtol=rtol, atol=min(rtol, 1e-7))


def check_resuming(x, at, seed=5, make=optimizer_of, **options) -> None:
    model, resumed = model_of(), model_of(seed)
    optimizer, other = make(model, **options), make(resumed, **options)
    train(model, optimizer, x[:at])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    check_training_goes_on(model, optimizer, resumed, other, x[at:])
    assert same(optimizer.state_dict(), other.state_dict())


def kept_in(state):
    """What a state holds of each parameter beside the state of the base, in order."""
    return [of_parameter["gcond"] for of_parameter in state["state"].values()]


def own_of(state):
    """What a state holds beside the state of the base."""
    return kept_in(state), [g["gcond"] for g in state["param_groups"]], state["gcond"]


@pytest.mark.parametrize(
    ("mode", "at", "history"),
    [
        (mode, at, ["raw", "resolved"][(i + j) % 2])
        for i, mode in enumerate(["exact", "stochastic"])
        for j, at in enumerate([0, 1, 3, 7, 8, 9])
    ],
)
def test_round_trip_at_any_micro_batch_gives_the_same_bits(backend, mode, at, history):
    check_resuming(batches(18), at, mode=mode, method=GCond(history=history), backend=backend)


def test_loading_copies(backend):
    model, x = model_of(), batches(6)
    optimizer = optimizer_of(model, backend=backend)
    train(model, optimizer, x[:4])
    twin = copy.deepcopy(model)
    other = optimizer_of(twin, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(own_of(optimizer.state_dict()))
    train(twin, other, x[4:])
    assert same(before, own_of(optimizer.state_dict()))  # torch does not copy what is the base's


@pytest.mark.parametrize("at", [3, 4])
def test_loading_its_own_state_changes_nothing(backend, at):
    check_loading_its_own(at, backend=backend)


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_any_method_loads_its_own_state_and_nothing_changes(method, at):
    check_loading_its_own(at, **METHODS[method])


def check_loading_its_own(at, **options):
    model = model_of()
    optimizer = masked_optimizer_of(model, **options)
    train(model, optimizer, batches(at))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert same(before, optimizer.state_dict())
    assert same(before, copy.deepcopy(optimizer).state_dict())
    assert all(own["momentum"].abs().sum() > 0 for own in kept_in(before))
    losses = before["param_groups"][0]["gcond"]["window"]["losses"]
    assert any(losses) == (at == 4)
    with pytest.raises(RuntimeError, match="nothing to report"):
        optimizer.report()


def test_resuming_a_window_remembers_which_parameters_had_a_gradient(backend):
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([used, unused], lr=0.1, weight_decay=0.5)
    optimizer = GCondFused(base, {"a": 1.0}, accumulation_steps=2, backend=backend)
    optimizer.backward({"a": used.sum()})
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    optimizer.backward({"a": used.sum()})
    optimizer.step()
    assert unused.grad is None
    assert torch.equal(unused, torch.ones(2))


def test_into_a_process_that_saw_its_parameters_in_another_order(backend):
    x = batches(8)
    model = model_of()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = optimizer_of(model, backend=backend)
    train(model, optimizer, x[:1])
    for p in model[0].parameters():
        p.requires_grad_(True)  # its segments come last
    train(model, optimizer, x[1:5])
    twin = copy.deepcopy(model)
    other = optimizer_of(twin, backend=backend)
    train(twin, other, x[:1])  # here they come first
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer._storage.layout.sizes != other._storage.layout.sizes
    check_training_goes_on(model, optimizer, twin, other, x[5:], rtol=1e-6)


def test_into_another_memory_order(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(4, 5, 3, 5, 5)

    def run(model, optimizer, x):
        for batch in x:
            y = model(batch)
            if optimizer.backward({"a": y[:, 0].pow(2).mean(), "b": (y.sum(1) - 1).pow(2).mean()}):
                optimizer.step()

    optimizer, other = optimizer_of(model, backend=backend), optimizer_of(last, backend=backend)
    run(model, optimizer, x[:1])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    run(model, optimizer, x[1:])
    run(last, other, x[1:])
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(flat_parameters(model), flat_parameters(last), rtol=1e-5, atol=1e-6)


def test_a_parameter_that_the_state_does_not_know_starts_afresh(backend):
    x = batches(4)
    model = model_of()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = optimizer_of(model, backend=backend)
    train(model, optimizer, x[:4])
    state = through_a_file(optimizer.state_dict())
    for p in model[0].parameters():
        p.requires_grad_(True)
    other = optimizer_of(model, backend=backend)
    train(model, other, x)
    other.load_state_dict(state)
    storage = other._storage
    assert storage.momentum_steps.tolist() == [0, 0, 1, 1]
    assert (storage.momentum[: storage.layout.offsets[2]] == 0).all()
    assert (storage.history[:, : storage.layout.offsets[2]] == 0).all()
    assert (storage.accumulators[:, : storage.layout.offsets[2]] == 0).all()


def test_between_windows_the_accumulators_are_not_saved(backend):
    model, x = model_of(), batches(3)
    optimizer = optimizer_of(model, backend=backend)
    train(model, optimizer, x)
    assert not any("accumulators" in own for own in kept_in(optimizer.state_dict()))
    train(model, optimizer, x[:1])
    for p, own in zip(model.parameters(), kept_in(optimizer.state_dict()), strict=True):
        assert [own["accumulators"][task].shape for task in ("0", "1")] == [p.shape] * 2


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))


def shorter() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh())


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (model_of, {"tasks": {"a": 1.0, "c": 1.0}}, r"tasks \['a', 'b'\].*\['a', 'c'\]"),
        (model_of, {"accumulation_steps": 4}, "accumulation_steps=3, this optimizer has 4"),
        (model_of, {"mode": "stochastic"}, "mode='exact', this optimizer has 'stochastic'"),
        (model_of, {"momentum": 0.0}, "the state has momentum, this optimizer has no momentum"),
        (
            model_of,
            {"method": GCond(tie_breaking_weights=(0, 1))},
            "the state has history, this optimizer has no history",
        ),
        (model_of, {"method": GCond(dominance_window=2)}, r"winners \[3\], this one \[2\]"),
        (model_of, {"method": PCGrad()}, "the state has method_name 'GCond', this optimizer 'PCG"),
        (model_of, {"granularity": "tensor"}, "the state has granularity 'model', this .*'tensor'"),
        (model_of, {"mask": {}}, "the state has no mask, this optimizer has mask"),
        (wider, {}, r"parameter 0 has shape \[9, 4\], in the state it has \[8, 4\]"),
        (shorter, {}, "parameter group 0 has 4 parameters in the state, here 2"),
    ],
)
def test_a_state_of_something_else_is_refused_and_nothing_changes(backend, make, options, words):
    model, x = model_of(), batches(4)
    optimizer = optimizer_of(model, backend=backend)
    train(model, optimizer, x)  # in the middle of a window
    state = optimizer.state_dict()
    other_model = make()
    options = OPTIONS | {"tasks": TASKS} | options
    tasks = options.pop("tasks")
    base = torch.optim.AdamW(other_model.parameters(), lr=0.05, betas=(0.0, 0.9))
    other = GCondFused(base, tasks, **options, backend=backend)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(state)
    assert same(before, other.state_dict())


def test_a_state_with_masks_is_refused_without():
    model, x = model_of(), batches(4)
    optimizer = optimizer_of(model, mask=neuron_mask(model, 1))
    train(model, optimizer, x)
    with pytest.raises(ValueError, match="the state has mask, this optimizer has no mask"):
        optimizer_of(model).load_state_dict(optimizer.state_dict())


MORE_METHODS = {
    "GradVac": {"method": GradVac(beta=0.3)},
    "PCGrad by tensor": {"granularity": "tensor", "method": PCGrad(seed=3)},
    "a function by tensor": {"granularity": "tensor", "method": torch.diag},
}


@pytest.mark.parametrize("mode", ["exact", "stochastic"])
@pytest.mark.parametrize("options", (METHODS | MORE_METHODS).values(), ids=METHODS | MORE_METHODS)
def test_any_method_goes_on_to_the_same_bits(options, mode):
    """Masks are those of the state: the others that are given are forgotten."""
    for at in (0, 1, 2, 3, 4, 8):
        seed = 0 if at == 0 else 5  # before a first window nothing is known
        check_resuming(batches(12), at, seed, masked_optimizer_of, **options, mode=mode)


def test_tasks_of_parameters_are_saved():
    """In a window of one task alone that can only be known from before."""

    def new(model):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        halves = {"method": lambda S: torch.full_like(S[0], 0.5), "mode": "stochastic"}
        return GCondFused(base, TASKS, accumulation_steps=2, **halves)

    model = nn.ParameterDict({"shared": nn.Parameter(torch.ones(2)), "own": torch.ones(3)})
    optimizer = new(model)
    optimizer.backward({"a": model["shared"].sum() + model["own"].sum()})
    optimizer.backward({"b": model["shared"].sum()})
    optimizer.step()
    for known in (False, True):
        other = new(model)
        if known:
            other.load_state_dict(through_a_file(optimizer.state_dict()))
        model.zero_grad()
        other.backward({"a": model["shared"].sum() + model["own"].sum()})
        other.resolve()
        assert model["shared"].grad.tolist() == [0.5 if known else 1.0] * 2
        assert model["own"].grad.tolist() == [1.0] * 3


def test_a_state_of_another_version_is_refused_and_nothing_changes():
    model, x = model_of(), batches(4)
    optimizer = optimizer_of(model)
    train(model, optimizer, x)
    before = copy.deepcopy(optimizer.state_dict())
    later = copy.deepcopy(before)
    later["param_groups"][0]["gcond"]["version"] = 99
    # Until version 3 all of it was at the top, and the rest the state of the base.
    older = optimizer.base.state_dict() | {"gcond": {"version": 3, "accumulator": {}, "window": {}}}
    for state, version in ((later, 99), (older, 3)):
        with pytest.raises(ValueError, match=f"format {version}, this version reads 6"):
            optimizer.load_state_dict(state)
        assert same(before, optimizer.state_dict())


def named_optimizer(model, names, backend="auto", split=None, **options) -> GCondFused:
    """An optimizer over the named parameters in this order, in one group or cut into two."""
    parameters = dict(model.named_parameters())
    listed = [(name, parameters[name.removeprefix("module.")]) for name in names]
    groups = [listed] if split is None else [listed[:split], listed[split:]]
    base = torch.optim.AdamW(
        [{"params": group, "lr": 0.05 / n} for n, group in enumerate(groups, start=1)],
        betas=(0.0, 0.9),
    )
    return GCondFused(base, TASKS, backend=backend, **(OPTIONS | options))


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
TURNED = ["0.bias", "0.weight", "2.bias", "2.weight"]


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("split", [None, 2])
def test_parameters_in_another_order_are_matched_by_their_names(backend, at, split):
    x = batches(9)
    model = model_of()
    optimizer = named_optimizer(model, NAMES, backend, split)
    train(model, optimizer, x[:at])
    resumed = copy.deepcopy(model)
    other = named_optimizer(resumed, TURNED, backend, split)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == TURNED[:split]
    check_training_goes_on(model, optimizer, resumed, other, x[at:], rtol=1e-5)
    # The same way back, and its own order is still its own.
    state = copy.deepcopy(other.state_dict())
    other.load_state_dict(state)
    assert same(state, other.state_dict())


def kept_by_name(optimizer):
    """What is kept of each parameter: state of the method, mask, who had a gradient of it."""
    storage, shared = optimizer._storage, optimizer.method.shared_state
    state = {k: v for k, v in optimizer._resolver.method_state.items() if k not in shared}
    return {
        segment.name: (
            {key: value[t].clone() for key, value in state.items()},
            storage.mask_of(segment),
            storage.parameter_tasks[t],
            storage.was_shared[t],
        )
        for t, segment in enumerate(storage.segments)
    }


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("method", ["by tensor", "GradVac by tensor", "GradNorm by tensor"])
def test_state_by_tensor_follows_its_tensor(method, seen, at):
    """Also into an optimizer that has seen its parameters in another order."""
    x = batches(9)
    model = model_of()
    options = METHODS[method]
    optimizer = named_optimizer(model, NAMES, mask=neuron_mask(model, 2), **options)
    train(model, optimizer, x[:at])
    resumed = copy.deepcopy(model)
    mask = {parameter: ~bits for parameter, bits in neuron_mask(resumed, 1).items()}
    other = named_optimizer(resumed, TURNED, mask=mask, **options)
    if seen:
        train(resumed, other, x[:3])
        resumed.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    kept, kept_there = kept_by_name(optimizer), kept_by_name(other)
    assert list(kept_there) == TURNED
    assert same(kept, {name: kept_there[name] for name in kept})
    assert not same(kept["0.weight"][0], kept["0.bias"][0])
    check_training_goes_on(model, optimizer, resumed, other, x[at:], rtol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "make", "rtol"),
    [("module.", lambda model: named_optimizer(model, TURNED), 1e-5), ("", optimizer_of, 0.0)],
)
def test_wrappers_do_not_count_in_names_and_without_names_the_place_does(prefix, make, rtol):
    model, x = model_of(), batches(4)
    optimizer = named_optimizer(model, [prefix + name for name in NAMES])
    train(model, optimizer, x)
    twin = copy.deepcopy(model)
    other = make(twin)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    check_training_goes_on(model, optimizer, twin, other, x, rtol)


@pytest.mark.parametrize(
    "names",
    [
        ["module.w", "w", "enc.submodule.w", "enc.subw"],  # alike without what is no wrapper
        ["w", "w", "v", "v"],  # torch takes them
    ],
)
def test_similar_names(names):
    x = batches(4)
    model = model_of()
    listed = list(zip(names, model.parameters(), strict=True))
    optimizer = GCondFused(torch.optim.SGD(listed, lr=0.1), TASKS, **OPTIONS)
    train(model, optimizer, x)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(before))
    assert same(before, optimizer.state_dict())
    other = GCondFused(torch.optim.SGD(listed[::-1], lr=0.1), TASKS, **OPTIONS)
    if len(set(names)) == 4:
        other.load_state_dict(before)
        assert same(kept_in(before), kept_in(other.state_dict())[::-1])
    else:
        with pytest.raises(ValueError, match="more than one parameter called v"):
            other.load_state_dict(before)


def test_between_windows_their_shape_may_change():
    model, x = model_of(), batches(4)
    optimizer = optimizer_of(model)
    train(model, optimizer, x[:3])
    other = optimizer_of(model, accumulation_steps=4, mode="stochastic")
    other.load_state_dict(optimizer.state_dict())
    model.zero_grad()
    train(model, other, x)
    assert other.report().step == 2


def test_loading_ends_a_window_that_was_resolved():
    model, x = model_of(), batches(3)
    optimizer = optimizer_of(model)
    train(model, optimizer, x[:1])
    state = copy.deepcopy(optimizer.state_dict())
    for batch in x[1:]:
        optimizer.backward(losses_of(model, batch))
    optimizer.resolve()
    optimizer.load_state_dict(state)
    assert optimizer.active_tasks == ("a", "b")
    optimizer.zero_grad()
    train(model, optimizer, x[1:])
    assert optimizer.report().step == 1


def test_other_objects_are_refused_with_a_reason():
    model = model_of()
    optimizer = optimizer_of(model)
    for wrong in ({}, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}):
        with pytest.raises(ValueError, match="this is no state of an optimizer"):
            optimizer.load_state_dict(wrong)
    turned = torch.optim.AdamW(reversed(list(model.named_parameters())), lr=0.05)
    named = torch.optim.AdamW(model.named_parameters(), lr=0.05, betas=(0.0, 0.9))
    assert optimizer.param_groups[0]["gcond"] == {}  # for what loads a state group by group
    for plain, other in ((optimizer.base, optimizer), (turned, GCondFused(named, TASKS))):
        with pytest.raises(ValueError, match=r"optimizer\.base\.load_state_dict"):
            other.load_state_dict(plain.state_dict())


def test_other_names_and_groups_are_refused():
    model, x = model_of(), batches(4)
    optimizer = named_optimizer(model, NAMES)
    train(model, optimizer, x)
    state = optimizer.state_dict()
    twin = model_of()
    other = named_optimizer(twin, NAMES, split=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="the state has 1 parameter groups, this optimizer 2"):
        other.load_state_dict(state)
    renamed = copy.deepcopy(state)
    renamed["param_groups"][0]["param_names"][2] = "head.weight"
    other = named_optimizer(twin, NAMES)
    with pytest.raises(ValueError, match=r"parameter group 0 has 2\.weight only in this optimizer"):
        other.load_state_dict(renamed)
    assert same(before["gcond"], other.state_dict()["gcond"])
