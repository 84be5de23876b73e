"""The recorded runs: same decisions, same gradients as the published implementation."""

import pytest
import torch

from tests.helpers.traces import RUNS, optimizer_of, replay_step

# Recorded in float64; ours is float32 storage and partial sums: a few 1e-7 at these sizes.
TOLERANCE = 1e-5


def close(ours, recorded) -> bool:
    recorded = torch.tensor(recorded, dtype=torch.float64)
    scale = recorded.abs().max().clamp(min=1e-30)
    ours = torch.as_tensor(ours, dtype=torch.float64)
    return bool(((ours - recorded).abs().max() / scale) <= TOLERANCE)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_replays_the_published_implementation(run, backend):
    optimizer = optimizer_of(run, backend)
    resolved = optimizer_of(run, backend, momentum=0.0, update=None)
    for number, step in enumerate(run["steps"]):
        written, report = replay_step(optimizer, step)
        assert close(written, step["written"]), f"step {number}: written"
        assert close(replay_step(resolved, step)[0], step["resolved"]), f"step {number}: resolved"
        assert len(report.conflicts) == step["iterations"], f"step {number}"
        assert [list(run["tasks"])[w] for w in step["winners"]] == report.winners, f"step {number}"
        assert close(list(report.norms.values()), step["norms"]), f"step {number}: norms"
        assert close(list(report.norm_ema.values()), step["norm_ema"]), f"step {number}: averages"
        if step["iterations"]:  # without a conflict the recording holds a placeholder, 1.0
            assert report.min_cosine == pytest.approx(step["min_cosine"], abs=TOLERANCE)


def test_the_runs_have_conflicts_to_resolve():
    zones = set()
    for run in RUNS:
        optimizer = optimizer_of(run)
        for step in run["steps"]:
            zones |= {conflict.zone for conflict in replay_step(optimizer, step)[1].conflicts}
    assert len(RUNS) == 16
    assert zones == {"mild", "moderate", "critical"}
