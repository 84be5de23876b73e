"""What a method is: inner products of the task gradients come in, one weight per task comes out."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.methods import host
from gcond_kernels.methods.checks import check_gramian, check_weights
from gcond_kernels.methods.solvers import FLOAT32_ROUNDING, FLOAT64_ROUNDING, identity
from gcond_kernels.ops.contexts import fixed_precision, users_code
from gcond_kernels.ops.types import Momentum, Rescale, TaskGradients

State: TypeAlias = dict[str, Tensor]


class Known(NamedTuple):
    """Hold what a method is given beside the Gramian.

    Attributes:
        rounding: among normalized gradients, an eigenvalue below it is rounding.
        losses: [K] float64, the mean loss of each task since the last step, NaN where there was
            none; None unless the method needs them.
        tasks: the names of the K tasks, for messages; None where they have none.
    """

    rounding: float = FLOAT32_ROUNDING
    losses: Tensor | None = None
    tasks: Sequence[str] | None = None


class Comparison(NamedTuple):
    """Hold what a resolution is decided from.

    Attributes:
        gramian: S [..., K, K] float64, over the parameters that tasks share.
        cross: X [..., K, K] float64, the products with the history; None without one.
        scale: [K] float64; a task whose scale is 0 takes no part.
        selected: S [K, K] over the method's `parameters` alone; None where it names none.
    """

    gramian: Tensor
    cross: Tensor | None
    scale: Tensor
    selected: Tensor | None = None
    known: Known = Known()
    backend: str | ops.Backend = "auto"


class Destination(NamedTuple):
    """Hold where a resolved gradient is written, and what is done to it on the way.

    Attributes:
        outputs: T tensors of any floating type, without gaps; None where there is no gradient.
        first: place of the accumulators' first element, where they are a shard of longer ones.
    """

    outputs: Sequence[Tensor | None]
    momentum: Momentum | None = None
    rescale: Rescale | None = None
    first: int = 0
    backend: str | ops.Backend = "auto"


class Method(ABC):
    """Weight the tasks by their Gramian: the resolved gradient is Σ_k w_k g_k.

    `method(S)` returns the weights of a Gramian S [K, K] of any floating type, from a fresh state.
    A float64 S is taken as exact, any other as sums in float32 (as GCondFused makes them, but of
    models in float64). A batch [..., K, K] is weighted entry by entry (by methods that look at the
    losses alone, all entries alike), but where one entry is not finite all weights are 0. Nothing
    here synchronizes with a GPU. A task without a gradient (S_kk = 0; also where squares leave
    float32, below some 1e-22) has the weight 0, and the others are weighted as if it were not
    there.

    A method of your own with a state subclasses this: `new_state` makes small tensors of any shape,
    `weights` changes them in place. They are saved with the optimizer, and stay as they were where
    a step is skipped, as it is where a weight is not finite. Other attributes are options (a frozen
    dataclass shows them, and ranks compare them). With granularity="tensor" all Gramians come in
    one call, [T, K, K], and each has a state of its own but for what `shared_state` names.

    Attributes:
        needs_losses: whether it reads the losses, not only their gradients.
        history_dtype: the type in which the last step's gradients are kept, where it needs them.
        shared_state: which entries of the state a batch has in common.
        parameters: names of the parameters, or of modules, whose gradients alone the method
            compares; None is all that tasks share.
        thresholds: cosines by which reports tell zones of conflict apart.
        bounded_weights: whether finite gradients always have finite weights that are bounded.
        adds_magnitudes: whether the result is bounded by the sum of the gradients' magnitudes
            alone, and not by the magnitude of their weighted sum.
        compares_single_task: whether a task that comes alone is compared too.
        follows_loss_weights: whether a task's larger loss weight turns the result to its gradient.
    """

    needs_losses: ClassVar[bool] = False
    history_dtype: torch.dtype = torch.bfloat16
    shared_state: ClassVar[frozenset[str]] = frozenset()
    parameters: tuple[str, ...] | None = None
    thresholds: tuple[float, float, float] = (-0.8, -0.5, 0.0)
    bounded_weights: ClassVar[bool] = False
    adds_magnitudes: ClassVar[bool] = False
    compares_single_task: ClassVar[bool] = False
    follows_loss_weights: ClassVar[bool] = True

    def __repr__(self) -> str:
        # Without an address: ranks compare it. (A dataclass has one of its own, with its options.)
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__qualname__}({options})"

    @property
    def needs_history(self) -> bool:
        """Whether it compares with the last step's gradients: 2 bytes per parameter and task."""
        return False

    @property
    def state_owner(self) -> Method:
        """The method whose state it keeps: itself, unless it is put around another."""
        return self

    @property
    def state_type(self) -> type[Method]:
        """The class whose state it keeps: among methods of one such class a state goes on."""
        return type(self.state_owner)

    def with_thresholds(self, thresholds: tuple[float, float, float]) -> Method:
        """Return the method with other thresholds.

        Raises:
            AttributeError: the method goes by none.
        """
        if not is_dataclass(self) or "thresholds" not in {field.name for field in fields(self)}:
            raise AttributeError(f"{type(self).__name__} has no thresholds to be assigned")
        changed: Method = replace(self, thresholds=thresholds)
        return changed

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return the state before the first step: small tensors on the device."""
        return {}

    @abstractmethod
    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return the weights [..., K] of finite Gramians [..., K, K], float64.

        `state` is a copy, to be changed in place; it is dropped where the step is.
        """

    def check(self, granularity: str, sized_by: str | None) -> None:
        """Raise a ValueError where other options of the optimizer do not go with this method.

        `sized_by` is the option, if any, that needs the norm of a gradient before it is written.
        """
        if granularity == "tensor" and self.parameters is not None:
            raise ValueError(
                "granularity='tensor' weights each tensor by its own gradients: it does not go "
                f"with parameters={self.parameters} of {type(self).__name__}"
            )

    @fixed_precision
    def __call__(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """Return the weights [..., K] of Gramians [..., K, K], as in a first step.

        `losses` are [K], for a method that needs them.

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
        known = Known(rounding_of(gramian.dtype), losses)
        comparison = Comparison(S, None, S.new_ones(S.shape[-1]), known=known)
        weights = self.decide(comparison, state).weights
        weights = torch.where(S.diagonal(dim1=-2, dim2=-1) > 0.0, weights, 0.0)
        return weights.view(gramian.shape[:-1]).to(gramian.dtype)

    @fixed_precision
    def decide(self, comparison: Comparison, state: State) -> ops.Arbitration:
        """Return one weight per task and change the state; where one is not finite, change none."""
        gramian, known = comparison.gramian, comparison.known
        if host.may_read(gramian):
            return self._decide_on_host(comparison, state)
        finite = gramian.isfinite().all()
        present = gramian.diagonal(dim1=-2, dim2=-1) > 0.0
        # Solvers are not to be shown what is not finite.
        S = gramian if comparison.selected is None else comparison.selected
        S = torch.where(finite, S, identity(gramian))
        if known.losses is not None:
            known = known._replace(losses=torch.where(finite, known.losses, math.nan))
        weights, after = self._weights_and_state(S, state, known)
        weights = torch.where(present, weights, 0.0)
        finite = finite & weights.isfinite().all()
        for name, value in state.items():
            value.copy_(torch.where(finite, after[name], value))
        return without_events(torch.where(finite, weights, 0.0), finite)

    def _decide_on_host(self, comparison: Comparison, state: State) -> ops.Arbitration:
        """Return what `decide` does, of tensors whose values may be read."""
        gramian = comparison.gramian
        products = gramian.numpy()
        if not np.isfinite(products).all():
            return without_events(
                gramian.new_zeros(gramian.shape[:-1]), gramian.new_zeros((), dtype=torch.bool)
            )
        S = gramian if comparison.selected is None else comparison.selected
        weights, after = self._weights_and_state(S, state, comparison.known)
        present = products.diagonal(axis1=-2, axis2=-1) > 0.0
        kept = np.where(present, weights.numpy(), 0.0)
        finite = bool(np.isfinite(kept).all())
        if not finite:
            kept[...] = 0.0
        else:
            for name, value in state.items():
                value.copy_(after[name])
        return without_events(torch.from_numpy(kept), torch.from_numpy(np.array(finite)))

    def _weights_and_state(self, S: Tensor, state: State, known: Known) -> tuple[Tensor, State]:
        """Return the weights of finite Gramians, float64, and the state after them."""
        after = {name: value.clone() for name, value in state.items()}
        if type(self).weights.__module__.startswith("gcond_kernels."):
            weights = self.weights(S, after, known)
        else:
            with users_code(S.device):
                weights = self.weights(S.clone(), after, known)
        check_weights(f"{type(self).__name__}.weights", weights, S.shape[:-1])
        return weights.detach().to(S), after

    def resolve(
        self,
        gradients: TaskGradients,
        destination: Destination,
        state: State,
        max_norm: float | None,
    ) -> tuple[ops.Gramians, ops.Arbitration] | None:
        """Compare, decide and write in one operation; return None where there is none."""
        return None

    def apply(
        self,
        gradients: TaskGradients,
        destination: Destination,
        weights: Tensor,
        decision: ops.Arbitration,
        state: State,
    ) -> ops.Arbitration:
        """Write the resolved gradient by weights [K] or [T, K]; return the decision to report."""
        d, device = destination, gradients.accumulators.device
        # Without the checks of `ops.combine`: the optimizer has made all of this.
        combine = ops.backend_for(d.backend, device, gradients.accumulators.dtype).combine
        combine(gradients, d.outputs, weights, decision.finite, d.momentum, d.rescale)
        return decision


def rounding_of(dtype: torch.dtype) -> float:
    """Return which eigenvalues of cosines are rounding, by the type that products are formed in."""
    return FLOAT64_ROUNDING if dtype == torch.float64 else FLOAT32_ROUNDING


def without_events(weights: Tensor, finite: Tensor) -> ops.Arbitration:
    """Return a decision that is nothing but weights [..., K]."""
    return ops.Arbitration(weights, *nothing(weights.device), finite)


@functools.cache
def nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the coefficients and events of a decision without any, which hold no memory."""
    none = torch.empty(0, dtype=torch.float64, device=device)
    return none.view(0, 0), none.view(0, 5)


def forget_history(state: State, changed: Tensor) -> None:
    """Forget the norms of the history, which are those of the tensors compared before.

    Args:
        state: of a method; changed in place, where it has a history.
        changed: [] bool, whether other tensors are compared now.
    """
    if "history_gramian" in state:
        state["history_gramian"].masked_fill_(changed, 0.0)


@fixed_precision
def fresh_state(method: Method, tasks: int, batch: tuple[int, ...], device: torch.device) -> State:
    """Return the state before the first step, for a batch of Gramians of this shape."""
    return {
        name: value if name in method.shared_state else value.expand((*batch, *value.shape)).clone()
        for name, value in method.new_state(tasks, device).items()
    }
