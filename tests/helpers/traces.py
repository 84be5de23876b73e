"""Recorded runs of the published GCond implementation, replayed through the public optimizer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gcond_kernels import GCond, GCondFused, LionLars, Report

RUNS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data/gcond_traces.json").read_text()
)


def method_of(run: dict[str, Any]) -> GCond:
    s = run["settings"]
    return GCond.published(
        thresholds=s["thresholds"],
        remap_power=s["remap_power"],
        arbitration="smooth" if s["smooth"] else "zones",
        dominance_window=s["dominance_window"],
        norm_cap=s["norm_cap"],
        norm_ema_beta=s["norm_ema_beta"],
        tie_breaking_weights=s["tie_breaking_weights"],
        max_iterations=s["max_iterations"],
        eps=s["eps"],
    )


def optimizer_of(run: dict[str, Any], backend: str = "auto", **overrides: Any) -> GCondFused:
    """The run's own settings, around an optimizer with learning rate 0."""
    s = run["settings"]
    parameters = [
        torch.nn.Parameter(torch.tensor(part).reshape(shape))
        for part, shape in zip(run["params"], run["shapes"], strict=True)
    ]
    options = {
        "accumulation_steps": run["micro_batches"],
        "method": replace(method_of(run), history_dtype=torch.float32),
        "momentum": 0.0 if s["write_raw"] else s["momentum"],
        "update": LionLars(s["trust_ratio_coef"], s["trust_ratio_clip"]) if s["lion"] else None,
        "backend": backend,
    } | overrides
    tasks = dict(zip(run["tasks"], run["weights"], strict=True))
    return GCondFused(torch.optim.SGD(parameters, lr=0.0), tasks, **options)


def replay_step(optimizer: GCondFused, step: dict[str, Any]) -> tuple[torch.Tensor, Report]:
    """One recorded step: a loss of Σ p·d has exactly d as its gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    full = False
    for micro_batch in step["gradients"]:
        assert not full
        losses = {}
        for task, gradient in zip(optimizer.tasks, micro_batch, strict=True):
            parts = torch.tensor(gradient).split([p.numel() for p in parameters])
            losses[task] = sum(
                (p * part.reshape(p.shape)).sum() for p, part in zip(parameters, parts, strict=True)
            )
        full = optimizer.backward(losses)
    assert full
    optimizer.step()
    written = torch.cat([p.grad.flatten() for p in parameters])
    return written.double(), optimizer.report()
