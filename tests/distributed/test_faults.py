"""A training process that is killed again and again comes to the same bits as one left alone."""

import multiprocessing
import random
import signal
import time

import pytest
import torch

from tests.conftest import slow
from tests.helpers.training_process import CHECKPOINT, train
from tests.test_optimizer import same

KILLS = 20
# No multiple of a window's length or of the distance of checkpoints: the run ends inside a window.
UNTIL = 1201

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork here"
    ),
]


@pytest.fixture(scope="module")
def processes():
    """Makes processes by forking one that has only made the imports, which take seconds."""
    context = multiprocessing.get_context("forkserver")
    # The first optimizer that is made imports torch._dynamo.
    context.set_forkserver_preload(["torch._dynamo", "pytest", "tests.helpers.training_process"])
    return context


def start(processes, folder, mode):
    """A process that trains, the micro-batch that it goes on with, and the one that it is at."""
    said, says = processes.Pipe(duplex=False)
    at = processes.RawValue("i")
    process = processes.Process(target=train, args=(folder, mode, UNTIL, says, at), daemon=True)
    process.start()
    says.close()
    assert said.poll(60)
    return process, said.recv(), at


def where(folder):
    """Micro-batches until the last checkpoint, and how many of them in the window it was in."""
    if not (folder / CHECKPOINT).exists():
        return 0, 0
    state = torch.load(folder / CHECKPOINT)
    window = state["optimizer"]["param_groups"][0]["gcond"]["window"]
    return state["position"], window["position"]


@pytest.mark.parametrize("mode", [slow("exact"), "stochastic"])
def test_killed_twenty_times_it_ends_with_the_bits_of_a_run_left_alone(mode, tmp_path, processes):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    process, *_ = start(processes, alone, mode)
    process.join()
    assert process.exitcode == 0

    draw, resumed, unfinished, inside_a_window = random.Random(mode), [], 0, 0
    for kill in range(KILLS):
        process, position, at = start(processes, killed, mode)
        resumed.append(position)
        # So that the moments spread over the run, and a part is left for after the last of them.
        share = (UNTIL - position) / (KILLS - kill + 4)
        kill_at = position + draw.uniform(0.0, 2.0) * share
        while at.value < kill_at and process.is_alive():
            time.sleep(0.001)  # and then it is killed wherever it is
        process.kill()
        process.join()
        unfinished += process.exitcode == -signal.SIGKILL
        inside_a_window += where(killed)[1] > 0
    process, position, _ = start(processes, killed, mode)
    process.join()
    assert process.exitcode == 0

    # The kills hit where they were to hit.
    assert unfinished >= KILLS - 4
    assert inside_a_window >= KILLS // 4
    assert len({*resumed, position}) > KILLS // 2
    assert position > UNTIL // 4
    assert where(killed)[0] == UNTIL
    equal = same(torch.load(alone / CHECKPOINT), torch.load(killed / CHECKPOINT))
    assert equal, "the two runs ended with different weights or optimizer states"
