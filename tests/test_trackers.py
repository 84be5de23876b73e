"""Situations from the trackers of others: the right value, or an error that says what to do."""

import copy
import threading
from collections import OrderedDict, defaultdict

import pytest
import torch
from pytorch_optimizer import Lookahead, OrthoGrad, ScheduleFreeWrapper
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler, swa_utils

from gcond_kernels import GCond, GCondFused, GradNorm, PCGrad, Sum, TrainingState
from tests.helpers.models import through_a_file
from tests.test_training_loops import (
    ROUNDING,
    TASKS,
    Net,
    flat,
    gradients,
    inputs,
    losses_of,
    off,
    plain,
    sgd,
    step_plainly,
)


def step_by(model, optimizer, batch):
    optimizer.backward(losses_of(model, batch))
    optimizer.step()


def summed(base, **options):
    return GCondFused(base, TASKS, method=Sum(), **options)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


# Losses.


@pytest.mark.parametrize("how", ["detached", "kept"])
def test_a_loss_weight_is_learned_from_the_losses_afterwards(how):
    """A second optimizer's loss is made of them. WeiChengTseng/Pytorch-PCGrad#11"""
    model, x = Net(), inputs(1)
    scale = nn.Parameter(torch.ones(2))
    optimizer, losses = summed(sgd(model)), losses_of(model, x[0])
    values = [v.item() for v in losses.values()]
    kept = [v.detach() for v in losses.values()]
    if how == "detached":
        balance = scale[0] * kept[0] - scale[1].square() * kept[1]
    optimizer.backward(losses)
    if how == "kept":
        balance = scale[0] * losses["a"].detach() - scale[1].square() * losses["b"].detach()
    balance.backward()
    assert scale.grad.tolist() == pytest.approx([values[0], -2 * values[1]])


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_complex_loss_is_refused(weight):
    """pytorch/pytorch#104514"""
    p = nn.Parameter(torch.ones(2))
    optimizer = GCondFused(torch.optim.SGD([p], lr=0.1), {"a": weight})
    with pytest.raises(ValueError, match=r"'a' is torch\.complex64.*\.abs\(\)"):
        optimizer.backward({"a": torch.complex(p, 2 * p).sum()})
    optimizer.backward({"a": torch.complex(p, 2 * p).sum().abs()})
    assert p.grad.tolist() == pytest.approx([weight * 5**0.5] * 2)


def test_a_complex_parameter_is_refused_with_a_way_that_works():
    """neuraloperator#521"""
    p = nn.Parameter(torch.tensor([1 + 2j]))
    with pytest.raises(
        ValueError, match=r"parameter 0 is torch\.complex64.*view_as_complex of a real"
    ):
        GCondFused(torch.optim.SGD([p], lr=0.1), {"a": 1.0}).backward({"a": p.abs().sum()})
    q = nn.Parameter(torch.view_as_real(p.detach()).clone())
    optimizer = GCondFused(torch.optim.SGD([q], lr=0.1), {"a": 1.0})
    optimizer.backward({"a": torch.view_as_complex(q).abs().square().sum()})
    assert torch.equal(q.grad, 2 * q)


@pytest.mark.parametrize("nothing", [0.0, torch.tensor(0.0), torch.zeros(1)])
def test_a_task_without_labels_says_what_to_give(nothing):
    """mmpretrain#1426, graphium#413"""
    model, x = Net(), inputs(1)
    optimizer, losses = summed(sgd(model)), losses_of(model, x[0])
    with pytest.raises((TypeError, ValueError), match=r"'b' .* leave the task out, or give"):
        optimizer.backward({**losses, "b": nothing})
    optimizer.backward({**losses, "b": None})
    assert off(gradients(model), plain(Net(), x, {"a": 1.0, "b": 0.0})) < ROUNDING


@pytest.mark.parametrize("method", [Sum(), GCond(), GradNorm()])
def test_labels_that_are_all_ignored(method):
    """The loss is NaN, its gradient zero. NVIDIA-NeMo/Automodel#3797"""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 6), torch.randn(8, 4)
    optimizer = GCondFused(sgd(model), TASKS, method=method)
    for label in (0, -100, 0):
        y, before = model(x), flat(model.parameters()).clone()
        labels = torch.full((8,), label)
        wanted = torch.autograd.grad(0.5 * y.square().mean(), model.weight, retain_graph=True)[0]
        optimizer.backward({"a": functional.cross_entropy(y, labels), "b": y.square().mean()})
        if label < 0:
            assert off([model.weight.grad], [wanted]) < 0.01  # GradNorm's weight has moved
        optimizer.step()
        assert not optimizer.report().skipped
        assert not torch.equal(flat(model.parameters()), before)


def test_means_over_different_numbers_of_tokens():
    """huggingface/transformers#24725: the mean over all tokens of a window."""
    torch.manual_seed(0)
    model, x, steps = nn.Linear(4, 6), torch.randn(3, 8, 4), 3
    labels = torch.randint(0, 6, (3, 8))
    labels[0, 2:], labels[1, 5:] = -100, -100
    tokens = (labels != -100).sum()
    optimizer = summed(sgd(model), accumulation_steps=steps)
    for batch, target in zip(x, labels, strict=True):
        y = model(batch)
        loss = functional.cross_entropy(y, target, reduction="sum") * steps / tokens
        optimizer.backward({"a": loss, "b": y.square().mean()})
    y = model(x.view(-1, 4))
    total = functional.cross_entropy(y, labels.view(-1)) + 0.5 * y.square().mean()
    assert off(gradients(model), torch.autograd.grad(total, list(model.parameters()))) < ROUNDING


@pytest.mark.parametrize("detaches", [True, False])
def test_a_recurrent_state_that_is_carried_over(detaches):
    """jlamprou/Infini-Attention#3, norse#130"""
    torch.manual_seed(0)
    cell, x = nn.GRU(4, 2, batch_first=True), torch.randn(2, 3, 5, 4)
    twin, optimizer = copy.deepcopy(cell), summed(sgd(cell), accumulation_steps=2)
    hidden = there = None
    total = 0.0
    for n, batch in enumerate(x):
        y, hidden = cell(batch, hidden)
        losses = {"a": y[..., 0].square().mean(), "b": y[..., 1].mean()}
        if n and not detaches:
            with pytest.raises(RuntimeError, match=r"detach\(\) what is carried"), pytest.warns():
                optimizer.backward(losses)
            return
        optimizer.backward(losses)
        hidden = hidden.detach() if detaches else hidden
        y, there = twin(batch, there)
        there = there.detach()
        total = total + y[..., 0].square().mean() / 2 + y[..., 1].mean() / 4
    wanted = torch.autograd.grad(total, list(twin.parameters()))
    assert off(gradients(cell), wanted) < ROUNDING


def test_a_gradient_penalty():
    """caogang/wgan-gp#21"""
    torch.manual_seed(0)
    critic, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(16, 4)
    twin = copy.deepcopy(critic)

    def losses(model):
        at = x.clone().requires_grad_()
        y = model(at)
        (slope,) = torch.autograd.grad(y.sum(), at, create_graph=True)
        return {"a": y.mean(), "b": (slope.norm(dim=1) - 1).square().mean()}

    summed(sgd(critic)).backward(losses(critic))
    there = losses(twin)
    wanted = torch.autograd.grad(there["a"] + 0.5 * there["b"], list(twin.parameters())[:-1])
    assert off(gradients(critic)[:-1], wanted) < ROUNDING


def test_an_inner_loop_that_is_differentiated():
    """MAML, by functional_call. dragen1860/MAML-Pytorch#32"""
    x = inputs(2)

    def losses(model, parameters, batch):
        outputs = torch.func.functional_call(model, parameters, (batch,))
        return {t: (y - k).square().mean() for k, (t, y) in enumerate(outputs.items())}

    def outer(model):
        start = dict(model.named_parameters())
        inner = sum(losses(model, start, x[0]).values())
        slopes = torch.autograd.grad(inner, list(start.values()), create_graph=True)
        fast = {k: p - 0.1 * g for (k, p), g in zip(start.items(), slopes, strict=True)}
        return losses(model, fast, x[1])

    model, twin = Net(), Net()
    summed(sgd(model)).backward(outer(model))
    there = outer(twin)
    wanted = torch.autograd.grad(there["a"] + 0.5 * there["b"], list(twin.parameters()))
    assert off(gradients(model), wanted) < ROUNDING


# .grad.


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_base_whose_zero_grad_takes_no_argument(set_to_none):
    """NVIDIA/apex#1196, NVIDIA/TransformerEngine#1453"""

    class Fused(torch.optim.SGD):
        def zero_grad(self):
            super().zero_grad(set_to_none=set_to_none)

    model, x = Net(), inputs(2)
    optimizer = summed(Fused(model.parameters(), lr=0.1))
    step_by(model, optimizer, x[0])
    for given in (True, False):
        optimizer.zero_grad(set_to_none=given)
    there = model.body.weight.grad
    assert there is None if set_to_none else not there.any()
    optimizer.backward(losses_of(model, x[1]))
    assert off(gradients(model), plain(model, x[1:])) < ROUNDING


@pytest.mark.parametrize("whose", ["optimizer", "model"])
def test_zeros_that_are_left_in_grad_are_nobodys(whose):
    """pytorch/pytorch#83769, ultralytics#22351"""
    model, x = Net(), inputs(3)
    optimizer = summed(sgd(model))
    zero_grad = {"optimizer": optimizer, "model": model}[whose].zero_grad
    sum(losses_of(model, x[0]).values()).backward()
    zero_grad(set_to_none=False)
    step_by(model, optimizer, x[0])
    optimizer.zero_grad(set_to_none=False)
    losses_of(model, x[1])["a"].backward()
    with pytest.raises(RuntimeError, match=r"has a \.grad that this optimizer did not write"):
        optimizer.backward(losses_of(model, x[2]))
    zero_grad(set_to_none=False)
    optimizer.backward(losses_of(model, x[2]))
    assert off(gradients(model), plain(model, x[2:])) < ROUNDING


def test_an_optimizer_that_steps_in_the_backward_pass():
    """pytorch/pytorch#124523, meta-pytorch/torchtune#1833"""
    model, x = Net(), inputs(1)
    optimizer = summed(sgd(model))

    def step_at_once(p):
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_at_once)
    with pytest.raises(RuntimeError, match=r"hook takes \.grad away"), pytest.warns():
        optimizer.backward(losses_of(model, x[0]))


def test_a_hook_that_sees_full_gradients():
    """register_multi_grad_hook and module hooks: once for each task. pytorch/pytorch#38951"""
    model, x, seen = Net(), inputs(1), []
    torch.autograd.graph.register_multi_grad_hook(
        list(model.parameters()), lambda grads: seen.append(sum(g is not None for g in grads))
    )
    summed(sgd(model)).backward(losses_of(model, x[0]))
    assert seen == [4, 4]
    assert off(gradients(model), plain(Net(), x)) < ROUNDING


def test_sharpness_aware_minimization_step_by_step():
    """davda54/sam#3, kozistr/pytorch_optimizer#64"""

    class SAM(torch.optim.SGD):
        @torch.no_grad()
        def first_step(self):
            self.old = [p.clone() for g in self.param_groups for p in g["params"]]
            for p in self.param_groups[0]["params"]:
                p += 0.05 * p.grad

        @torch.no_grad()
        def second_step(self):
            for p, old in zip(self.param_groups[0]["params"], self.old, strict=True):
                p.copy_(old)
            super().step()

        def step(self, closure=None):
            assert closure is not None, "SAM requires closure"

    model, twin, x = Net(), Net(), inputs(6)
    optimizer = summed(SAM(model.parameters(), lr=0.1), accumulation_steps=2)
    reference = SAM(twin.parameters(), lr=0.1)
    for window in x.split(2):
        for call in ("first_step", "second_step"):
            for p, g in zip(twin.parameters(), plain(twin, window), strict=True):
                p.grad = g
            getattr(reference, call)()
            for batch in window:
                optimizer.backward(losses_of(model, batch))
            getattr(optimizer, call)()
            optimizer.drop_window()
    assert off(model.parameters(), twin.parameters()) < ROUNDING
    optimizer.backward(losses_of(model, x[0]))
    optimizer.backward(losses_of(model, x[0]))
    with pytest.raises(RuntimeError, match="SAM requires closure"):
        optimizer.step()


# Bases, and wrappers around.

WRAPPERS = {
    "Lookahead": lambda base: Lookahead(base, k=2),  # kozistr/pytorch_optimizer#237
    "OrthoGrad": OrthoGrad,  # kozistr/pytorch_optimizer#326
    "ScheduleFree": ScheduleFreeWrapper,  # kozistr/pytorch_optimizer#363
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_base_that_is_a_wrapper_itself_trains_and_resumes(name):
    x = inputs(6)

    def trained(make, step):
        model = Net()
        optimizer = make(WRAPPERS[name](adamw(model)))
        for n, batch in enumerate(x):
            if n == 3:  # in the middle of Lookahead's k
                state = through_a_file(optimizer.state_dict())
                model = copy.deepcopy(model)
                optimizer = make(WRAPPERS[name](adamw(model)))
                optimizer.load_state_dict(state)
            if name == "ScheduleFree":
                optimizer.train()
            step(model, optimizer, batch)
        return model

    wanted = trained(lambda base: base, lambda m, o, batch: step_plainly(m, o, batch[None]))
    assert off(trained(summed, step_by).parameters(), wanted.parameters()) < ROUNDING


def test_a_state_of_a_wrapper_is_not_matched_by_names():
    model, x = Net(), inputs(1)
    named = list(model.named_parameters())
    optimizer, other = (summed(Lookahead(sgd_of(n), k=2)) for n in (named, named[::-1]))
    step_by(model, optimizer, x[0])
    with pytest.raises(ValueError, match="in another order"):
        other.load_state_dict(optimizer.state_dict())


def test_a_state_of_a_wrapper_is_not_lost_in_a_distributed_checkpoint():
    """pytorch/pytorch#132628: parts of a state that are not there."""
    model, x = Net(), inputs(1)
    optimizer = summed(Lookahead(sgd(model), k=2))
    step_by(model, optimizer, x[0])
    with pytest.raises(ValueError, match=r"of Lookahead has a form of its own.*torch\.save"):
        TrainingState(model, optimizer)
    state = optimizer.state_dict()
    del state["base"]
    before = optimizer.base.param_groups[0]["lr"]
    state["param_groups"][0]["lr"] = 0.7
    with pytest.raises(ValueError, match="the state of Lookahead"):
        optimizer.load_state_dict(state)
    assert optimizer.base.param_groups[0]["lr"] == before


def sgd_of(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_lookahead_around_trains_and_resumes():
    """lonePatient/lookahead_pytorch#3"""
    model, twin, x = Net(), Net(), inputs(5)
    outer, reference = Lookahead(summed(sgd(model)), k=2), Lookahead(sgd(twin), k=2)
    for batch in x:
        outer.load_state_dict(copy.deepcopy(outer.state_dict()))
        step_plainly(twin, reference, batch[None])
        outer.optimizer.backward(losses_of(model, batch))
        outer.step()
    assert off(model.parameters(), twin.parameters()) < ROUNDING


def test_what_a_base_keeps_beside_the_states_of_parameters_is_saved():
    """kozistr/pytorch_optimizer#329"""

    class Counts(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            self.state["total"] = self.state.get("total", 0) + 1
            self.state["all"]["steps"] = self.steps
            return super().step(closure)

        def state_dict(self):
            return {**super().state_dict(), "steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]
            super().load_state_dict({k: v for k, v in state.items() if k != "steps"})

    model, x = Net(), inputs(2)
    optimizer, other = (summed(Counts(model.parameters(), lr=0.1)) for _ in range(2))
    for batch in x:
        step_by(model, optimizer, batch)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.base.steps == other.base.state["total"] == other.base.state["all"]["steps"] == 2


def test_code_that_moves_the_state_of_any_optimizer():
    """pytorch/pytorch#8741, Lightning-AI/pytorch-lightning#19955"""
    model, x = Net(), inputs(2)
    optimizer = GCondFused(adamw(model), TASKS)
    step_by(model, optimizer, x[0])
    moved = 0
    for state in optimizer.state.values():
        if isinstance(state, dict):
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = value.clone().double()
                    moved += 1
    assert moved == 6 * 3
    states = optimizer.base.state.values()
    assert all(v.dtype == torch.float64 for state in states for v in state.values())
    for p, state in optimizer.state.items():  # as Lightning does
        optimizer.state[p] = type(state)(OrderedDict(state.items()))
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in states)


def test_the_state_of_the_base_is_reset():
    """ReLoRA. axolotl#1414, deepspeedai/DeepSpeed#5615"""
    model, twin, x = Net(), Net(), inputs(4)
    optimizer, reference = summed(adamw(model)), adamw(twin)
    for n, batch in enumerate(x):
        for one, m in ((optimizer, model), (reference, twin)):
            if n == 1:
                one.state[m.body.weight]["exp_avg"].zero_()
                del one.state[m.body.bias]
            if n == 2:
                one.state = defaultdict(dict)
        step_plainly(twin, reference, batch[None])
        step_by(model, optimizer, batch)
    assert off(model.parameters(), twin.parameters()) < ROUNDING


def test_a_base_without_parameters_yet():
    """Lightning-AI/pytorch-lightning#514: groups come as layers are thawed."""
    model, x = Net(), inputs(1)
    optimizer = summed(torch.optim.SGD([{"params": []}], lr=0.1))
    optimizer.add_param_group({"params": model.parameters()})
    optimizer.backward(losses_of(model, x[0]))
    assert off(gradients(model), plain(Net(), x)) < ROUNDING


def test_a_base_step_that_fails_for_want_of_memory_can_be_made_again():
    """pytorch/pytorch#18853"""

    class Fails(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise torch.OutOfMemoryError
            return super().step(closure)

    model, twin, x = Net(), Net(), inputs(1)
    optimizer = summed(Fails(model.parameters(), lr=0.1))
    with pytest.raises(torch.OutOfMemoryError):
        step_by(model, optimizer, x[0])
    optimizer.base.fails = False
    optimizer.step()
    step_plainly(twin, sgd(twin), x)
    assert off(model.parameters(), twin.parameters()) < ROUNDING


# Schedules, averages and surgery.

SCHEDULES = {
    # Lightning-AI/pytorch-lightning#1114
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=8),
    "lambdas": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 1 / (n + 1), lambda n: 0.5**n]),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
    "swa": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedules_of_rates_and_momentum_and_an_average_of_weights(name, tensor):
    """Also of rates that are tensors; weight decay is set by hand. pytorch/pytorch#196286"""

    def made(wrap):
        model = Net()
        groups = [
            {"params": part.parameters(), "lr": torch.tensor(0.1) if tensor else 0.1}
            for part in (model.body, model.heads)
        ]
        optimizer = wrap(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        return model, optimizer, average, SCHEDULES[name](optimizer)

    here, there = made(summed), made(lambda base: base)
    for n, batch in enumerate(inputs(5)):
        step_by(*here[:2], batch)
        step_plainly(*there[:2], batch[None])
        for model, optimizer, average, schedule in (here, there):
            average.update_parameters(model)
            schedule.step(*[1.0] * (name == "plateau"))
            optimizer.param_groups[1]["weight_decay"] = 0.1 * (n % 2)
    assert off(here[2].parameters(), there[2].parameters()) < ROUNDING
    rates = [[float(g["lr"]) for g in one[1].param_groups] for one in (here, there)]
    assert rates[0] == rates[1]
    assert rates[0] != [0.1, 0.1]


def test_pruning_and_parametrizations():
    """Masks come in training. pytorch/pytorch#103001"""
    model, x = Net(), inputs(2)
    parametrizations.weight_norm(model.heads["a"])
    parametrizations.spectral_norm(model.heads["b"]).eval()  # each forward pass changes it else
    optimizer = summed(sgd(model))
    step_by(model, optimizer, x[0])
    prune.l1_unstructured(model.body, "weight", 0.5)
    wanted = plain(model, x[1:])
    optimizer.backward(losses_of(model, x[1]))
    assert off(gradients(model), wanted) < ROUNDING
    pruned = model.body.weight_mask == 0
    assert pruned.any()
    assert (model.body.weight_orig.grad[pruned] == 0).all()


def test_adapters_that_are_added_to_a_frozen_model():
    """Lightning-AI/pytorch-lightning#20194, huggingface/peft#1915"""
    torch.manual_seed(0)
    model, x, adapters = nn.Linear(4, 2), inputs(2), []
    optimizer = summed(adamw(model))

    def losses(batch):
        weight = model.weight + adapters[1] @ adapters[0] if adapters else model.weight
        y = functional.linear(batch, weight, model.bias)
        return {"a": y[:, 0].square().mean(), "b": y[:, 1].mean()}

    optimizer.backward(losses(x[0]))
    optimizer.step()
    model.weight.requires_grad_(False)
    adapters += [nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(2, 2))]
    optimizer.add_param_group({"params": adapters, "lr": 0.1})
    there, trained = losses(x[1]), [model.bias, *adapters]
    wanted = torch.autograd.grad(there["a"] + 0.5 * there["b"], trained)
    before = model.weight.clone()
    optimizer.backward(losses(x[1]))
    assert off([p.grad for p in trained], wanted) < ROUNDING
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert adapters[1].any()


# Where it runs.


@pytest.mark.parametrize("method", [GCond(), PCGrad()])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_a_users_default_device_changes_nothing(method, granularity):
    """deepmodeling/deepmd-kit#3307"""
    results = []
    for device in (None, "meta"):
        model, x = Net(), inputs(3)
        torch.set_default_device(device)
        try:
            optimizer = GCondFused(
                sgd(model), TASKS, method=method, granularity=granularity, momentum=0.5
            )
            for batch in x:
                step_by(model, optimizer, batch)
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.advise()
        finally:
            torch.set_default_device(None)
        results.append(flat(model.parameters()))
    assert torch.equal(*results)


def test_threads_of_their_own():
    """pytorch/pytorch#8149"""

    def train(model, seed):
        optimizer = GCondFused(sgd(model), TASKS)
        for batch in inputs(4, seed):
            step_by(model, optimizer, batch)

    models = {(how, seed): Net() for how in ("thread", "alone") for seed in (1, 2)}
    threads = [threading.Thread(target=train, args=(models["thread", n], n)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        train(models["alone", seed], seed)
    results = {key: flat(model.parameters()) for key, model in models.items()}
    assert torch.equal(results["thread", 1], results["alone", 1])
    assert torch.equal(results["thread", 2], results["alone", 2])
    assert not torch.equal(results["thread", 1], results["thread", 2])


def test_a_run_goes_on_with_another_number_of_accumulation_steps():
    """Lightning-AI/pytorch-lightning#5334"""
    model, x = Net(), inputs(5)
    optimizer = summed(sgd(model), accumulation_steps=1)
    step_by(model, optimizer, x[0])
    optimizer.zero_grad()
    other = summed(sgd(model), accumulation_steps=4)
    other.load_state_dict(optimizer.state_dict())
    wanted = plain(model, x[1:])
    assert [other.backward(losses_of(model, batch)) for batch in x[1:]] == [False] * 3 + [True]
    assert off(gradients(model), wanted) < ROUNDING
