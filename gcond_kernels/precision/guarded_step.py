"""A step of the wrapped optimizer that a flag on the device leaves out."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.storage.dtensor import local_shard


def step_if(wanted: Tensor, base: torch.optim.Optimizer) -> None:
    """Step the optimizer where `wanted` is True; else parameters and state stay as they are.

    - torch's fused optimizers get the flag: their kernels leave the step out.
    - With `capturable=True`, or while a CUDA graph is captured, the step is made and rolled back on
      the device, from copies of parameters and state that live as long as the step.
    - Any other optimizer counts its steps on the host, which reads the flag: on a GPU it
      synchronizes with the device once a step.

    Args:
        wanted: [] bool.
        base: any torch optimizer.
    """
    if takes_flag(base):
        # The attributes through which torch's GradScaler does the same.
        base.grad_scale = None  # type: ignore[attr-defined]
        base.found_inf = (~wanted).to(torch.float32)  # type: ignore[attr-defined]
        try:
            step_base(base)
        finally:
            del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
    elif rolls_back_on_device(wanted.device, base):
        step_or_roll_back(wanted, base)
    elif bool(wanted):
        step_base(base)


def step_base(base: torch.optim.Optimizer) -> None:
    """Step the optimizer; raise a RuntimeError where it needs what resolved gradients lack."""
    try:
        base.step()
    except Exception as error:
        words = str(error).lower()
        if not any(word in words for word in ("closure", "create_graph", "grad_fn", "hessian")):
            raise
        raise RuntimeError(
            f"{type(base).__name__}.step failed ({error}): it needs a closure that computes the "
            "loss anew, or a graph of the gradient, and a resolved gradient has neither. Use a "
            "base optimizer that needs .grad alone, such as torch.optim.AdamW"
        ) from error


def step_of_zeros(base: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Step with gradients and a learning rate of zero, so that parameters have a state."""
    gradients = [(p, p.grad) for group in base.param_groups for p in group["params"]]
    options = [
        {k: (v, copy.deepcopy(v)) for k, v in group.items() if k != "params"}
        for group in base.param_groups
    ]
    try:
        for p, _ in gradients:
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
        for p, gradient in gradients:
            p.grad = gradient


def takes_flag(base: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer's own kernels leave a step out where `found_inf` is 1."""
    if not getattr(base, "_step_supports_amp_scaling", False):
        return False
    if not all(group.get("fused") for group in base.param_groups):
        return False
    # torch's fused SGD allocates its buffers unfilled and fills them in the first step: if that is
    # left out, the second reads whatever was in that memory.
    return not isinstance(base, torch.optim.SGD) or not any(
        group["momentum"] and base.state.get(p, {}).get("momentum_buffer") is None
        for group in base.param_groups
        for p in group["params"]
        if p.grad is not None
    )


def rolls_back_on_device(device: torch.device, base: torch.optim.Optimizer) -> bool:
    """Return whether the host must not, or need not, know of a step that is left out."""
    capturable = all(group.get("capturable") for group in base.param_groups)
    return capturable or tables.is_capturing(device)


@torch.no_grad()
def step_or_roll_back(wanted: Tensor, base: torch.optim.Optimizer) -> None:
    """Make the step, then roll back what it changed where it was not wanted.

    Only the host can remove state that a first step has added: it reads the flag then.
    """
    before = {key: local_shard(value).clone() for key, value in changed_by_step(base).items()}
    for (_, name), value in before.items():
        if value.device != wanted.device:
            raise RuntimeError(
                f"{type(base).__name__} keeps {name!r} on {value.device}, where a step cannot be "
                f"rolled back by a flag on {wanted.device}: use fused=True or capturable=True"
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
    """Return every parameter with a gradient, named "", and the tensors of its state by name."""
    changed: dict[tuple[Tensor, str], Tensor] = {}
    for group in base.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                changed[p, ""] = p
                state = base.state.get(p, {})
                changed.update({(p, k): v for k, v in state.items() if isinstance(v, Tensor)})
    return changed
