"""A training run in a process of its own, that goes on from its last checkpoint: test_faults.py."""

import os
from pathlib import Path

import torch
from torch import nn

from gcond_kernels import GCond, GCondFused

TASKS = {"a": 1.0, "b": 0.5, "c": 2.0}
# Four to a window in exact mode, seven in stochastic: tasks have blocks of unequal length.
STEPS = {"exact": 4, "stochastic": 7}
# A checkpoint every so many micro-batches: in turn at every place of a window, the end included.
EVERY = {"exact": 1, "stochastic": 3}
CHECKPOINT = "checkpoint.pt"


class Run:
    """Model, optimizer, and how many micro-batches have been trained on."""

    def __init__(self, mode: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 16),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(16, 8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=(0.0, 0.99))
        self.optimizer = GCondFused(
            base, TASKS, accumulation_steps=STEPS[mode], mode=mode, momentum=0.9,
            method=GCond(history="resolved" if mode == "stochastic" else "raw"),
        )  # fmt: skip
        self.position = 0

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
            "random": torch.get_rng_state(),  # of the dropout
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = state["position"]
        torch.set_rng_state(state["random"])

    def micro_batch(self) -> None:
        # What the data is follows from its position alone.
        generator = torch.Generator().manual_seed(1000 + self.position)
        y = self.model(torch.randn(8, 6, generator=generator))
        losses = {
            "a": (y[:, 0] - 1).pow(2).mean(),
            "b": (y[:, 0] + y[:, 1] + 1).pow(2).mean(),
            "c": (y.sum(1) - 0.5).abs().mean(),
        }
        if self.optimizer.backward({task: losses[task] for task in self.optimizer.active_tasks}):
            self.optimizer.step()
        self.position += 1


def train(folder: Path, mode: str, until: int, ready, at) -> None:
    """What the process does. It says so by `ready` when it has loaded its checkpoint.

    `at` holds the number of the micro-batch that it is at.
    """
    torch.set_num_threads(1)
    run = Run(mode)
    path = folder / CHECKPOINT
    if path.exists():
        run.load(torch.load(path))
    ready.send(run.position)
    while run.position < until:
        run.micro_batch()
        at.value = run.position
        if run.position % EVERY[mode] == 0 or run.position == until:
            # Whole or not at all: the name is given to a file that is complete.
            torch.save(run.state(), folder / "unfinished.pt")
            os.replace(folder / "unfinished.pt", path)
