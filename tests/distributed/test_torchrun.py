"""The demo's digits by torchrun: on two ranks, then on from there on one, sharded otherwise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("rich", reason="the progress bar is drawn by rich")

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")  # a port of its own
EXAMPLE = Path(__file__).parents[2] / "examples" / "torchrun_digits.py"


def run(ranks, *options):
    result = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", str(ranks), str(EXAMPLE), *options],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_it_learns_and_goes_on_from_its_checkpoint(tmp_path):
    first = run(2, "--steps", "20", "--checkpoint", str(tmp_path))
    assert first.count("the same on 2 ranks") == 3
    assert "NOT" not in first
    then = run(1, "--steps", "40", "--checkpoint", str(tmp_path), "--fsdp")
    assert "rank 0 goes on after step 20" in then
    before, after = (
        [float(score) for score in re.findall(r"correct: ([0-9.]+) %", said)]
        for said in (first, then)
    )
    assert all(there > here + 5 for here, there in zip(before, after, strict=True))
    assert "nothing left" in run(1, "--steps", "40", "--checkpoint", str(tmp_path))
