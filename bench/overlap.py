"""The gain of sending a task's accumulator to the other ranks before the window is over.

    python -m bench overlap [--ranks 2]                        # starts its processes
    torchrun --nproc-per-node N -m bench overlap               # a GPU each and NCCL, or gloo

A step is a window of micro-batches and the optimizer's step. It is timed with accumulators sent as
soon as nothing is added to them ("at once"), and with all of them sent in `resolve()`; beside them
plain accumulation under DistributedDataParallel, and each of these "alone": all ranks at work, but
each in a process group of its own. All take turns step by step, in the opposite order every other
round; differences are taken round by round. Before, parameters are compared to the bit.

    step      from a barrier to the end of the step, on the rank that takes longest
    resolve   time in `resolve()` at the end of a window, on the rank with the shortest: others wait
    exposed   what a step takes longer than alone; of shards 1/ranks of alone's `resolve()` counts
    gain      what a step takes longer with accumulators sent in `resolve()`
    reduce, gather
              the same collectives with nothing else going on, of accumulators and of the result

Ranks on one machine exchange through its memory, which takes the cores that compute. A network of
some rate, which takes none, is had on Linux in a namespace of its own (as root):

    unshare -n sh -c 'ip link set lo up
        tc qdisc add dev lo root tbf rate 4gbit burst 1mb latency 100ms
        python -m bench overlap --tasks 4 --batch 256 --rounds 8 --link "4 Gbit/s, by tc"'
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.recipe import Benchmark
from bench.record import Figure, InputError, cores, quartiles
from bench.table import Column, text, timed
from gcond_kernels import Distributed, GCondFused

MODES = ("exact", "stochastic")
STRATEGIES = ("shard", "replicate")
AT_ONCE, IN_RESOLVE = "at once", "in resolve()"
# In the first window nothing is sent early: the ranks have yet to compare their parameters.
CHECKED_WINDOWS = 4
WARM_UP = 2
RATE = 1e-3

Times = dict[str, float]


class Case(NamedTuple):
    """A step, or an exchange."""

    operation: str
    mode: str = ""
    strategy: str = ""
    sent: str = ""


Measured = dict[Case, list[Times]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    for name, default, about in (
        ("ranks", 2, "processes; torchrun has its own"),
        ("tasks", 2, "number of tasks K"),
        ("accumulation-steps", 4, "micro-batches A"),
        ("batch", 32, "samples in a micro-batch"),
        ("width", 1024, "of each layer"),
        ("layers", 10, "number of layers"),
        ("rounds", 16, "steps of every case"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=about)
    parser.add_argument("--link", default="as it is", help="between the ranks, for the record")


def check(options: argparse.Namespace) -> None:
    """Raise InputError where an option cannot be used."""
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    if options.ranks < 2 or options.rounds < 2:
        raise InputError("it takes two ranks, and two rounds")


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """Measure all cases by all ranks."""
    if "RANK" in os.environ:
        yield from figures_of(work(int(os.environ["RANK"]), "env://", options), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "measured"
        arguments = f"file://{folder}/store", options, result
        torch.multiprocessing.spawn(work, arguments, nprocs=options.ranks)
        yield from figures_of(torch.load(result, weights_only=False), options)


def work(
    rank: int, store: str, options: argparse.Namespace, result: Path | None = None
) -> Measured:
    """Measure on one rank; the first writes the result, if it is given a file."""
    measured = Rank(options, join(rank, store, options.ranks)).measure()
    dist.destroy_process_group()
    if rank == 0 and result is not None:
        torch.save(measured, result)
    return measured


def join(rank: int, store: str, size: int) -> torch.device:
    """Join the other ranks and return the device of this one."""
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.device_count() >= local_size:
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, cores() // local_size))
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    return device


class Training:
    """A model and its optimizer in one process group."""

    def __init__(self, model: DistributedDataParallel, optimizer: GCondFused, rank: Rank) -> None:
        self.model, self.optimizer, self.rank = model, optimizer, rank
        self.sent = 0  # accumulators, before the last window was resolved
        self._full = self._resolved = 0.0

    def step(self, sent: str = AT_ONCE) -> Times:
        """Make a window and its step."""
        optimizer, now = self.optimizer, self.rank.now
        late = mock.patch.object(optimizer._rank_strategy, "mark_complete", return_value=None)
        sending = late if sent == IN_RESOLVE else nullcontext()
        with sending, mock.patch.object(optimizer, "resolve", self._resolve):
            start = now()
            for x in self.rank.inputs:
                losses = self.rank.losses(self.model(x))
                optimizer.backward({task: losses[task] for task in optimizer.active_tasks})
            optimizer.step()
            return {"step": now() - start, "resolve": self._resolved - self._full}

    def _resolve(self) -> None:
        """Time what the last `backward` of a window calls; `step` calls it for nothing."""
        if self.optimizer._window.resolved:
            return
        self.sent = self.optimizer._rank_strategy.sent
        self._full = self.rank.now()
        GCondFused.resolve(self.optimizer)
        self._resolved = self.rank.now()

    def exchange(self) -> Times:
        """Make the collectives of a window, which leave accumulators of no use."""
        strategy: Any = self.optimizer._rank_strategy
        now = self.rank.now
        start = now()
        for task in range(len(self.rank.targets)):
            strategy._start_reduction(task)()
        there = now()
        strategy.gather(strategy.local_gradients(torch.ones(()), 0.0))
        return {"reduce": there - start, "gather": now() - there}


class Rank:
    """All that one rank measures."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        generator = torch.Generator().manual_seed(dist.get_rank())
        shape = options.accumulation_steps, options.batch, options.width
        self.inputs = torch.randn(shape, generator=generator).to(device)
        targets = torch.randn(options.tasks, options.width, generator=generator)
        targets -= 1.1 * targets.mean(0)  # there is a conflict to resolve
        self.targets = {f"task {k}": target.to(device) for k, target in enumerate(targets)}
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self.alone = groups[dist.get_rank()]

    def losses(self, y: Tensor) -> dict[str, Tensor]:
        """Return the loss of every task; autograd goes through those alone that are taken."""
        return {task: (y - target).square().mean() for task, target in self.targets.items()}

    def now(self) -> float:
        """Return the time when what was given to the device until now is done."""
        if self.device.type == "cuda":
            # The exchange goes on on another stream.
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()

    def measure(self) -> Measured:
        """Return the times of every case, round by round, over all ranks."""
        cases: dict[Case, Callable[[], Times]] = {
            Case("plain", "", "alone"): self.plain_step(self.alone),
            Case("plain", "", "DDP"): self.plain_step(None),
        }
        for mode in MODES:
            cases |= self.cases(mode)
        times: Measured = {case: [] for case in cases}
        for number in range(-WARM_UP, self.options.rounds):
            for case in list(cases) if number % 2 else reversed(cases):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                dist.barrier()
                taken = cases[case]()
                if number >= 0:
                    times[case].append(taken)
            self.report(f"round {number + 1} of {self.options.rounds} is done")
        return over_ranks(times)

    def cases(self, mode: str) -> dict[Case, Callable[[], Times]]:
        """Return steps of GCondFused in one mode."""
        found: dict[Case, Callable[[], Times]] = {
            Case("GCondFused", mode, "alone"): self.training(mode, None, self.alone).step
        }
        for strategy in STRATEGIES:
            training = self.checked_training(mode, strategy)
            for sent in (AT_ONCE, IN_RESOLVE):  # of the same training
                case = Case("GCondFused", mode, strategy, sent)
                found[case] = lambda training=training, sent=sent: training.step(sent)
            if mode == MODES[0]:
                found[Case("exchange", "", strategy)] = training.exchange
        return found

    def checked_training(self, mode: str, strategy: str) -> Training:
        """Return a training for which sending accumulators early changes no bit, or raise."""
        self.report(f"{mode}, {strategy}: comparing parameters")
        early, late = self.training(mode, strategy), self.training(mode, strategy)
        for window in range(CHECKED_WINDOWS):
            early.step()
            late.step(IN_RESOLVE)
            # The next shard goes where the accumulator of the first was, once that has arrived.
            tasks = 1 if strategy == "shard" else len(self.targets)
            if early.sent < (0 if window == 0 else tasks) or late.sent > 0:
                raise RuntimeError(f"{mode}, {strategy}: {early.sent} and {late.sent} were sent")
        others = dict(late.model.named_parameters())
        for name, here in early.model.named_parameters():
            if not torch.equal(here.view(torch.uint8), others[name].view(torch.uint8)):
                raise RuntimeError(f"{mode}, {strategy}: {name} differs")
        return early

    def training(self, mode: str, strategy: str | None, group: Any = None) -> Training:
        """Return a training from the same start as any other."""
        model = self.model(group)
        optimizer = GCondFused(
            torch.optim.SGD(model.parameters(), lr=RATE),
            dict.fromkeys(self.targets, 1.0),
            accumulation_steps=self.options.accumulation_steps,
            mode=mode,
            distributed=Distributed(strategy, model),  # type: ignore[arg-type]
        )
        return Training(model, optimizer, self)

    def model(self, group: Any) -> DistributedDataParallel:
        """Return a stack of linear layers, the same on every rank."""
        torch.manual_seed(0)
        width, stack = self.options.width, nn.Sequential()
        for _ in range(self.options.layers):
            stack.extend((nn.Linear(width, width), nn.Tanh()))
        return DistributedDataParallel(stack.to(self.device), process_group=group)

    def plain_step(self, group: Any) -> Callable[[], Times]:
        """Return a window of plain accumulation of the sum of the losses, and its step."""
        model = self.model(group)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        steps = len(self.inputs)

        def step() -> Times:
            start = self.now()
            for i, x in enumerate(self.inputs):
                with model.no_sync() if i < steps - 1 else nullcontext():
                    loss = torch.stack(list(self.losses(model(x)).values())).sum()
                    (loss / steps).backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"step": self.now() - start}

        return step

    def report(self, line: str) -> None:
        """Print a line from the first rank."""
        if dist.get_rank() == 0:
            print(line, flush=True)


def over_ranks(times: Measured) -> Measured:
    """Return one time for all ranks: the longest, but the shortest of `resolve`."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, times)
    choice = {"resolve": min}
    return {
        case: [
            {key: choice.get(key, max)(rank[case][i][key] for rank in of_ranks) for key in taken}
            for i, taken in enumerate(own)
        ]
        for case, own in times.items()
    }


def figures_of(measured: Measured, options: argparse.Namespace) -> Iterator[Figure]:
    """Return the figures of the times: of every case, then the gains."""
    names = ("ranks", "tasks", "accumulation_steps", "batch", "width", "layers", "link")
    head = {"section": "overlap", **{name: getattr(options, name) for name in names}}
    head["parameters"] = options.layers * options.width * (options.width + 1)
    for case, rounds in measured.items():
        figure = head | {"rounds": len(rounds)} | {k: v for k, v in case._asdict().items() if v}
        figure |= {key: quartiles([taken[key] for taken in rounds]) for key in rounds[0]}
        if case.operation != "exchange" and case.strategy != "alone":
            share = options.ranks if case.strategy == "shard" else 1
            alone = [
                taken["step"] - taken.get("resolve", 0.0) * (1 - 1 / share)
                for taken in measured[Case(case.operation, case.mode, "alone")]
            ]
            longer = [t["step"] - own for t, own in zip(rounds, alone, strict=True)]
            figure["exposed"] = quartiles(longer)
        yield figure
    for mode, strategy in itertools.product(MODES, STRATEGIES):
        yield head | gain_of(mode, strategy, measured)


def gain_of(mode: str, strategy: str, measured: Measured) -> Figure:
    """Return the gain of sending at once, in seconds and as a part of the reduction."""
    early, late = (
        [taken["step"] for taken in measured[Case("GCondFused", mode, strategy, sent)]]
        for sent in (AT_ONCE, IN_RESOLVE)
    )
    reductions = [taken["reduce"] for taken in measured[Case("exchange", "", strategy)]]
    gains = [there - here for here, there in zip(early, late, strict=True)]
    return {
        "operation": "gain",
        "mode": mode,
        "strategy": strategy,
        "gain": quartiles(gains),
        "of_the_reduction": statistics.median(gains) / statistics.median(reductions),
        "of_the_step": statistics.median(gains) / statistics.median(late),
        "rounds_with_a_gain": sum(gain > 0 for gain in gains),
        "rounds": len(gains),
    }


def notes_of(figure: Figure) -> str:
    """Return an exchange, or a gain."""
    if "gain" in figure:
        parts = "{of_the_reduction:.0%} of the reduction, {of_the_step:.1%} of the step, in "
        parts += "{rounds_with_a_gain} of {rounds} rounds"
        return f"{timed('gain')(figure)}: {parts.format_map(figure)}"
    if "reduce" in figure:
        return f"reduce {timed('reduce')(figure)}, gather {timed('gather')(figure)}"
    return ""


COLUMNS = (
    Column("  step", 12, lambda figure: f"  {figure['operation']}", left=True),
    Column("mode", 10, text("mode"), left=True),
    Column("strategy", 9, text("strategy"), left=True),
    Column("sent", 12, text("sent"), left=True),
    Column("step", 26, timed("step")),
    Column("resolve", 26, timed("resolve")),
    Column("exposed", 26, timed("exposed")),
    Column("", 0, notes_of),
)
BENCHMARK = Benchmark(__doc__.splitlines()[0], COLUMNS, figures, add_arguments, check)
