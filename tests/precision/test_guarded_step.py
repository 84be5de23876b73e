"""A step that a flag on the device leaves out, and how often that synchronizes with the device."""

import copy

import pytest
import torch
from torch import nn

from gcond_kernels import GCondFused, LionLars, ops
from gcond_kernels.precision import guarded_step
from tests.helpers.as_on_gpu import late_flags, no_reads
from tests.helpers.host_reads import HostReads
from tests.helpers.models import TASKS, batches, flat_parameters, losses_of, model_of, same

YES, NO = torch.tensor(True), torch.tensor(False)

BASES = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.0, 0.9), fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True, amsgrad=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "SGD fused, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
}


STEPS = {"step_if": guarded_step.step_if, "step_or_roll_back": guarded_step.step_or_roll_back}


def with_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("first", [False, True])
def test_a_step_that_is_left_out_changes_nothing(name, step, first):
    model, twin = model_of(), model_of()
    base, other = BASES[name](model.parameters()), BASES[name](twin.parameters())
    wanted = ([NO] if first else []) + [YES, NO, NO, YES, YES]
    for seed, flag in enumerate(wanted):
        with_gradients(model, seed)
        before = flat_parameters(model), copy.deepcopy(base.state_dict()["state"])
        STEPS[step](flag, base)
        if flag:
            with_gradients(twin, seed)
            other.step()
        else:
            assert torch.equal(before[0], flat_parameters(model))
        if not flag and seed:  # in a first step a fused optimizer makes its state, as it starts
            assert same(before[1], base.state_dict()["state"])
        assert torch.equal(flat_parameters(model), flat_parameters(twin))
    assert same(base.state_dict(), other.state_dict())
    assert not hasattr(base, "found_inf")


def test_fused_optimizers_take_the_flag():
    p = list(model_of().parameters())
    assert guarded_step.takes_flag(BASES["AdamW fused"](p))
    assert guarded_step.takes_flag(BASES["SGD fused"](p))
    assert not guarded_step.takes_flag(BASES["AdamW"](p))
    groups = [{"params": p[:1]}, {"params": p[1:], "fused": False}]
    assert not guarded_step.takes_flag(torch.optim.AdamW(groups, lr=0.1, fused=True))
    momentum = BASES["SGD fused, momentum"](p)
    with_gradients(nn.ParameterList(p), 0)
    assert not guarded_step.takes_flag(momentum)  # its first step would leave a buffer unfilled
    momentum.step()
    assert guarded_step.takes_flag(momentum)


def test_capturable_optimizers_are_rolled_back_on_the_device():
    p, cpu = list(model_of().parameters()), torch.device("cpu")
    assert guarded_step.rolls_back_on_device(cpu, torch.optim.AdamW(p, lr=0.1, capturable=True))
    groups = [{"params": p[:1], "capturable": True}, {"params": p[1:]}]
    for base in (torch.optim.AdamW(groups, lr=0.1), BASES["AdamW"](p), BASES["SGD"](p)):
        assert not guarded_step.rolls_back_on_device(cpu, base)


def test_an_error_in_the_step_leaves_no_flag_behind():
    model = model_of()
    base = BASES["AdamW fused"](model.parameters())
    with_gradients(model, 0)
    base.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guarded_step.step_if(YES, base)
    assert not hasattr(base, "found_inf")
    assert not hasattr(base, "grad_scale")


def test_a_first_step_must_not_be_captured(monkeypatch):
    model = model_of()
    with_gradients(model, 0)
    monkeypatch.setattr(guarded_step.tables, "is_capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="SGD makes its state in its first step"):
        guarded_step.step_if(YES, BASES["SGD"](model.parameters()))
    # One without state may.
    guarded_step.step_if(YES, BASES["SGD plain"](model.parameters()))


# How often the host synchronizes with the device.

KERNELS = [b for b in ("triton", "cuda") if ops.unavailable(b, torch.device("cpu")) is None]


def reads_of_a_run(monkeypatch, backend, base_of, **options):
    """Reads in two windows of backward and step, after one that allocates, as on a GPU."""
    flags = late_flags(monkeypatch)
    no_reads(monkeypatch)
    model, x = model_of(), batches(6)
    base = base_of(model.parameters())
    options = {"accumulation_steps": 2, "momentum": 0.5, "backend": backend} | options
    optimizer = GCondFused(base, TASKS, **options)

    def windows(batches):
        for batch in batches:
            losses = losses_of(model, batch)
            if optimizer.backward({t: losses[t] for t in optimizer.active_tasks}):
                optimizer.step()
                if optimizer.grad_scaler is not None:
                    optimizer.grad_scaler.update()

    windows(x[:2])
    for flag in flags:
        flag.done = True
    assert optimizer._resolver.sharing.all_shared
    with HostReads() as reads:
        windows(x[2:])
    assert optimizer.report().step == 3
    return reads.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu checks this by CUDA")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "stochastic"},
        {"on_nonfinite": "drop_task"},
        {"max_norm": 1.0},
        {"update": LionLars()},
        {"grad_scaler": torch.amp.GradScaler("cpu")},
    ],
    ids=lambda options: ",".join(options) or "defaults",  # no addresses: workers compare names
)
def test_backward_and_step_do_not_synchronize(backend, options, monkeypatch):
    # Triton's interpreter reads tensors through NumPy, which a GPU does not.
    found = reads_of_a_run(monkeypatch, backend, BASES["AdamW fused"], **options)
    if backend == "triton":
        found = [name for name in found if name not in ("numpy", "cpu")]
    assert found == []


def test_synchronizations_are_found(monkeypatch):
    reads = reads_of_a_run(monkeypatch, "python", BASES["AdamW fused"])
    assert "tolist" in reads  # the reference arbitrates on the host
    for backend in KERNELS:
        foreach = reads_of_a_run(monkeypatch, backend, lambda p: torch.optim.SGD(p, lr=0.1))
        assert foreach.count("__bool__") == 2  # one a step: SGD has no flag
        assert "tolist" in reads_of_a_run(
            monkeypatch, backend, BASES["AdamW fused"], on_nonfinite="raise"
        )
    with HostReads() as counted:
        value = torch.ones(3).sum()
        value.item(), bool(value > 0), torch.ones(2).tolist(), torch.ones(2).nonzero()
    for name in ("item", "__bool__", "tolist", "nonzero", "_local_scalar_dense"):
        assert name in counted.found
