"""arbitrate: the resolution itself, on K×K numbers, by one block that never asks the host.

Of a batch every resolution has a block of its own, in the same launch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import place_of
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Arbitration, ArbitrationState, Settings

Decision = tuple[Tensor, Tensor, Tensor, Tensor]


def new_decision(
    tasks: int, max_iterations: int, device: torch.device, batch: Sequence[int] = ()
) -> Decision:
    """Memory for weights [K], rows [K, K], events [max_iterations, 5] and finite [].

    Of a batch [B] each has that as its leading dimension.
    """
    return (
        torch.empty((*batch, tasks), dtype=torch.float64, device=device),
        torch.empty((*batch, tasks, tasks), dtype=torch.float64, device=device),
        torch.empty((*batch, max_iterations, 5), dtype=torch.float64, device=device),
        torch.empty(tuple(batch), dtype=torch.bool, device=device),
    )


def state_of(state: ArbitrationState) -> _cuda.State:
    """Return the state as the module takes it."""
    return _cuda.State(
        norm_ema=state.norm_ema,
        winners=state.winners,
        history_gramian=state.history_gramian,
        history_rows=state.history_coefficients,
        history_scale=state.history_scale,
    )


def settings_of(settings: Settings, tasks: int) -> _cuda.Settings:
    """Return the settings as the module takes them."""
    stability_weight, strength_weight = settings.tie_breaking_weights
    return _cuda.Settings(
        thresholds=settings.thresholds,
        remap_power=settings.remap_power,
        smooth=settings.arbitration == "smooth",
        max_iterations=settings.iterations(tasks),
        tolerance=settings.tolerance,
        stability_weight=stability_weight,
        strength_weight=strength_weight,
        norm_ema_beta=settings.norm_ema_beta,
        norm_ema_floor=settings.norm_ema_floor,
        norm_cap=settings.norm_cap,
        resolved_history=settings.history == "resolved",
        eps=settings.eps,
    )


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
) -> Arbitration:
    """Weights of the tasks, and the new state in place; see `gcond_kernels.ops.arbitrate`."""
    batch, tasks, device = gramian.shape[:-2], gramian.shape[-1], gramian.device
    if tasks > _cuda.MOST_TASKS:
        raise ValueError(
            f"backend='cuda' arbitrates up to {_cuda.MOST_TASKS} tasks, not {tasks}: "
            "use backend='python'"
        )
    decision = new_decision(tasks, settings.iterations(tasks), device, batch)
    with tables.guard(device):
        _cuda.arbitrate(
            *place_of(device),
            batch.numel(),
            tasks,
            gramian,
            cross,
            scale,
            state_of(state),
            settings_of(settings, tasks),
            _cuda.Decision(*decision),
        )
    return Arbitration(*decision)
