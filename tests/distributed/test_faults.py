"""A training process that is killed again and again comes to the same bits as one left alone."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from torch import nn

from gcond_kernels import GCond, GCondFused
from tests.helpers import distributed_training as t
from tests.helpers.models import same

KILLS = 20
# No multiple of a window's length or of the distance of checkpoints: the run ends inside a window.
UNTIL = 1201
# Four to a window in exact mode, seven in stochastic: tasks have blocks of other lengths.
STEPS = {"exact": 4, "stochastic": 7}
# A checkpoint every so many micro-batches: in turn at every place of a window, the end included.
EVERY = {"exact": 1, "stochastic": 3}
CHECKPOINT = "checkpoint.pt"

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork here"
    ),
]


def train(folder, mode, ready, at):
    """Train, from the last checkpoint on; `ready` is sent where, `at` holds how far it is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.0, 0.99))
    method = GCond(history="resolved" if mode == "stochastic" else "raw")
    options = {"accumulation_steps": STEPS[mode], "mode": mode, "momentum": 0.9, "method": method}
    optimizer = GCondFused(base, t.TASKS, **options)
    position, path = 0, folder / CHECKPOINT
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        position = state["position"]
        torch.set_rng_state(state["random"])
    ready.send(position)
    while position < UNTIL:
        if optimizer.backward(t.losses_of(model, 1000 + position, optimizer.active_tasks)):
            optimizer.step()
        position += 1
        at.value = position
        if position % EVERY[mode] == 0 or position == UNTIL:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "position": position,
                "random": torch.get_rng_state(),  # of the dropout
            }
            # All of it or nothing: the name is given to a file that is complete.
            torch.save(state, folder / "unfinished.pt")
            os.replace(folder / "unfinished.pt", path)


def start(folder, mode):
    """A process that trains, the micro-batch that it goes on with, and the one that it is at."""
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import; the first optimizer that is made imports torch._dynamo.
    context.set_forkserver_preload(["torch._dynamo", "pytest", __name__])
    ready, send = context.Pipe(duplex=False)
    at = context.RawValue("i")
    process = context.Process(target=train, args=(folder, mode, send, at), daemon=True)
    process.start()
    send.close()
    assert ready.poll(60)
    return process, ready.recv(), at


def where(folder):
    """Micro-batches until the last checkpoint, and how many of them in the window it was in."""
    if not (folder / CHECKPOINT).exists():
        return 0, 0
    state = torch.load(folder / CHECKPOINT)
    window = state["optimizer"]["param_groups"][0]["gcond"]["window"]
    return state["position"], window["position"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "stochastic"])
def test_killed_twenty_times_it_ends_with_the_bits_of_a_run_left_alone(mode, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    process, *_ = start(alone, mode)
    process.join()
    assert process.exitcode == 0

    draw, resumed, unfinished, inside_a_window = random.Random(mode), [], 0, 0
    for kill in range(KILLS):
        process, position, at = start(killed, mode)
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
    process, position, _ = start(killed, mode)
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
