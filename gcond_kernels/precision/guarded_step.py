"""Stepping the wrapped optimizer, or leaving the step out, as a flag on the device says."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.storage.dtensor import local_shard


def step_if(wanted: Tensor, base: torch.optim.Optimizer) -> None:
    """Steps the optimizer where `wanted` is True; else parameters and state stay as they are.

    - torch's fused optimizers take the flag with them: their kernels leave the step out.
    - With `capturable=True`, or while a CUDA graph is captured, the step is made and undone on the
      device, from copies of parameters and state that live as long as the step.
    - Any other optimizer counts its steps on the host, which has to know: it reads the flag, and
      on a GPU waits for it, once a step.

    Args:
        wanted: [] bool.
        base: any torch optimizer.
    """
    if takes_flag(base):
        step_with_flag(wanted, base)
    elif undoes_on_device(wanted.device, base):
        step_and_undo(wanted, base)
    elif bool(wanted):
        step_base(base)


def step_base(base: torch.optim.Optimizer) -> None:
    """Step the optimizer, as it is.

    Raises:
        RuntimeError: it needs what accumulated gradients do not have.
    """
    try:
        base.step()
    except Exception as error:
        words = str(error).lower()
        if not any(word in words for word in ("closure", "create_graph", "grad_fn", "hessian")):
            raise
        raise RuntimeError(
            f"{type(base).__name__}.step failed ({error}): it needs a closure that computes the "
            "loss anew, or a graph of the gradient, and a resolved gradient has neither. Take a "
            "base optimizer that goes by .grad alone, such as torch.optim.AdamW"
        ) from error


def step_of_zeros(base: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Step these parameters alone, by nothing; gradients and options are then as before."""
    of_others = [(p, p.grad) for group in base.param_groups for p in group["params"]]
    options = [
        {k: (v, copy.deepcopy(v)) for k, v in group.items() if k != "params"}
        for group in base.param_groups
    ]
    try:
        for p, _ in of_others:
            p.grad = None
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for group in base.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * 0.0
        step_base(base)
    finally:
        for group, values in zip(base.param_groups, options, strict=True):
            for added in group.keys() - values.keys() - {"params"}:
                del group[added]
            for key, (own, value) in values.items():
                # The tensor itself: a CUDA graph may read it.
                group[key] = own.copy_(value) if isinstance(own, Tensor) else value
        for p, gradient in of_others:
            p.grad = gradient


def takes_flag(base: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's own kernels leave a step out where `found_inf` is 1."""
    if not getattr(base, "_step_supports_amp_scaling", False):
        return False
    if not all(group.get("fused") for group in base.param_groups):
        return False
    # torch's fused SGD allocates its buffers unfilled and fills them in the first step: where that
    # is left out, the second would read what happened to be there.
    return not isinstance(base, torch.optim.SGD) or not any(
        group["momentum"] and base.state.get(p, {}).get("momentum_buffer") is None
        for group in base.param_groups
        for p in group["params"]
        if p.grad is not None
    )


def step_with_flag(wanted: Tensor, base: torch.optim.Optimizer) -> None:
    """By the attributes through which torch's GradScaler tells a fused optimizer."""
    base.grad_scale = None  # type: ignore[attr-defined]
    base.found_inf = (~wanted).to(torch.float32)  # type: ignore[attr-defined]
    try:
        step_base(base)
    finally:
        del base.grad_scale, base.found_inf  # type: ignore[attr-defined]


def undoes_on_device(device: torch.device, base: torch.optim.Optimizer) -> bool:
    """Whether the host must not, or need not, know of a step that is left out."""
    capturable = all(group.get("capturable") for group in base.param_groups)
    return capturable or tables.is_capturing(device)


@torch.no_grad()
def step_and_undo(wanted: Tensor, base: torch.optim.Optimizer) -> None:
    """Makes the step, then puts back what it changed where it was not wanted.

    State that the step has added had no value before, which only the host can put back: it reads
    the flag then, in an optimizer's first step.

    Raises:
        RuntimeError: this is a first step, and a CUDA graph is being captured.
    """
    before = {key: local_shard(value).clone() for key, value in changed_by_step(base).items()}
    for (_, name), value in before.items():
        if value.device != wanted.device:
            raise RuntimeError(
                f"{type(base).__name__} keeps {name!r} on {value.device}, where a step cannot be "
                f"undone as {wanted.device} says: use fused=True or capturable=True"
            )
    step_base(base)
    after = changed_by_step(base)
    for key, value in before.items():
        now = local_shard(after[key])
        torch.where(wanted, now, value, out=now)
    added = after.keys() - before.keys()
    if not added:
        return
    if tables.is_capturing(wanted.device):
        raise RuntimeError(
            f"{type(base).__name__} makes its state in its first step, which a CUDA graph must not "
            "capture: make one step before the capture"
        )
    if not bool(wanted):
        for parameter, name in added:
            del base.state[parameter][name]
            if not base.state[parameter]:
                del base.state[parameter]


def changed_by_step(base: torch.optim.Optimizer) -> dict[tuple[Tensor, str], Tensor]:
    """Every parameter with a gradient, named "", and the tensors of its state by their names."""
    found: dict[tuple[Tensor, str], Tensor] = {}
    for group in base.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                found[p, ""] = p
                state = base.state.get(p, {})
                found.update({(p, k): v for k, v in state.items() if isinstance(v, Tensor)})
    return found
