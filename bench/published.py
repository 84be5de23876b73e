"""The implementation that the authors of GCond published, from a file that the user has.

It has no licence, so that nothing of it is part of this package: it is loaded from its path and
called by name. The defaults are its own; set here is only what a comparison must have in common,
the momentum and how micro-batches are accumulated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

CLASS = "GradientConductor"
METHODS = (
    *("_project", "_momentum_update", "_write_to_model"),
    *("step", "state_dict", "load_state_dict"),
)
OPTIONS = ("momentum_beta", "stochastic_accumulation")


def load(path: Path) -> ModuleType:
    """Return the published module, or raise ValueError; nothing is written beside the file."""
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: does not run: {type(error).__name__}: {error}") from error
    missing = _missing(getattr(module, CLASS, None))
    if missing:
        raise ValueError(
            f"{path}: has no {missing}; the published code of GCond is needed, a "
            "grad_conductor.py in the version with smooth logic and stochastic accumulation"
        )
    return module


def _missing(conductor: Any) -> str:
    """Return what the adapters below need and a class lacks."""
    if not inspect.isclass(conductor):
        return f"class {CLASS}"
    options = inspect.signature(conductor).parameters
    missing = [f"{CLASS}.{name}" for name in METHODS if not hasattr(conductor, name)]
    missing += [f"option {name} of {CLASS}" for name in OPTIONS if name not in options]
    return ", ".join(missing)


class PublishedResolution:
    """A resolution of the same task gradients [K, N] every time, on their device."""

    def __init__(
        self, module: ModuleType, sizes: Sequence[int], gradients: Tensor, momentum: float = 0.9
    ) -> None:
        self._gradients = {f"task {k}": g.split(list(sizes)) for k, g in enumerate(gradients)}
        self._parameters = nn.ParameterList(
            torch.zeros(size, device=gradients.device) for size in sizes
        )
        self._conductor = getattr(module, CLASS)(
            self._parameters,
            dict.fromkeys(self._gradients, _no_loss),
            dict.fromkeys(self._gradients, 1.0),
            accumulation_steps=1,
            momentum_beta=momentum,
            stochastic_accumulation=False,
        )
        self._earlier = self._earlier_step()

    def _earlier_step(self) -> dict[str, Any]:
        """Return the state after one step with these gradients."""
        conductor = self._conductor
        self._fill_accumulators()
        self.run()
        # As its own `step` ends: what was resolved becomes the history.
        now, before = conductor.accumulators, conductor.prev_accumulators
        conductor.accumulators, conductor.prev_accumulators = before, now
        state: dict[str, Any] = conductor.state_dict()
        # Of these tensors a run changes the momentum alone.
        return state | {"momentum": [m.clone() for m in state["momentum"]]}

    def _fill_accumulators(self) -> None:
        for task, parts in self._gradients.items():
            for accumulator, part in zip(self._conductor.accumulators[task], parts, strict=True):
                accumulator.copy_(part)

    @torch.no_grad()
    def fill(self) -> None:
        """Fill the accumulators, clear gradients and restore the state after one step."""
        self._parameters.zero_grad()
        averages = dict(self._earlier["norm_moving_averages"])  # a run changes them
        self._conductor.load_state_dict(self._earlier | {"norm_moving_averages": averages})
        self._fill_accumulators()

    @torch.no_grad()
    def run(self) -> None:
        """Resolve full accumulators and write `.grad`, as its `step` does once they are full."""
        conductor = self._conductor
        resolved, _ = conductor._project()
        conductor._last_safe = resolved
        conductor._momentum_update(resolved)
        conductor._write_to_model()

    @property
    def outputs(self) -> list[Tensor]:
        """The gradients that `run` has written, a tensor for each parameter."""
        return [parameter.grad for parameter in self._parameters]


def _no_loss(*_: Tensor) -> Tensor:
    raise AssertionError("a resolution computes no loss")


class PublishedTraining:
    """Training with the published code around an optimizer, without momentum.

    It puts the model into evaluation mode, and on a GPU into bfloat16 autocast. The losses are
    functions of the model's output and the target, with a weight each; in mode "stochastic" the
    number of tasks must divide that of micro-batches.
    """

    def __init__(
        self,
        module: ModuleType,
        model: nn.Module,
        losses: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], float]],
        base: torch.optim.Optimizer,
        accumulation_steps: int,
        mode: Literal["exact", "stochastic"],
    ) -> None:
        self._base = base
        self._accumulation_steps = accumulation_steps
        self._conductor = getattr(module, CLASS)(
            model,
            {task: loss for task, (loss, _) in losses.items()},
            {task: weight for task, (_, weight) in losses.items()},
            accumulation_steps=accumulation_steps,
            momentum_beta=0.0,
            stochastic_accumulation=mode == "stochastic",
        )

    def window(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make one optimizer step over `accumulation_steps` micro-batches."""
        if len(batches) != self._accumulation_steps:
            raise ValueError(
                f"{len(batches)} micro-batches, but the window has {self._accumulation_steps}"
            )
        self._base.zero_grad()
        remaining = iter(batches)
        self._conductor.step(lambda: next(remaining))
        self._base.step()
