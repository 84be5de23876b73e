"""A TrainingState in one process: what it carries, what it leaves as it is, what it refuses."""

import copy

import pytest
import torch

from gcond_kernels import GCondFused, TrainingState
from gcond_kernels.methods import CAGrad, GCond, GradNorm, PCGrad
from tests.helpers import distributed_training as t
from tests.helpers.models import same

dcp = pytest.importorskip("torch.distributed.checkpoint")


def trained(training, numbers):
    model, optimizer = training
    for number in numbers:
        t.window(optimizer, model, [number])


def save(training, folder):
    dcp.save({"t": TrainingState(*training)}, checkpoint_id=str(folder))


def load(training, folder):
    dcp.load({"t": TrainingState(*training)}, checkpoint_id=str(folder))


def resumed(folder, before, after):
    """Both trained on from what `before` has saved after two steps: their parameters by name."""
    trained(before, range(2))
    save(before, folder)
    load(after, folder)
    for training in (before, after):
        trained(training, range(2, 5))
    return t.parameters_of(before[0]), t.parameters_of(after[0])


@pytest.mark.parametrize("steps", [0, 2])
def test_saving_changes_nothing(steps):
    """Not parameters, nor states or options of the base optimizer, also before the first step."""

    def bits():
        state = optimizer.state_dict()
        return copy.deepcopy((model.state_dict(), state["state"], state["param_groups"]))

    model = t.new_model()
    adamw = torch.optim.AdamW(model.named_parameters(), weight_decay=0.1, betas=(0.0, 0.9))
    optimizer = GCondFused(adamw, t.TASKS, momentum=0.5)
    trained((model, optimizer), range(steps))
    before = bits()
    TrainingState(model, optimizer).state_dict()
    assert same(before, bits())
    assert model.unused not in optimizer.state


def test_options_that_a_step_adds_or_changes_are_rolled_back():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                group["lr_tensor"].mul_(2)
            return super().step(closure)

    model = t.new_model()
    base = Counting(model.parameters(), lr=0.1)
    lr = base.param_groups[0]["lr_tensor"] = torch.tensor(1.0)
    TrainingState(model, GCondFused(base, t.TASKS)).state_dict()
    assert "step" not in base.param_groups[0]
    assert base.param_groups[0]["lr_tensor"] is lr
    assert lr == 1.0


def test_parameter_without_state_has_none_after_loading(tmp_path):
    model, optimizer = t.new_training(None, 1)
    resumed(tmp_path, t.new_training(None, 1), (model, optimizer))
    assert model.unused not in optimizer.state
    assert model.first.weight in optimizer.state


def test_groups_with_and_without_momentum(tmp_path):
    def new():
        model = t.new_model()
        groups = [
            {"params": list(model.first.parameters()), "momentum": 0.9},
            {"params": [*model.norm.parameters(), *model.second.parameters()]},
        ]
        return model, GCondFused(torch.optim.SGD(groups, lr=0.1), t.TASKS)

    assert t.equal(*resumed(tmp_path, new(), new()))


def test_parameters_whose_names_differ_by_that_of_a_wrapper(tmp_path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Linear(1, 3)
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.module(x[:, :1]) * self.weight

    before, after = (t.new_training(None, 1, net=Module) for _ in range(2))
    assert t.equal(*resumed(tmp_path, before, after))


def kept_by_name(optimizer):
    """What is kept of each parameter: state of the method, mask, which tasks use it."""
    storage, shared = optimizer._storage, optimizer.method.shared_state
    state = {k: v for k, v in optimizer._resolver.method_state.items() if k not in shared}
    return {
        segment.name: (
            {key: value[i] for key, value in state.items()},
            storage.mask_of(segment),
            storage.parameter_tasks[i],
            storage.was_shared[i],
            storage.momentum_steps[i],
        )
        for i, segment in enumerate(storage.segments)
    }


def test_what_is_kept_of_a_tensor_goes_with_it(tmp_path):
    """Also of a layer that was thawed since the last step, of which there is nothing yet."""
    options = {"net": t.Headed, "granularity": "tensor", "base": torch.optim.Adam}
    here = model, optimizer = t.new_training(None, 1, share=0.4, **options)
    model.second.requires_grad_(False)
    trained(here, range(2))
    model.second.requires_grad_(True)
    other = t.new_model(net=t.Headed)
    turned = torch.optim.Adam(reversed(list(other.named_parameters())), lr=1e-2)
    of_method = {"momentum": 0.5, "granularity": "tensor", "mask": t.mask_of(other, 0.7)}
    there = other, GCondFused(turned, t.TASKS, **of_method)
    save(here, tmp_path)
    load(there, tmp_path)
    kept, kept_there = kept_by_name(optimizer), kept_by_name(there[1])
    names = [name for name, _ in reversed(list(there[0].named_parameters()))]
    assert list(kept_there) == there[1].param_groups[0]["param_names"] == names
    assert same(kept, {name: kept_there[name] for name in kept})
    tasks, was_shared = kept["heads.b.weight"][2:4]
    assert (tasks.tolist(), was_shared.item()) == ([False, True, False], 0)
    tasks, was_shared = kept["second.weight"][2:4]
    assert (tasks.tolist(), was_shared.item()) == ([False] * 3, -1)
    for training in (here, there):
        trained(training, range(2, 5))
    t.assert_close(t.parameters_of(model), t.parameters_of(there[0]), 1e-6)


# What is refused.


def test_states_of_something_else(tmp_path):
    model, optimizer = t.new_training(None, 2)
    with pytest.raises(TypeError, match="must be a GCondFused"):
        TrainingState(model, optimizer.base)
    with pytest.raises(ValueError, match="is no parameter of the model"):
        TrainingState(torch.nn.Linear(2, 2), optimizer)
    optimizer.backward(t.losses_of(model, 0))
    with pytest.raises(RuntimeError, match="between windows"):
        TrainingState(model, optimizer).state_dict()
    optimizer.step()
    save((model, optimizer), tmp_path)
    other = t.new_model()
    adamw = torch.optim.AdamW(other.named_parameters())
    renamed = GCondFused(adamw, {"a": 1.0, "b": 1.0, "d": 1.0}, momentum=0.5)
    with pytest.raises(ValueError, match="the state has tasks"):
        load((other, renamed), tmp_path)


WITHOUT_HISTORY = {"method": GCond(tie_breaking_weights=(0.0, 1.0))}


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        ({"method": PCGrad()}, {"method": CAGrad()}, "method_name 'PCGrad', this .* 'CAGrad'"),
        ({"method": CAGrad()}, {"method": GradNorm()}, "method_name 'CAGrad', this .* 'GradNorm'"),
        ({"method": t.by_norm}, {"method": PCGrad()}, "method_name 'Function', this .* 'PCGrad'"),
        ({}, {"method": PCGrad()}, "method_name 'GCond', this optimizer 'PCGrad'"),
        ({"granularity": "tensor"}, {}, "granularity 'tensor', this optimizer 'model'"),
        ({"method": GCond(dominance_window=2)}, {}, r"winners \[2\], this one \[3\]"),
        ({"share": 0.4}, {}, "the state has mask, this optimizer has no mask"),
        ({}, WITHOUT_HISTORY, "the state has history, this optimizer has no history"),
        ({}, {"momentum": 0.0}, "the state has momentum, this optimizer has no momentum"),
        ({}, {"share": 0.4}, r"Missing key .*\.gcond\.mask\."),
        ({}, {"granularity": "tensor"}, r"Missing key .*gcond\.method\.norm_ema"),
        (WITHOUT_HISTORY, {}, r"Missing key .*gcond\.history\."),
    ],
)
def test_checkpoint_of_another_method_or_of_less(tmp_path, saved, here, words):
    for steps in (0, 1):
        training = t.new_training(None, 1, net=t.Headed, **saved)
        trained(training, range(steps))
        save(training, tmp_path / str(steps))
        with pytest.raises((ValueError, dcp.api.CheckpointException), match=words):
            load(t.new_training(None, 1, net=t.Headed, **here), tmp_path / str(steps))
