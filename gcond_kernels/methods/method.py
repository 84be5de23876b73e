"""What a method is: inner products of the task gradients come in, one weight per task comes out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.methods.solvers import FLOAT32_ROUNDING, FLOAT64_ROUNDING, identity
from gcond_kernels.ops.contexts import fixed_precision, users_code
from gcond_kernels.ops.launch_tables import HostFlag

State: TypeAlias = dict[str, Tensor]


class Known(NamedTuple):
    """What a method is told beside the Gramian.

    Attributes:
        rounding: among gradients at length 1, an eigenvalue below it is rounding.
        losses: [K] float64, the mean loss of each task since the last step, NaN where there was
            none; None unless the method needs them.
        tasks: the names of the K tasks, for what is said to the user; None where they have none.
    """

    rounding: float = FLOAT32_ROUNDING
    losses: Tensor | None = None
    tasks: Sequence[str] | None = None


class Method(ABC):
    """A method that weighs the tasks by their Gramian.

    `method(S)` are the weights of a Gramian S [K, K] of any floating type, from a fresh state:
    the resolved gradient is Σ_k w_k ĝ_k. A float64 S is taken as exact, any other as sums in
    float32, of which gradients that depend on each other leave some rounding; so are those of
    GCondFused. A batch [..., K, K] is weighed entry by entry, but where one entry is not finite all
    weights are 0. All of it stays on the device of S, and nothing here waits for it. A task without
    a gradient (S_kk = 0; also where squares leave float32, below some 1e-22) takes no part: the
    others are weighed as if it were not there, and its weight is 0.

    A method of your own with a state subclasses this: `new_state` makes small tensors of any shape,
    `weights` reads and changes them in place. They are saved with the optimizer, and are as before
    where a step is skipped, as it is where a weight is not finite; other attributes are its options
    (a frozen dataclass shows them, and ranks compare them). With granularity="tensor" all Gramians
    come in one call, [T, K, K], and each has a state of its own but for what `shared_state` names.

    Attributes:
        needs_losses: whether the losses are to be known, not only their gradients.
        shared_state: which entries of the state a batch has in common; of the others each Gramian
            has its own.
        parameters: names of the parameters, or of modules, whose gradients alone the method looks
            at; None is all that tasks share.
        thresholds: cosines by which reports tell zones of conflict apart.
    """

    needs_losses: ClassVar[bool] = False
    shared_state: ClassVar[frozenset[str]] = frozenset()
    parameters: tuple[str, ...] | None = None
    thresholds: tuple[float, float, float] = (-0.8, -0.5, 0.0)

    def __repr__(self) -> str:
        # Without an address: ranks compare it. (A dataclass has one of its own, with its options.)
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__qualname__}({options})"

    @property
    def needs_history(self) -> bool:
        """Whether last step's gradients are kept: 2 bytes per parameter and task."""
        return False

    def new_state(self, tasks: int, device: torch.device) -> State:
        """The state before the first step: small tensors on `device`."""
        return {}

    @abstractmethod
    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """The weights [..., K] of finite Gramians [..., K, K], float64.

        Args:
            gramian: S_ij = ĝ_i · ĝ_j.
            state: a copy, to be changed in place; it is dropped where the step is.
            known: what else there is to go by.
        """

    @fixed_precision
    def __call__(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """The weights [..., K] of Gramians [..., K, K], as in a first step.

        Args:
            gramian: S.
            losses: [K], for a method that needs them.

        Raises:
            ValueError: the Gramian is not square, or not of a floating type, or the losses are
                missing or not one for each task.
            TypeError: of GradDrop, which has no weights.
        """
        check_gramian(self, gramian)
        if losses is not None:
            losses = torch.as_tensor(losses, dtype=torch.float64, device=gramian.device).detach()
            if losses.shape != gramian.shape[-1:]:
                raise ValueError(
                    f"losses must be one for each of the {gramian.shape[-1]} tasks, not "
                    f"{list(losses.shape)}"
                )
        S = gramian.detach().double().contiguous()
        if S.dim() > 3:
            S = S.flatten(0, -3)
        state = fresh_state(self, S.shape[-1], S.shape[:-2], S.device)
        exact = gramian.dtype == torch.float64
        known = Known(
            FLOAT64_ROUNDING if exact else FLOAT32_ROUNDING,
            losses,
        )
        weights = self.resolve(S, None, S.new_ones(S.shape[-1]), state, known=known).weights
        weights = torch.where(S.diagonal(dim1=-2, dim2=-1) > 0.0, weights, 0.0)
        return weights.view(gramian.shape[:-1]).to(gramian.dtype)

    @fixed_precision
    def resolve(
        self,
        gramian: Tensor,
        cross: Tensor | None,
        scale: Tensor,
        state: State,
        backend: str = "auto",
        known: Known | None = None,
        chosen: Tensor | None = None,
    ) -> ops.Arbitration:
        """Weighs the tasks; where that is not possible with finite numbers, nothing has changed.

        Args:
            gramian: [..., K, K] float64.
            cross: not read.
            scale: not read; where it is 0 the Gramian is.
            state: changed in place.
            backend: not read: these are operations of torch.
            known: what else there is to go by; None is a Gramian of float32 gradients.
            chosen: the Gramian over `parameters`, where there are some.
        """
        finite = gramian.isfinite().all()
        present = gramian.diagonal(dim1=-2, dim2=-1) > 0.0
        # Solvers are not to be shown what is not finite.
        S = torch.where(finite, gramian if chosen is None else chosen, identity(gramian))
        known = known or Known()
        if known.losses is not None:
            known = known._replace(losses=torch.where(finite, known.losses, math.nan))
        after = {name: value.clone() for name, value in state.items()}
        with users_code(S.device):
            weights = self.weights(S, after, known)
        if not isinstance(weights, Tensor) or weights.shape != S.shape[:-1]:
            said = list(weights.shape) if isinstance(weights, Tensor) else repr(weights)
            raise ValueError(
                f"{type(self).__name__}.weights must return one weight for each task, a tensor "
                f"{list(S.shape[:-1])}, not {said}"
            )
        weights = torch.where(present, weights.detach().to(S), 0.0)
        finite = finite & weights.isfinite().all()
        for name, value in state.items():
            value.copy_(torch.where(finite, after[name], value))
        none = S.new_empty(0)
        return ops.Arbitration(
            torch.where(finite, weights, 0.0), none.view(0, 0), none.view(0, 5), finite
        )


class PositiveLosses:
    """Tells of losses that are not positive, for a method that divides by them.

    On a CPU at once. A GPU is not waited for: there the step is to be skipped, and a later call
    tells.
    """

    def __init__(self) -> None:
        self._flag = HostFlag()
        self._noted: tuple[Tensor, Sequence[str] | None] | None = None

    def __reduce__(self) -> tuple[type[PositiveLosses], tuple[()]]:
        return PositiveLosses, ()

    def check(self, method: object, known: Known, ignored: Tensor) -> Tensor:
        """Return whether a loss is not positive, [] bool.

        Args:
            method: is named in the error.
            known: its losses are looked at; what is not finite is no loss.
            ignored: [K] bool, tasks whose loss may be anything.

        Raises:
            ValueError: one is not, or was not in a call before, as far as the host knows. Raised
                once: the losses after it are looked at anew.
        """
        self._raise_if_known(method)
        assert known.losses is not None
        wrong = known.losses.isfinite() & (known.losses <= 0.0) & ~ignored
        at_fault = wrong.any()
        if self._flag.note(at_fault):
            self._noted = (torch.where(wrong, known.losses, math.nan), known.tasks)
        self._raise_if_known(method)
        return at_fault

    def _raise_if_known(self, method: object) -> None:
        if not self._flag.known or self._noted is None:
            return
        losses, tasks = self._noted
        self._flag, self._noted = HostFlag(), None
        said = [
            f"the loss of task {k if tasks is None else repr(tasks[k])} is {loss:g}"
            for k, loss in enumerate(losses.tolist())
            if not math.isnan(loss)
        ]
        raise ValueError(
            f"{type(method).__name__} divides by losses, which must be positive, but "
            f"{' and '.join(said)}. That step changed nothing. Add a constant to the loss that "
            "keeps it above 0, take exp() of it, or choose another method"
        )


class Function(Method):
    """A user's own method: a function from S [K, K] to w [K]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __repr__(self) -> str:
        # Without an address, which is another in every process.
        function = self.function
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"{function.__module__}.{name}"

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """What the function says, of one Gramian after another."""
        K = gramian.shape[-1]
        one_by_one = [self._of_one(S, K) for S in gramian.reshape(-1, K, K)]
        if gramian.dim() == 2:
            return one_by_one[0]
        return torch.stack(one_by_one).view(gramian.shape[:-1])

    def _of_one(self, gramian: Tensor, tasks: int) -> Tensor:
        weights = self.function(gramian)
        if not isinstance(weights, Tensor) or weights.shape != (tasks,):
            said = list(weights.shape) if isinstance(weights, Tensor) else repr(weights)
            raise ValueError(
                f"method {self!r} must return one weight for each of the {tasks} tasks, a tensor "
                f"[{tasks}], not {said}"
            )
        return weights.detach().to(gramian)


def refuse_assignment(method: object, name: str, value: object) -> None:
    """Raise an error for an assignment to an option of a method, which says what to do."""
    cls = type(method).__name__
    raise FrozenInstanceError(
        f"{cls}.{name} cannot be assigned, for a method may serve several optimizers: assign a "
        f"method, optimizer.method = {cls}({name}={value!r}), which holds from the next window on"
    )


def check_gramian(method: object, gramian: object) -> None:
    """Raises a ValueError where a Gramian is none."""
    if isinstance(gramian, Tensor) and gramian.is_floating_point():
        shape = gramian.shape[-2:]
        if len(shape) == 2 and shape[0] == shape[1] > 0:
            return
    said = f"{list(gramian.shape)} {gramian.dtype}" if isinstance(gramian, Tensor) else gramian
    raise ValueError(
        f"{type(method).__name__} takes a Gramian [K, K] of inner products of the tasks' "
        f"gradients, a tensor of a floating type, not {said}"
    )


@fixed_precision
def fresh_state(method: Method, tasks: int, batch: tuple[int, ...], device: torch.device) -> State:
    """The state of a method before the first step, for a batch of Gramians of this shape."""
    return {
        name: value if name in method.shared_state else value.expand((*batch, *value.shape)).clone()
        for name, value in method.new_state(tasks, device).items()
    }


def check_number(method: object, option: str, value: Any, low: float, high: float) -> None:
    """Raises a ValueError where an option is not a number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or math.isinf(value):
        bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f"of {low:g} or more"
        raise ValueError(
            f"{type(method).__name__}: {option} must be a number {bounds}, not {value!r}"
        )


def check_seed(method: object, seed: object) -> None:
    """Raises a ValueError where a seed is not a whole number of 64 bits."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(
            f"{type(method).__name__}: seed must be a whole number of 64 bits, not {seed!r}"
        )
