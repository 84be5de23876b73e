"""Does it help to send a task's row to the other ranks before the window is over?

    python bench/overlap.py [--ranks 2] [--output FILE.json]    # starts its processes
    torchrun --nproc-per-node N bench/overlap.py                # a GPU each and NCCL, or gloo

A step is a window of micro-batches and the optimizer's step. It is timed with rows sent as soon as
nothing is added to them ("at once"), and with all of them sent in `resolve()`; beside them plain
accumulation under DistributedDataParallel (`no_sync`, gradients reduced in the last backward pass),
and each of these "alone": all ranks at work side by side, but each in a process group of its own.
The ways take turns step by step, in the opposite order every other round. Before the clock runs,
parameters are compared to the bit.

    step      from a barrier to the end of the step, on the rank that takes longest
    resolve   time in `resolve()`, which the last `backward` of a window ends with, on the rank that
              is in it for the shortest: others wait for it
    exposed   what a step takes longer than alone. Of "shard" alone's `resolve()` counts for the
              part of it that a rank has: 1 of as many as there are ranks
    gain      what a step takes longer with rows sent in `resolve()`
    exchange  the same collectives with nothing else going on: rows, and the gathered result

Differences are taken round by round. Of K rows sent at once the last can never be hidden; of shards
on CPUs one row alone is sent at once: the host would have to wait for it before it sends the next.

Ranks on one machine exchange through its memory, which takes the cores that compute. A network of
some rate, which takes none, is had on Linux in a namespace of its own (as root):

    unshare -n sh -c 'ip link set lo up
        tc qdisc add dev lo root tbf rate 4gbit burst 1mb latency 100ms
        python bench/overlap.py --tasks 4 --batch 256 --rounds 8 --link "4 Gbit/s, by tc"'
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gcond_kernels
from gcond_kernels import GCondFused

MODES = ("exact", "stochastic")
SYNCS = ("shard", "replicate")
AT_ONCE, IN_RESOLVE = "at once", "in resolve()"
# In the first window nothing is sent early: the ranks have yet to compare their parameters.
CHECKED_WINDOWS = 4
WARM_UP = 2
RATE = 1e-3

Times = dict[str, float]
Figure = dict[str, Any]


class Way(NamedTuple):
    """How a step is made, or what is exchanged."""

    what: str
    mode: str = ""
    sync: str = ""
    rows: str = ""


def main(given=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes; torchrun has its own")
    parser.add_argument("--tasks", type=int, default=2, help="number of tasks K")
    parser.add_argument("--accumulation-steps", type=int, default=4, help="micro-batches A")
    parser.add_argument("--batch", type=int, default=32, help="samples in a micro-batch")
    parser.add_argument("--width", type=int, default=1024, help="of each layer")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=16, help="steps of every way")
    parser.add_argument("--link", default="as it is", help="between the ranks; noted as it is said")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    arguments = parser.parse_args(given)
    arguments.ranks = int(os.environ.get("WORLD_SIZE", arguments.ranks))
    if arguments.ranks < 2 or arguments.rounds < 2:
        parser.error("it takes two ranks, and two rounds")
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]), "env://", arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            work, (f"file://{folder}/store", arguments), nprocs=arguments.ranks
        )


def work(rank: int, store: str, arguments: argparse.Namespace) -> None:
    """What one rank does."""
    device = join(rank, store, arguments.ranks)
    try:
        measured = Rank(arguments, device).measure()
        if rank == 0:
            report(measured, arguments, device)
    finally:
        dist.destroy_process_group()


def join(rank: int, store: str, size: int) -> torch.device:
    """Joins the other ranks; returns the device of this one."""
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
    """A model and its optimizer in one process group.

    Attributes:
        sent: rows that were on their way, or there, when the last window was full.
    """

    def __init__(
        self, model: DistributedDataParallel, optimizer: GCondFused, micro_batches: "MicroBatches"
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.micro_batches = micro_batches
        self.sent = 0
        self._full = self._resolved = 0.0

    def step(self, rows: str = AT_ONCE) -> Times:
        """A window and its step."""
        optimizer, now = self.optimizer, self.micro_batches.now
        with self._sending(rows), mock.patch.object(optimizer, "resolve", self._resolve):
            start = now()
            for x in self.micro_batches.inputs:
                losses = self.micro_batches.losses(self.model(x))
                optimizer.backward({task: losses[task] for task in optimizer.active_tasks})
            optimizer.step()
            return {"step": now() - start, "resolve": self._resolved - self._full}

    def _resolve(self) -> None:
        """What the last `backward` of a window calls, by the clock; then `step`, for nothing."""
        if self.optimizer._window.resolved:
            return
        self.sent = self.optimizer._strategy.sent
        self._full = self.micro_batches.now()
        GCondFused.resolve(self.optimizer)
        self._resolved = self.micro_batches.now()

    def exchange(self) -> Times:
        """The collectives of a window by themselves; what is in the rows is of no use then."""
        strategy: Any = self.optimizer._strategy
        now = self.micro_batches.now
        start = now()
        for task in range(len(self.micro_batches.targets)):
            strategy._start_reduction(task).wait()
            strategy._finish_reduction(task)
        there = now()
        strategy.gather(strategy.local_gradients(torch.ones(()), 0.0))
        return {"rows": there - start, "gather": now() - there}

    def _sending(self, rows: str) -> AbstractContextManager[object]:
        if rows == AT_ONCE:
            return nullcontext()
        return mock.patch.object(self.optimizer._strategy, "mark_complete", return_value=None)


class MicroBatches:
    """What every step of a rank sees."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(dist.get_rank())
        shape = arguments.accumulation_steps, arguments.batch, arguments.width
        self.device = device
        self.inputs = torch.randn(shape, generator=generator).to(device)
        targets = torch.randn(arguments.tasks, arguments.width, generator=generator)
        targets -= 1.1 * targets.mean(0)  # there is a conflict to resolve
        self.targets = {f"task {k}": target.to(device) for k, target in enumerate(targets)}

    def losses(self, y: Tensor) -> dict[str, Tensor]:
        """The loss of every task; autograd goes through those alone that are taken."""
        return {task: (y - target).square().mean() for task, target in self.targets.items()}

    def now(self) -> float:
        """The time when what was given to the device until now is done."""
        if self.device.type == "cuda":
            # Not the whole device: what is still exchanged on another stream is not waited for.
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()


class Rank:
    """All that one rank measures."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments = arguments
        self.device = device
        self.micro_batches = MicroBatches(arguments, device)
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self.alone = groups[dist.get_rank()]

    def measure(self) -> dict[Way, list[Times]]:
        """Times of every way, round by round, over all ranks."""
        ways = self.plain_ways()
        for mode in MODES:
            ways |= self.ways(mode)
        times: dict[Way, list[Times]] = {way: [] for way in ways}
        begin = time.perf_counter()
        for number in range(WARM_UP + self.arguments.rounds):
            if number == WARM_UP:
                begin = time.perf_counter()
            for way in list(ways) if number % 2 else reversed(ways):
                self.barrier()
                taken = ways[way]()
                if number >= WARM_UP:
                    times[way].append(taken)
            self.tell_progress(number + 1 - WARM_UP, time.perf_counter() - begin)
        return over_ranks(times)

    def ways(self, mode: str) -> dict[Way, Callable[[], object]]:
        """Steps of GCondFused in one mode."""
        alone = self.training(mode, None, self.alone)
        ways: dict[Way, Any] = {Way("GCondFused", mode, "alone"): alone.step}
        for sync in SYNCS:
            training = self.checked_training(mode, sync)
            for rows in (AT_ONCE, IN_RESOLVE):
                # Both are the same training: they differ in nothing else.
                ways[Way("GCondFused", mode, sync, rows)] = bound(training.step, rows)
            if mode == MODES[0]:
                ways[Way("exchange", "", sync)] = training.exchange
        return ways

    def plain_ways(self) -> dict[Way, Any]:
        """Steps of plain accumulation of the sum of the losses."""
        groups = {"alone": self.alone, "DDP": None}
        return {Way("plain", "", sync): self.plain_step(group) for sync, group in groups.items()}

    def checked_training(self, mode: str, sync: str) -> Training:
        """A training of which it was seen that sending rows early changes no bit.

        Raises:
            RuntimeError: it does change some; or nothing was sent early.
        """
        self.say(f"{mode}, {sync}: comparing parameters")
        early, late = self.training(mode, sync), self.training(mode, sync)
        for window in range(CHECKED_WINDOWS):
            early.step()
            late.step(IN_RESOLVE)
            # On a host one shard is sent early: the next goes where its row was, if that arrived.
            least = 0 if window == 0 else 1 if sync == "shard" else len(self.micro_batches.targets)
            if early.sent < least or late.sent > 0:
                raise RuntimeError(f"{mode}, {sync}: {early.sent} and {late.sent} rows were sent")
        for (name, here), there in zip(
            early.model.named_parameters(), late.model.parameters(), strict=True
        ):
            if not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
                raise RuntimeError(f"{mode}, {sync}: {name} differs")
        return early

    def training(self, mode: str, sync: str | None, group: Any = None) -> Training:
        """A training from the same start as any other."""
        model = self.model(group)
        options: dict[str, Any] = {"mode": mode, "sync": sync}
        optimizer = GCondFused(
            torch.optim.SGD(model.parameters(), lr=RATE),
            dict.fromkeys(self.micro_batches.targets, 1.0),
            accumulation_steps=self.arguments.accumulation_steps,
            module=model,
            **options,
        )
        return Training(model, optimizer, self.micro_batches)

    def model(self, group: Any) -> DistributedDataParallel:
        """A stack of linear layers, the same on every rank."""
        torch.manual_seed(0)
        width = self.arguments.width
        layers = [[nn.Linear(width, width), nn.Tanh()] for _ in range(self.arguments.layers)]
        stack = nn.Sequential(*itertools.chain.from_iterable(layers)).to(self.device)
        return DistributedDataParallel(stack, process_group=group)

    def plain_step(self, group: Any) -> Callable[[], Times]:
        """A window of plain accumulation, and its step."""
        model, data = self.model(group), self.micro_batches
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        last = len(data.inputs) - 1

        def step() -> Times:
            start = data.now()
            for i, x in enumerate(data.inputs):
                with model.no_sync() if i < last else nullcontext():
                    loss = torch.stack(list(data.losses(model(x)).values())).sum()
                    (loss / len(data.inputs)).backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"step": data.now() - start}

        return step

    def barrier(self) -> None:
        """All ranks come here, and all devices have done what they were given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier()

    def say(self, text: str) -> None:
        """A line from the first rank."""
        if dist.get_rank() == 0:
            print(text, flush=True)

    def tell_progress(self, done: int, seconds: float) -> None:
        """How far it is, and how long it will take."""
        rounds = self.arguments.rounds
        if done > 0:
            left = seconds / done * (rounds - done)
            self.say(f"round {done} of {rounds}, {left:.0f} s left")


def bound(step: Callable[[str], Times], rows: str) -> Callable[[], Times]:
    return lambda: step(rows)


def over_ranks(times: dict[Way, list[Times]]) -> dict[Way, list[Times]]:
    """One time for all ranks: the longest, but the shortest of what they wait in for each other."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, times)
    choice = {"resolve": min}
    return {
        way: [
            {key: choice.get(key, max)(rank[way][i][key] for rank in said) for key in taken}
            for i, taken in enumerate(own)
        ]
        for way, own in times.items()
    }


def report(
    measured: dict[Way, list[Times]], arguments: argparse.Namespace, device: torch.device
) -> None:
    """Prints the figures, and writes them."""
    figures = [figure_of(way, measured) for way in measured]
    gains = [gain_of(mode, sync, measured) for mode in MODES for sync in SYNCS]
    machine = {
        "device": device_name(device),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # the ranks themselves are in it
        "backend": dist.get_backend_config(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcond_kernels": gcond_kernels.__version__,
    }
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    settings["parameters"] = arguments.layers * arguments.width * (arguments.width + 1)
    print(", ".join(f"{key} {value}" for key, value in (machine | settings).items()))
    print_tables(figures, gains)
    if arguments.output:
        whole = {"machine": machine, "settings": settings, "figures": figures, "gains": gains}
        arguments.output.write_text(json.dumps(whole, indent=1) + "\n")


def figure_of(way: Way, measured: dict[Way, list[Times]]) -> Figure:
    """The times of one way, and what of its exchange is exposed, in seconds."""
    rounds = measured[way]
    figure: Figure = {key: value for key, value in way._asdict().items() if value}
    figure |= {key: spread([taken[key] for taken in rounds]) for key in rounds[0]}
    if way.what != "exchange" and way.sync != "alone":
        share = dist.get_world_size() if way.sync == "shard" else 1
        alone = [
            taken["step"] - taken.get("resolve", 0.0) * (1 - 1 / share)
            for taken in measured[Way(way.what, way.mode, "alone")]
        ]
        figure["exposed"] = spread(
            [taken["step"] - without for taken, without in zip(rounds, alone, strict=True)]
        )
    return figure


def gain_of(mode: str, sync: str, measured: dict[Way, list[Times]]) -> Figure:
    """What sending rows at once gains, in seconds and as a part of the exchange of the rows."""
    early, late = (
        [taken["step"] for taken in measured[Way("GCondFused", mode, sync, rows)]]
        for rows in (AT_ONCE, IN_RESOLVE)
    )
    gains = [there - here for here, there in zip(early, late, strict=True)]
    exchange = statistics.median(taken["rows"] for taken in measured[Way("exchange", "", sync)])
    return {
        "mode": mode,
        "sync": sync,
        "gain": spread(gains),
        "of_the_rows_exchange": statistics.median(gains) / exchange,
        "of_the_step": statistics.median(gains) / statistics.median(late),
        "rounds_with_a_gain": sum(gain > 0 for gain in gains),
        "rounds": len(gains),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"low": low, "median": median, "high": high}


def print_tables(figures: list[Figure], gains: list[Figure]) -> None:
    columns = ("what", "mode", "sync", "rows")
    keys = ("step", "resolve", "exposed")
    print("\nmilliseconds: median (quartiles)")
    print(line([*columns, *keys]))
    for figure in (figure for figure in figures if figure["what"] != "exchange"):
        named = [figure.get(column, "") for column in columns]
        print(line([*named, *(shown(figure.get(key)) for key in keys)]))
    print("\n" + line(["exchange", "", "sync", "", "rows", "gather"]))
    for figure in (figure for figure in figures if figure["what"] == "exchange"):
        print(line(["", "", figure["sync"], "", shown(figure["rows"]), shown(figure["gather"])]))
    print("\n" + line(["gain", "mode", "sync", "", "", "of rows' exchange", "of the step"]))
    for gain in gains:
        parts = [f"{gain['of_the_rows_exchange']:.0%}", f"{gain['of_the_step']:.1%}"]
        print(line(["", gain["mode"], gain["sync"], "", shown(gain["gain"]), *parts]))
        print(f"{'':<12}in {gain['rounds_with_a_gain']} of {gain['rounds']} rounds")


def line(cells: Sequence[str]) -> str:
    widths = (12, 12, 11, 14, 26, 26, 26)
    return "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


def shown(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    low, median, high = (figure[key] * 1e3 for key in ("low", "median", "high"))
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        from bench.record import cpu_name
    except ImportError:  # which draws its tables with rich
        return platform.machine()
    return cpu_name()


if __name__ == "__main__":
    main()
