"""States through torch.distributed.checkpoint, and copies: all is carried, nothing else changes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gcond_kernels import GCondFused, TrainingState, neuron_mask
from gcond_kernels.methods import CAGrad, Sum
from tests.helpers.models import (
    TASKS,
    batches,
    flat_gradients,
    flat_parameters,
    losses_of,
    model_of,
    same,
    through_a_file,
    train,
)
from tests.storage.test_state import METHODS, optimizer_of, own_of

dcp = pytest.importorskip("torch.distributed.checkpoint")
torchs = pytest.importorskip("torch.distributed.checkpoint.state_dict")

KINDS = METHODS | {"GCond": {}, "CAGrad": {"method": CAGrad()}, "Sum": {"method": Sum()}}
FORMS = {
    "plain": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full on the host": {"full_state_dict": True, "cpu_offload": True},
}


def all_of(model, optimizer):
    """Everything that a state must leave as it is."""
    groups = [dict(group, params=None) for group in optimizer.param_groups]
    parts = [p.detach() for p in model.parameters()], [p.grad for p in model.parameters()]
    state = [dict(optimizer.base.state.get(p, {})) for p in model.parameters()]
    storage = optimizer._storage
    kept = (
        storage.accumulators,
        storage.history,
        storage.momentum,
        storage.counts,
        storage.window_tasks,
        optimizer._resolver.method_state,
    )
    begun = optimizer.report().step if optimizer._resolver.last else any(storage.counts)
    return copy.deepcopy((parts, state, groups, kept if begun else None))


def trained(x, seed=0, masked=False, **options):
    """A model and its optimizer, trained on these micro-batches."""
    model = model_of(seed=seed)
    if masked:
        options["mask"] = neuron_mask(model, 2)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, x)
    return model, optimizer


def resumed_of(model, **options):
    """Another model with the same weights, and an optimizer of it that is fresh."""
    twin, other = trained([], seed=5, **options)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    return twin, other


def check_same_training(trained, *others, x):
    """All of them train on to the same bits, which end between two windows."""
    train(*trained, x)
    for model, optimizer in others:
        train(model, optimizer, x)
        assert torch.equal(flat_parameters(trained[0]), flat_parameters(model))
        assert same(trained[1].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("at", [0, 1, 3, 4])
@pytest.mark.parametrize("method", KINDS)
def test_get_and_set_carry_everything_and_change_nothing(method, at):
    """Before the first window, in it, after it, and in the next."""
    x = batches(9)
    settings = KINDS[method] | {"masked": True}
    model, optimizer = trained(x[:at], **settings)
    before = all_of(model, optimizer)
    others = []
    for form in FORMS.values():
        options = torchs.StateDictOptions(**form)
        state = torchs.get_optimizer_state_dict(model, optimizer, options=options)
        assert same(before, all_of(model, optimizer))
        twin, other = resumed_of(model, **settings)
        torchs.set_optimizer_state_dict(twin, other, copy.deepcopy(state), options=options)
        assert [group["lr"] for group in other.param_groups] == [0.05]
        assert same(optimizer.state_dict(), other.state_dict())
        others.append((twin, other))
    check_same_training((model, optimizer), *others, x=x[at:])


@pytest.mark.parametrize("form", ["plain", "flat"])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("method", ["GCond", "Sum", "GradNorm by tensor", "PCGrad"])
def test_through_a_checkpoint_on_disk(tmp_path, method, at, form):
    options = torchs.StateDictOptions(**FORMS[form])
    x = batches(9)
    settings = KINDS[method] | {"masked": True}
    model, optimizer = trained(x[:at], **settings)
    state = torchs.get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=str(tmp_path))

    twin, other = resumed_of(model, **settings)
    there = {"optimizer": torchs.get_optimizer_state_dict(twin, other, options=options)}
    dcp.load(there, checkpoint_id=str(tmp_path))
    torchs.set_optimizer_state_dict(twin, other, there["optimizer"], options=options)
    assert same(optimizer.state_dict(), other.state_dict())
    check_same_training((model, optimizer), (twin, other), x=x[at:])


def test_a_state_on_disk_that_was_taken_in_a_window_is_refused_where_it_has_no_place(tmp_path):
    model, optimizer = trained(batches(4))
    state = torchs.get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=str(tmp_path))
    twin, other = resumed_of(model)
    there = {"optimizer": torchs.get_optimizer_state_dict(twin, other)}
    dcp.load(there, checkpoint_id=str(tmp_path))
    before = copy.deepcopy(own_of(other.state_dict()))
    with pytest.raises(
        ValueError, match="has no accumulators in the state, which was taken in the middle"
    ):
        torchs.set_optimizer_state_dict(twin, other, there["optimizer"])
    assert same(before, own_of(other.state_dict()))
    assert not other.base.state


def test_a_resolved_window_is_not_saved_and_stays():
    model, optimizer = trained([])
    for batch in batches(3):
        optimizer.backward(losses_of(model, batch))
    before = all_of(model, optimizer)
    with pytest.raises(RuntimeError, match=r"call step\(\) before saving"):
        torchs.get_optimizer_state_dict(model, optimizer)
    assert same(before, all_of(model, optimizer))
    optimizer.step()
    assert optimizer.report().step == 1


def test_states_of_others_are_refused_and_a_fresh_optimizer_stays_fresh():
    model = model_of()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.0, 0.9))
    plain = torchs.get_optimizer_state_dict(model, adamw)
    renamed = GCondFused(torch.optim.AdamW(model.parameters(), lr=0.05), {"a": 1.0, "c": 0.5})
    tasks = torchs.get_optimizer_state_dict(model, renamed)
    older = plain | {"gcond": {"version": 3}}
    for state, words in (
        (plain, r"optimizer\.base\.load_state_dict"),
        (tasks, r"the state has tasks \['a', 'c'\]"),
        (older, "plain optimizer"),  # torch hands on what it knows alone
    ):
        twin, other = trained([], momentum=0.0)
        with pytest.raises(ValueError, match=words):
            torchs.set_optimizer_state_dict(twin, other, state)
        train(twin, other, batches(3))
        straight, _ = trained(batches(3), momentum=0.0)
        assert torch.equal(flat_parameters(straight), flat_parameters(twin))


def test_names_in_another_order_are_matched_once():
    x = batches(6)
    model, twin = model_of(), model_of()
    names = [name for name, _ in reversed(list(twin.named_parameters()))]
    adamw = torch.optim.AdamW(model.named_parameters(), lr=0.05, betas=(0.0, 0.9))
    turned = torch.optim.AdamW(reversed(list(twin.named_parameters())), lr=0.05, betas=(0.0, 0.9))
    optimizer, other = GCondFused(adamw, TASKS), GCondFused(turned, TASKS)
    train(model, optimizer, x[:3])
    twin.load_state_dict(model.state_dict())
    for options in FORMS.values():
        options = torchs.StateDictOptions(**options)
        state = copy.deepcopy(torchs.get_optimizer_state_dict(model, optimizer, options=options))
        torchs.set_optimizer_state_dict(twin, other, state, options=options)
        assert other.param_groups[0]["param_names"] == names
        ours, theirs = optimizer.state_dict(), other.state_dict()
        assert same(own_of(ours)[0], own_of(theirs)[0][::-1])
        assert same(list(ours["state"].values()), list(theirs["state"].values())[::-1])


def test_state_of_each_parameter_as_torch_shows_it():
    model, optimizer = trained([])
    weight = model[0].weight
    assert not optimizer.state
    train(model, optimizer, batches(3))
    assert set(optimizer.state) == set(model.parameters())
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq", "gcond"}
    kept = optimizer.state[weight]["gcond"]["history"]
    storage = optimizer._storage
    assert torch.equal(kept["1"], storage.segments[0].view(storage.history[1]))
    # As trainers move a state to a device, and as others replace a parameter.
    for p, state in optimizer.state.items():
        optimizer.state[p] = dict(state)
    assert set(optimizer.base.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    state = optimizer.state.pop(weight)
    state["exp_avg"] = torch.ones_like(weight)
    optimizer.state[weight] = state
    assert set(optimizer.base.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[weight]["exp_avg"].eq(1.0).all()


def test_async_save_beside_training(tmp_path):
    """What is saved is what was there when it was called."""
    x = batches(12)
    model, optimizer = trained(x[:3])
    weights, wanted = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    state = {"training": TrainingState(model, optimizer)}
    done = dcp.async_save(state, checkpoint_id=str(tmp_path))
    train(model, optimizer, x[3:])
    done.result()
    twin, other = resumed_of(model)
    dcp.load({"training": TrainingState(twin, other)}, checkpoint_id=str(tmp_path))
    assert same(weights, twin.state_dict())
    assert same(wanted, other.state_dict())
    train(twin, other, x[3:])
    assert torch.equal(flat_parameters(model), flat_parameters(twin))


# Parameters that came, went, or were replaced since.


def check_resumes(model, optimizer, loss, fresh):
    """A state goes into `fresh()`, and both train on to the same bits."""
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    twin, other = fresh()
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for module, its_optimizer in ((model, optimizer), (twin, other)):
        for _ in range(3):
            its_optimizer.backward(loss(module))
            its_optimizer.step()
    assert same(model.state_dict(), twin.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_a_parameter_that_was_replaced(granularity):
    """As densification does: a longer one takes its place, and its state is taken along."""

    def loss(model):
        points = model["points"]
        return {
            "a": points.square().mean() + model["scale"].square(),
            "b": (points - 1).square().mean() + (model["scale"] - 1).square(),
        }

    def new(points=4):
        model = nn.ParameterDict(
            {"points": torch.arange(points * 3.0).view(-1, 3), "scale": torch.tensor(0.5)}
        )
        adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.0, 0.9))
        return model, GCondFused(adam, TASKS, momentum=0.5, granularity=granularity)

    model, optimizer = new()
    for _ in range(2):
        optimizer.backward(loss(model))
        optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict()["state"][1]["gcond"])
    group = optimizer.param_groups[0]
    state = optimizer.state.pop(group["params"][0])
    longer = nn.Parameter(torch.cat([model["points"].detach(), torch.ones(2, 3)]))
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.cat([state[name], torch.zeros(2, 3)])
    model["points"] = group["params"][0] = longer
    optimizer.state[longer] = state
    saved = optimizer.state_dict()["state"]
    assert same(kept, saved[1]["gcond"])
    assert not any(row.any() for row in saved[0]["gcond"]["history"].values())
    check_resumes(model, optimizer, loss, lambda: new(6))


def test_a_group_that_was_removed():
    def loss(model):
        y = model[2](torch.tanh(model[0](torch.ones(3, 4))))
        return {"a": (y[:, 0] - 1).square().mean(), "b": (y.sum(1) + 1).square().mean()}

    def new(first=True):
        model = model_of()
        groups = [{"params": list(model[i].parameters())} for i in ((0, 2) if first else (2,))]
        adam = torch.optim.Adam(groups, lr=0.01, betas=(0.0, 0.9))
        return model, GCondFused(adam, TASKS, momentum=0.5)

    model, optimizer = new()
    for _ in range(2):
        optimizer.backward(loss(model))
        optimizer.step()
    for p in optimizer.param_groups.pop(0)["params"]:
        optimizer.state.pop(p)
    check_resumes(model, optimizer, loss, lambda: new(first=False))


# Copies.


def through_pickle(what):
    return pickle.loads(pickle.dumps(what))


def through_torch_save(what):
    buffer = io.BytesIO()
    torch.save(what, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("of", ["optimizer", "base"])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_copy_with_a_scheduler_at_any_point(copied, at, of):
    """After so many micro-batches, the last of a window not stepped yet; its own step alone."""
    x = batches(9)
    model = model_of()
    optimizer = optimizer_of(model, accumulation_steps=2)
    optimizer.recorder.capacity = 3
    scheduler = torch.optim.lr_scheduler.ExponentialLR(
        optimizer if of == "optimizer" else optimizer.base, 0.5
    )
    for number, batch in enumerate(x[:at], start=1):
        if optimizer.backward(losses_of(model, batch)) and number < at:
            optimizer.step()
            scheduler.step()
    due = not optimizer.active_tasks
    before = flat_parameters(model)
    gradients = flat_gradients(model) if due else None

    twin, other, its_scheduler = copied((model, optimizer, scheduler))
    assert its_scheduler.optimizer is (other if of == "optimizer" else other.base)
    if due:
        assert torch.equal(flat_gradients(twin), gradients)
        other.step()
        its_scheduler.step()
        assert torch.equal(flat_parameters(model), before)  # the original is left alone
        assert not torch.equal(flat_parameters(twin), before)
        optimizer.step()
        scheduler.step()
    for net, its, plan in ((model, optimizer, scheduler), (twin, other, its_scheduler)):
        for batch in x[at:]:
            if its.backward(losses_of(net, batch)):
                its.step()
                plan.step()
    assert torch.equal(flat_parameters(model), flat_parameters(twin))
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] < 0.05
    if not optimizer.active_tasks:
        optimizer.step(), other.step()
    assert same(optimizer.state_dict(), other.state_dict())
    for alone in (optimizer, scheduler):  # without the model
        assert type(copied(alone)) is type(alone)
