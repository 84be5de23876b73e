"""Random configurations of GCondFused, each driven through some steps beside the reference."""

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gcond_kernels import GCond, GCondFused, LionLars
from tests.helpers.models import same, through_a_file
from tests.helpers.naive_training import NaiveTraining, Outcome

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(), (1,), (3,), (0,), (2, 3), (4, 1, 2), (33,), (2, 3, 2, 2), (5, 7), (65,)]
THRESHOLDS = [
    (-0.8, -0.5, 0.0),
    (-0.8, -0.5, -0.001),
    (-0.9, -0.3, -0.1),
    (-0.5, -0.5, -0.5),
    (-0.6, -0.6, 0.0),
    (-0.7, -0.2, -0.2),
    (-0.4, 0.1, 0.3),
    (-1.0, -1.0, -1.0),
]
Moment = tuple[int, int]  # a step, and a micro-batch of it


@dataclass(frozen=True)
class Parameter:
    """One parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype | None  # of its gradient, where that is another
    layout: str  # "plain", "channels_last" or "gaps"
    exponent: int  # its gradients have the size 2^exponent, beside those of others

    @property
    def gradient_dtype(self) -> torch.dtype:
        return self.grad_dtype or self.dtype

    def make(self, values: np.random.Generator) -> nn.Parameter:
        data = torch.from_numpy(np.asarray(values.normal(size=self.shape))).to(self.dtype)
        if self.layout == "channels_last":
            data = data.to(memory_format=torch.channels_last)
        elif self.layout == "gaps":
            data = torch.stack([data, data], dim=-1)[..., 0]
        parameter = nn.Parameter(data)
        if self.grad_dtype is not None:
            parameter.grad_dtype = self.grad_dtype
        return parameter


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """All that is drawn. Moments are None where the thing never happens."""

    seed: int
    steps: int
    weights: tuple[float, ...]
    accumulation_steps: int
    mode: str
    method: GCond
    momentum: float
    update: LionLars | None
    max_norm: float | None
    accumulator_dtype: torch.dtype
    bucket_bytes: int
    on_nonfinite: str
    scaler: tuple[float, int] | None  # init_scale, growth_interval
    parameters: tuple[Parameter, ...]
    uses: tuple[frozenset[int], ...]  # of each task: the parameters in its loss
    integers: bool  # gradients that bfloat16 holds exactly, and their sums too
    exponent: int  # gradients have the size 2^exponent
    task_exponents: tuple[int, ...]
    pull: float  # how far the tasks are pulled apart
    opposite: float | None  # the second task's gradient is the first's, times -1, and so much noise
    losses: str
    faults: float  # how often a task's gradient holds a NaN or an infinity
    short: float  # how often a window ends early
    gone: float  # how often a micro-batch leaves a parameter out
    absent: float  # how often a micro-batch has nothing for a task
    lost: float  # how often a window is dropped, or fails, before one that is not
    late: Moment | None  # when the last parameter is added
    frozen: tuple[Moment, Moment] | None  # from when to when parameter 1 is frozen
    reload: Moment | None  # when state is saved, and loaded into a new optimizer
    weight_decay: float
    recorder_capacity: int

    def __str__(self) -> str:
        return "\n".join(f"  {f.name} = {getattr(self, f.name)}" for f in fields(self))

    @property
    def size(self) -> float:
        """About the norm of a task's gradient."""
        return (
            2.0**self.exponent * (10.0 if self.integers else 1.0) * max(1, sum(self.sizes)) ** 0.5
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(p.shape) for p in self.parameters)

    @property
    def halves(self) -> tuple[bool, ...]:
        """Whose `.grad` is float16."""
        return tuple(p.gradient_dtype == F16 for p in self.parameters)


def draw(seed: int) -> Configuration:
    r = random.Random(seed)
    K = r.choice([1, 2, 2, 2, 3, 3, 3, 4, 4, 5])
    mode = r.choice(["exact", "exact", "stochastic"])
    A = r.randint(1, 6) if mode == "exact" else r.randint(K, 6)
    weights = [r.choice([1.0, 1.0, 0.5, 0.3, 2.0, 0.0]) for _ in range(K)]
    weights[0] = weights[0] if any(weights) else 0.7
    storage = [r.choice([torch.float32, torch.float32, torch.bfloat16]) for _ in range(2)]
    if torch.bfloat16 in storage:  # what is accumulated is a multiple of λ / A: of powers of two
        A = {3: 2, 5: 4, 6: 4}.get(A, A) if mode == "exact" else min(A, 2 * K)
        weights = [{0.3: 0.25, 0.7: 0.5}.get(weight, weight) for weight in weights]
    parameters = draw_parameters(r)
    half = any(torch.float16 in (p.dtype, p.grad_dtype) for p in parameters)
    exponent = r.choice([r.randint(-8, 0)] * 2 + [12]) if half else r.randint(-20, 20)
    integers = torch.bfloat16 in storage or r.random() < 0.3
    options = draw_options(r, 2.0**exponent)
    if half and exponent > 0:  # SGD adds it to the gradient, which may leave float16 by that
        options["weight_decay"] = 0.0
    return Configuration(
        seed=seed,
        weights=tuple(weights),
        accumulation_steps=A,
        mode=mode,
        parameters=parameters,
        uses=draw_uses(r, K, len(parameters)),
        accumulator_dtype=storage[0],
        exponent=exponent,
        integers=integers,
        task_exponents=tuple(r.randint(-3, 3) for _ in range(K)),
        pull=r.uniform(0.2, 1.2),
        opposite=r.choice([None] * 6 + [0.0, 0.003, 0.03]) if K > 1 else None,
        method=draw_method(r, 2.0**exponent * (10.0 if integers else 1.0), storage[1]),
        **options,
        **draw_events(r, A, len(parameters)),
    )


def draw_options(r: random.Random, size: float) -> dict[str, Any]:
    """Other options of GCondFused, and of the optimizer in it."""
    update = r.choice([None, None, LionLars()])
    on_nonfinite = r.choice(["skip", "drop_task", "raise"])
    # The two do not go together: a scaler finds its scale by overflows.
    scaled = on_nonfinite != "raise" and r.random() < 0.4
    clipped = update is None and r.random() < 0.4
    return {
        "momentum": r.choice([0.0, 0.5, 0.9]),
        "update": update,
        "max_norm": size * r.choice([1.0, 50.0]) if clipped else None,
        "bucket_bytes": r.choice([1, 100, 32 << 20]),
        "on_nonfinite": on_nonfinite,
        "scaler": (2.0 ** r.randint(4, 16), r.randint(1, 3)) if scaled else None,
        "recorder_capacity": r.choice([0, 2, 1000]),
        "weight_decay": r.choice([0.0, 0.1]),
    }


def draw_events(r: random.Random, accumulation_steps: int, parameters: int) -> dict[str, Any]:
    """How long it trains, and what happens on the way."""
    steps = min(20, 2 + int(r.expovariate(0.25)))

    def moment() -> Moment:
        return r.randrange(steps), r.randrange(accumulation_steps)

    def sometimes(chance: float, value):
        return value if r.random() < chance else None

    several = parameters > 1
    return {
        "steps": steps,
        "losses": r.choice(["tensors", "functions", "mixed"]),
        "faults": sometimes(0.4, 0.15) or 0.0,
        "short": sometimes(0.4, 0.3) or 0.0,
        "gone": sometimes(0.5, 0.2) or 0.0,
        "absent": sometimes(0.4, 0.3) or 0.0,
        "lost": sometimes(0.3, 0.3) or 0.0,
        "late": sometimes(0.3 * several, moment()),
        "frozen": sometimes(0.3 * several, tuple(sorted([moment(), moment()]))),
        "reload": sometimes(0.3, moment()),
    }


def draw_parameters(r: random.Random) -> tuple[Parameter, ...]:
    dtypes = r.choice([[F32], [F32], [BF16], [F16], [F64], [F32, BF16], [F32, BF16, F16, F64]])
    shapes = [r.choice(SHAPES) for _ in range(r.randint(1, 4))]
    if r.random() < 0.95:
        # With as few elements as tasks every cosine is nearly ±1, and rounding decides all.
        shapes[0] = r.choice([(33,), (5, 7), (65,), (2, 3, 2, 2)])
    parameters = []
    for shape in shapes:
        layouts = ["plain", "plain", "gaps", *["channels_last"] * (len(shape) == 4)]
        dtype = r.choice(dtypes)
        grad_dtype = r.choice([None] * 5 + [F32]) if dtype != F32 else r.choice([None] * 9 + [BF16])
        exponent = r.choice([0, 0, 0, -2, 2])
        parameters.append(Parameter(shape, dtype, grad_dtype, r.choice(layouts), exponent))
    return tuple(parameters)


def draw_uses(r: random.Random, tasks: int, parameters: int) -> tuple[frozenset[int], ...]:
    """Parameter 0 is in most losses, so that the tasks have something in common."""
    return tuple(
        frozenset(i for i in range(parameters) if r.random() < (0.95 if i == 0 else 0.7))
        for _ in range(tasks)
    )


def draw_method(r: random.Random, size: float, history_dtype: torch.dtype) -> GCond:
    thresholds = r.choice([THRESHOLDS[0], r.choice(THRESHOLDS)])
    return GCond(
        thresholds=thresholds,
        remap_power=r.choice([0.5, 1.0, 2.0, 3.0]),
        arbitration=r.choice(["smooth", "smooth", "zones"]),
        max_iterations=r.choice([None, None, 0, 1, 3]),
        # Without one, what a projection leaves of a cosine is a conflict where that is below 0.
        tolerance=r.choice([1e-6, 0.0]) if thresholds[2] < 0.0 else 1e-6,
        dominance_window=r.randint(0, 4),
        tie_breaking_weights=r.choice([(0.8, 0.2), (0.8, 0.2), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)]),
        norm_ema_beta=r.choice([0.1, 0.5, 0.95]),
        norm_ema_start=r.choice([None, None, size, 1.0]),
        norm_cap=r.choice([None, None, None, size, 6.0 * size]),
        history=r.choice(["raw", "resolved"]),
        history_dtype=history_dtype,
    )


class Watched(GCondFused):
    """Remembers what there was when a window was resolved."""

    def resolve(self) -> None:
        if not self._window.resolved:
            self.before = kept_of(self)
        super().resolve()


def kept_of(optimizer: GCondFused) -> dict[str, Any]:
    """A copy of what a step that is skipped leaves as it is."""
    state = copy.deepcopy(optimizer.state_dict())
    own = [entry["gcond"] for entry in state["state"].values()]
    for entry in own:
        for name in ("accumulators", "window_tasks"):  # of the window
            entry.pop(name, None)
    for group in state["param_groups"]:
        for name in ("counters", "window"):
            del group["gcond"][name]
    return {"state": state["state"], "param_groups": state["param_groups"]}


class Driver:
    """One configuration, as a user drives it, and the reference beside it."""

    def __init__(self, configuration: Configuration, backend: str) -> None:
        self.c = c = configuration
        self.backend = backend
        self.seen: Counter[str] = Counter()
        self.random = random.Random(c.seed + 1)  # of what happens on the way
        self.values = np.random.default_rng(c.seed)
        self.names = [f"t{k}" for k in range(len(c.weights))]
        self.parameters = [p.make(self.values) for p in c.parameters]
        self.sizes = c.sizes
        self.known = len(self.parameters) - (c.late is not None)  # so many are in the optimizer
        self.scaler = None
        if c.scaler is not None:
            scale, interval = c.scaler
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
            self.growth = 0
        # The first steps change parameters by some percents.
        self.lr = 0.03 / (2.0**c.exponent if c.update is None else 1e-4)
        self.optimizer = self.new_optimizer([self.parameters[: self.known]])
        self.base_vectors = self.values.normal(size=(len(c.weights), sum(self.sizes)))
        self.reference = NaiveTraining(c, c.seed)

    def new_optimizer(self, groups) -> GCondFused:
        c = self.c
        base = torch.optim.SGD(
            [{"params": group} for group in groups],
            lr=self.lr,
            weight_decay=c.weight_decay / self.lr,
        )
        optimizer = Watched(
            base,
            dict(zip(self.names, c.weights, strict=True)),
            accumulation_steps=c.accumulation_steps,
            mode=c.mode,
            method=c.method,
            momentum=c.momentum,
            update=c.update,
            max_norm=c.max_norm,
            accumulator_dtype=c.accumulator_dtype,
            on_nonfinite=c.on_nonfinite,
            grad_scaler=self.scaler,
            backend=self.backend,
        )
        optimizer.recorder.capacity = c.recorder_capacity
        return optimizer

    def run(self) -> Counter[str]:
        """Compares every step; stops where rounding may decide otherwise. What there was to see."""
        for step in range(self.c.steps):
            if self.random.random() < self.c.lost:
                self.lost_window()
            if not self.window(step):
                self.seen["stopped"] += 1
                break
            self.seen["compared"] += 1
        return self.seen

    # A window.

    def window(self, step: int) -> bool:
        """Both step. False where rounding may decide otherwise, after which they part."""
        A = self.c.accumulation_steps
        length = self.random.randint(1, A) if self.random.random() < self.c.short else A
        around = self.around()
        for number in range(length - 1):
            self.happenings((step, number))
            assert not self.optimizer.backward(self.losses(around))
        self.happenings((step, length - 1))
        losses = self.losses(around)
        # What is raised is met by one of the others.
        raising = self.c.on_nonfinite == "raise"
        policy = self.random.choice(["skip", "drop_task"]) if raising else self.c.on_nonfinite
        bad = self.reference.nonfinite()
        norms = [float(p.detach().double().norm()) for p in self.parameters]
        outcome = self.reference.step(policy == "drop_task", norms)
        if outcome is not None and outcome.undecided:
            return False
        raises = raising and outcome is not None and bool(bad or outcome.skipped)
        if length < A:
            assert not self.optimizer.backward(losses)
            if raises:
                self.check_raised(bad, self.random.choice([self.optimizer.resolve, self.step]))
        elif raises:
            self.check_raised(bad, lambda: self.optimizer.backward(losses))
            if self.random.random() < 0.3:  # and again
                self.check_raised(bad, self.random.choice([self.optimizer.resolve, self.step]))
        else:
            assert self.optimizer.backward(losses)
        self.optimizer.on_nonfinite = policy
        self.finish(outcome, bad)
        self.optimizer.on_nonfinite = self.c.on_nonfinite
        return True

    def around(self) -> np.ndarray:
        """What each task goes after in a window."""
        # It stays, so that it resembles its history, but not all of it.
        drift = self.values.normal(size=self.base_vectors.shape)
        around = 0.7 * self.base_vectors + 0.7 * drift
        around -= self.c.pull * around.mean(axis=0) * (len(around) > 1)
        around *= (self.values.random(len(around)) > 0.05)[:, None]  # sometimes a zero gradient
        return around

    def lost_window(self) -> None:
        """A window that is dropped, or in which a backward pass fails: as if it had not been."""
        optimizer = self.optimizer

        def broken():
            raise ArithmeticError

        for _ in range(self.random.randrange(self.c.accumulation_steps)):
            gradients = self.gradients(self.around())
            losses = {}
            for name in optimizer.active_tasks:
                k = self.names.index(name)
                losses[name] = self.loss({i: gradients[k][i] for i in self.used_by(k)})
            optimizer.backward(losses)
        if self.random.random() < 0.5:
            optimizer.drop_window()
        else:
            losses = dict.fromkeys(optimizer.active_tasks, broken)
            with pytest.warns(UserWarning, match="is dropped"), pytest.raises(ArithmeticError):
                optimizer.backward(losses)
        self.seen["lost"] += 1

    def happenings(self, now: Moment) -> None:
        c = self.c
        if now == c.late:
            self.known += 1
            self.optimizer.add_param_group({"params": [self.parameters[-1]]})
        if c.frozen is not None and now in c.frozen:
            self.parameters[1].requires_grad_(now == c.frozen[1])
        if now == c.reload:
            self.reload()
        if self.random.random() < 0.2:  # as is the habit, also inside a window
            self.optimizer.zero_grad(set_to_none=self.random.random() < 0.5)
        if self.scaler is not None and self.random.random() < 0.1:
            self.scaler.scale(torch.ones(()))  # before its first use it has no scale to change
            self.scaler.update(self.scaler.get_scale() * self.random.choice([0.5, 2.0]))

    def reload(self) -> None:
        state = through_a_file(self.optimizer.state_dict())
        self.optimizer.zero_grad()  # what it wrote is somebody else's for the next one
        self.optimizer = self.new_optimizer([g["params"] for g in self.optimizer.param_groups])
        self.optimizer.load_state_dict(state)

    def losses(self, around) -> dict[str, Any]:
        """Of one micro-batch; the reference is told of their gradients."""
        active = self.reference.active()
        assert self.optimizer.active_tasks == tuple(self.names[k] for k in active)
        gradients = self.gradients(around)
        losses = {}
        for number, k in enumerate(active):
            if self.random.random() < self.c.absent:
                if self.c.mode == "stochastic" or self.random.random() < 0.5:
                    losses[self.names[k]] = None
                continue
            parts = self.with_fault({i: gradients[k][i] for i in self.used_by(k)})
            self.reference.add(k, {i: self.as_autograd(k, i, part) for i, part in parts.items()})
            as_function = {"tensors": False, "functions": True, "mixed": number % 2 == 0}
            losses[self.names[k]] = (
                (lambda parts=parts: self.loss(parts))
                if as_function[self.c.losses]
                else self.loss(parts)
            )
        self.reference.position += 1
        return losses

    def gradients(self, around) -> list[list[torch.Tensor]]:
        """Per task and parameter a tensor of the parameter's type."""
        c = self.c
        g = around + 0.5 * (around != 0.0) * self.values.normal(size=around.shape)
        if c.opposite is not None:
            g[1] = c.opposite * self.values.normal(size=g[1].shape) - g[0]
        if c.integers:
            g = np.clip(np.rint(10.0 * g), -42, 42)  # six of them add up to less than 256
        rows = []
        for row, of_task in zip(g, c.task_exponents, strict=True):
            parts = np.split(row, np.cumsum(self.sizes)[:-1])
            rows.append(
                [
                    torch.from_numpy(part * 2.0 ** (c.exponent + of_task + p.exponent))
                    .reshape(p.shape)
                    .to(p.dtype)
                    for part, p in zip(parts, c.parameters, strict=True)
                ]
            )
        return rows

    def used_by(self, task: int) -> list[int]:
        usable = [i for i in range(self.known) if self.parameters[i].requires_grad]
        used = [i for i in usable if i in self.c.uses[task] and self.random.random() >= self.c.gone]
        return used or usable[:1]

    def with_fault(self, parts: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Sometimes with a value that is not finite at the start, in the middle or at the end."""
        places = [i for i, part in parts.items() if part.numel()]
        if not places or self.random.random() >= self.c.faults:
            return parts
        i = self.random.choice(places)
        broken = parts[i].clone()
        place = self.random.choice([0, broken.numel() // 2, broken.numel() - 1])
        broken.view(-1)[place] = self.random.choice([np.nan, np.inf, -np.inf])
        return {**parts, i: broken}

    def loss(self, parts: dict[int, torch.Tensor]) -> torch.Tensor:
        """Has exactly these parts as its gradients."""
        return sum((self.parameters[i] * part).sum().float() for i, part in parts.items())

    def as_autograd(self, task: int, i: int, part: torch.Tensor) -> np.ndarray:
        """The gradient as a backward pass leaves it, a scaled loss included, without the scale.

        The loss is a float32 number, and has been multiplied by λ / A.
        """
        spec, scale = self.c.parameters[i], 1.0
        of_loss = torch.tensor(self.c.weights[task] / self.reference.planned()[task])
        if self.scaler is not None:
            self.scaler.scale(torch.ones(()))
            scale = self.scaler.get_scale()
        part = (of_loss * scale).to(spec.dtype) * part  # float16 may overflow here
        return part.to(spec.gradient_dtype).double().flatten().numpy() / scale

    # A step.

    def finish(self, outcome: Outcome | None, bad: dict[int, list[int]]) -> None:
        """Steps, and compares."""
        before = [p.detach().clone() for p in self.parameters]
        factor = self.change_gradients() if self.random.random() < 0.3 else 1.0
        self.step()
        if outcome is None:
            self.seen["empty"] += 1
            assert all(p.grad is None for p in self.parameters)
            assert all(map(torch.equal, before, self.parameters))
            assert same(self.optimizer.before, kept_of(self.optimizer))
            self.check_scaler(False)
            return
        self.check_scaler(bool(bad) or outcome.skipped)
        self.check_report(outcome, bad)
        self.check_written(outcome, before, factor)
        self.check_history()
        self.seen["conflicts"] += len(outcome.conflicts)
        self.seen["skipped"] += outcome.skipped
        self.seen["beyond float16"] += outcome.skipped and bool(outcome.taking_part)
        self.seen["dropped"] += bool(bad) and not outcome.skipped
        if outcome.skipped:
            same_state = same(self.optimizer.before, kept_of(self.optimizer))
            assert same_state, "a skipped step has changed something"

    def step(self) -> None:
        if self.scaler is not None and self.random.random() < 0.5:
            self.scaler.step(self.optimizer)
        else:
            self.optimizer.step()

    def change_gradients(self) -> float:
        """Sometimes what was written is changed before the step; returns the factor."""
        self.optimizer.resolve()  # the window may be a short one
        factor = self.random.choice([1.0, 0.5])
        for p in self.parameters:
            if p.grad is not None and factor != 1.0:
                p.grad.mul_(factor)
        return factor

    def check_raised(self, bad: dict[int, list[int]], call: Callable[[], object]) -> None:
        with pytest.raises(FloatingPointError) as error:
            call()
        same_state = same(self.optimizer.before, kept_of(self.optimizer))
        assert same_state, "what raised has changed something"
        for k, places in bad.items():
            assert any(f"task {self.names[k]!r}: parameter {i}" in str(error.value) for i in places)
        if not bad:
            assert "the resolved gradient is not finite" in str(error.value)

    def check_scaler(self, overflow: bool) -> None:
        if self.scaler is None:
            return
        before = self.scaler.get_scale()
        self.scaler.update()
        self.growth = 0 if overflow else self.growth + 1
        grows = self.growth == self.c.scaler[1]
        self.growth %= self.c.scaler[1]
        factor = 0.5 if overflow else 2.0 if grows else 1.0
        assert self.scaler.get_scale() == before * factor

    def check_report(self, outcome: Outcome, bad) -> None:
        report, reference, names = self.optimizer.report(), self.reference, self.names
        assert report.step == reference.steps
        assert report.skipped == outcome.skipped
        assert report.skipped_steps == reference.skipped_steps
        assert report.nonfinite_tasks == [names[k] for k in bad]
        assert list(report.nonfinite_steps.values()) == reference.nonfinite_steps
        assert [(*c.tasks, c.winner) for c in report.conflicts] == [
            (names[i], names[j], None if w is None else names[w]) for i, j, w in outcome.conflicts
        ]
        assert report.winners == [names[w] for w in reference.winners]
        averages = np.array(list(report.norm_ema.values()))
        np.testing.assert_allclose(averages, reference.averages, rtol=1e-5)
        weights = np.array(list(report.weights.values()))
        assert (np.abs(weights - outcome.weights) <= outcome.weights_slack).all(), "weights"
        norms = [report.norms[names[k]] for k in outcome.taking_part]
        expected = [np.linalg.norm(reference.vectors[k]) for k in outcome.taking_part]
        np.testing.assert_allclose(norms, expected, rtol=1e-4)

    def check_history(self) -> None:
        """Decisions tell of a wrong history now and then; the saved state does so at once."""
        if not self.c.method.needs_history:
            return
        state = self.optimizer.state_dict()
        method = json.loads(state["param_groups"][0]["gcond"]["method"])
        scales = method["history_scale"][1]  # after the shape
        rounding = 2.0**-21  # the history is exact in its type; sums in float32 are not
        for i, of_parameter in state["state"].items():
            segment = self.reference.segments[i]
            for k, part in enumerate(of_parameter["gcond"]["history"].values()):
                mass, last = self.reference.last_mass[k], self.reference.last[k]
                found = scales[k] * part.double().flatten().numpy()
                off = np.abs(found - last[segment]) > rounding * mass[segment]
                assert not off.any(), f"history of task {k} in parameter {i}"

    def check_written(self, outcome: Outcome, before: list[torch.Tensor], factor: float) -> None:
        for i, (p, spec) in enumerate(zip(self.parameters, self.c.parameters, strict=True)):
            if outcome.written[i] is None:
                assert p.grad is None, f"parameter {i} has a gradient from nowhere"
                assert torch.equal(p, before[i]), f"parameter {i} has changed without a gradient"
                continue
            assert p.grad is not None, f"parameter {i} has no gradient"
            assert p.grad.dtype == spec.gradient_dtype
            expected, slack = factor * outcome.written[i], factor * outcome.slack[i]
            check_close(f"gradient {i}", p.grad, expected, slack)
            old = before[i].double().flatten().numpy()
            if outcome.skipped:
                assert torch.equal(p, before[i]), f"parameter {i} has changed in a skipped step"
                continue
            # SGD rounds the decayed gradient to its type, and the new parameter.
            step = self.lr * expected + self.c.weight_decay * old
            size = np.abs(old) + self.lr * np.abs(expected)
            info = torch.finfo(p.grad.dtype)
            rounding = (2.0 * info.eps + torch.finfo(p.dtype).eps) * size
            rounding += self.lr * info.smallest_normal * info.eps
            check_close(f"parameter {i}", p, old - step, self.lr * slack + rounding)


def check_close(what: str, found: torch.Tensor, expected: np.ndarray, slack: np.ndarray) -> None:
    """Within `slack`, and a rounding to the type of what was found."""
    info = torch.finfo(found.dtype)
    # What leaves the range of float16 is infinite on one side alone.
    values = np.clip(found.detach().double().flatten().numpy(), info.min, info.max)
    expected = np.clip(expected, info.min, info.max)
    bound = slack + 0.51 * info.eps * np.abs(expected) + info.smallest_normal * info.eps
    off = np.abs(values - expected) > bound
    assert not off.any(), (
        f"{what}: {values[off][:4]}, not {expected[off][:4]} ± {bound[off][:4]}, at "
        f"{np.flatnonzero(off)[:4]}"
    )
