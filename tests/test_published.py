"""The adapter to the published code, with a stand-in of the same names that only sums."""

import sys

import pytest
import torch
from torch import nn

from bench.published import PublishedResolution, PublishedTraining, load

# Momentum and the number of steps are its state, the history is last step's sum in every task.
STAND_IN = """
import torch


class GradientConductor:
    def __init__(
        self, model, loss_fns, lambdas, accumulation_steps, *,
        momentum_beta=0.85, stochastic_accumulation=True,
    ):
        self.model, self.loss_fns, self.lambdas = model, loss_fns, lambdas
        self.micro_batches = accumulation_steps
        self.beta, self.stochastic = momentum_beta, stochastic_accumulation
        self.parameters = list(model.parameters())
        self.accumulators = {task: self.zeros() for task in loss_fns}
        self.prev_accumulators = {task: self.zeros() for task in loss_fns}
        self.momentum, self.steps = self.zeros(), 0
        self.norm_moving_averages = dict.fromkeys(loss_fns, 1.0)

    def zeros(self):
        return [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    def _project(self):
        for task, parts in self.accumulators.items():
            self.norm_moving_averages[task] += float(sum(part.sum() for part in parts))
        sums = [sum(parts) for parts in zip(*self.accumulators.values())]
        for parts in self.accumulators.values():
            for part, total in zip(parts, sums):
                part.copy_(total)
        return sums, {}

    def _momentum_update(self, resolved):
        self.steps += 1
        for m, g in zip(self.momentum, resolved):
            m.mul_(self.beta).add_(g, alpha=1 - self.beta)

    def _write_to_model(self):
        for p, m in zip(self.parameters, self.momentum):
            p.grad = m / (1 - self.beta**self.steps)

    def step(self, data_provider):
        assert all(p.grad is None for p in self.parameters)
        share = len(self.loss_fns) if self.stochastic else 1
        blocks = [[task] for task in self.loss_fns] if self.stochastic else [list(self.loss_fns)]
        self.accumulators = {task: self.zeros() for task in self.loss_fns}
        for block in blocks:
            for _ in range(self.micro_batches // share):
                x, y = data_provider()
                for task in block:
                    loss = self.lambdas[task] * self.loss_fns[task](self.model(x), y)
                    gradients = torch.autograd.grad(loss, self.parameters)
                    for a, g in zip(self.accumulators[task], gradients):
                        a += g * share / self.micro_batches
        with torch.no_grad():
            self._momentum_update(self._project()[0])
            self._write_to_model()

    def state_dict(self):
        return {
            "momentum": self.momentum, "prev_accumulators": self.prev_accumulators,
            "norm_moving_averages": self.norm_moving_averages, "projection_history": [],
            "_step_idx": self.steps,
        }

    def load_state_dict(self, state):
        for mine, theirs in zip(self.momentum, state["momentum"]):
            mine.copy_(theirs)
        for task, parts in state["prev_accumulators"].items():
            for mine, theirs in zip(self.prev_accumulators[task], parts):
                mine.copy_(theirs)
        self.norm_moving_averages = state["norm_moving_averages"]
        self.steps = state["_step_idx"]
"""

ROWS = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, -30.0]])
SIZES = [1, 2]


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "grad_conductor.py"
    path.write_text(STAND_IN)
    return load(path)


def test_loading_leaves_nothing_behind(tmp_path, module):
    assert [path.name for path in tmp_path.iterdir()] == ["grad_conductor.py"]
    assert "grad_conductor" not in sys.modules
    assert module.GradientConductor.__module__ == "grad_conductor"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "cannot be read: No such file"),
        ("def", "does not run: SyntaxError"),
        ("import no_such_module_at_all", "does not run: ModuleNotFoundError.*no_such_module"),
        ("raise SystemExit(3)", "does not run: SystemExit: 3"),
        ("conductor = 1", "has no class GradientConductor"),
        (STAND_IN.replace("def _project", "def project"), "has no GradientConductor._project;"),
        (STAND_IN.replace("momentum_beta", "beta"), "has no option momentum_beta of"),
    ],
)
def test_what_is_not_the_published_code_is_named(tmp_path, text, what):
    path = tmp_path / "other.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: {what}"):
        load(path)


def test_a_resolution_starts_from_the_task_gradients(module):
    resolution = PublishedResolution(module, SIZES, ROWS, momentum=0.5)
    resolution.fill()
    assert resolution.outputs == [None, None]
    resolution.run()
    assert [g.tolist() for g in resolution.outputs] == [[11.0], [22.0, -27.0]]


def test_a_resolution_has_one_earlier_step_however_often_it_is_filled(module):
    resolution = PublishedResolution(module, SIZES, ROWS, momentum=0.5)
    conductor = resolution._conductor
    for _ in range(3):
        resolution.fill()
        assert conductor.steps == 1
        assert conductor.norm_moving_averages == {"task 0": 7.0, "task 1": 1.0}
        assert [m.tolist() for m in conductor.momentum] == [[5.5], [11.0, -13.5]]
        for task, row in zip(("task 0", "task 1"), ROWS, strict=True):
            assert torch.equal(torch.cat(conductor.accumulators[task]), row)
            history = torch.cat(conductor.prev_accumulators[task])
            assert torch.equal(history, ROWS.sum(0)), "as resolved, not as accumulated"
        resolution.run()
        assert conductor.steps == 2


@pytest.mark.parametrize("mode", ["exact", "stochastic"])
def test_a_window_is_one_step_of_the_base_optimizer(module, mode):
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = {
        "a": (lambda out, y: out.sum() + y.sum(), 1.0),
        "b": (lambda out, _: 3.0 * out.sum(), 2.0),
    }
    training = PublishedTraining(module, model, losses, base, 2, mode)
    batches = [
        (torch.tensor([[1.0, 0.0]]), torch.zeros(1)),
        (torch.tensor([[0.0, 1.0]]), torch.zeros(1)),
    ]
    training.window(batches)
    # Weight 2 times 3 for b; a mean over both micro-batches, or the first for a, the second for b.
    gradient = [3.5, 3.5] if mode == "exact" else [1.0, 6.0]
    torch.testing.assert_close(model.weight.grad, torch.tensor([gradient]))
    torch.testing.assert_close(model.weight, 1.0 - 0.5 * torch.tensor([gradient]))
    training.window(batches)  # the stand-in asks for cleared gradients
    with pytest.raises(ValueError, match="1 micro-batches, but the window has 2"):
        training.window(batches[:1])


def test_nothing_is_printed_and_nothing_global_is_changed(module, capfd):
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
    resolution = PublishedResolution(module, SIZES, ROWS)
    resolution.fill()
    resolution.run()
    random, *others = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
    assert torch.equal(random, before[0])
    assert tuple(others) == before[1:]
    assert capfd.readouterr() == ("", "")
