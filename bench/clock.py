"""How the bench takes times: in turn, over memory that no cache holds, beside a copy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Run = Callable[[], object]

LEAST_ROUNDS, MOST_ROUNDS = 5, 31
# A round is far longer than the clock's grain.
SECONDS_OF_A_ROUND = 0.003
# The tensors of a lap are so many times as large as the cache: when the lap comes back to the
# first of them, nothing of it is left there.
LAP_OVER_CACHE = 4
# Replays of a graph before the clock starts: while the device is busy with them the host gets
# ahead of it.
LEAD = 3
# A longer copy goes over the same memory again, which is far beyond any cache.
MOST_BYTES_OF_COPY = 1_000_000_000


class Way(NamedTuple):
    """A way of doing something.

    Attributes:
        calls: the same work, each on memory of its own.
        waits: the host waits for the device within: no graph can capture it.
        prepare: what is to be done before each of the calls, which is not timed.
    """

    calls: Sequence[Run]
    waits: bool = False
    prepare: Sequence[Run] = ()


class Clock:
    """Times what runs on a device.

    A lap goes once through all calls of a way. The ways take turns, round by round, so that what
    disturbs the machine for a while disturbs them all; a round is some laps of one way.

    On a GPU a lap is a CUDA graph, so that what calls cost the host does not count; of a way that
    waits for the device it is the calls themselves.

    Args:
        device: where it runs.
        seconds: time that the rounds of all ways of one comparison take together, about; there
            are at least 5 rounds and at most 31.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def times(self, ways: Mapping[str, Way]) -> dict[str, list[float]]:
        """Seconds of one call of each way, in every round."""
        timers = {name: self.timer_of(way) for name, way in ways.items()}
        repetitions, longest = {}, 0.0
        for name, timer in timers.items():
            timer(1)  # the first is not like the others
            once = timer(1)
            repetitions[name] = max(1, math.ceil(SECONDS_OF_A_ROUND / max(once, 1e-7)))
            longest += once * repetitions[name]
        rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(self.seconds / longest)))
        taken: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(rounds):
            for name, timer in timers.items():
                taken[name].append(timer(repetitions[name]) / len(ways[name].calls))
        return taken

    def timer_of(self, way: Way) -> Callable[[int], float]:
        """Seconds of a lap, as the mean of so many."""
        if way.prepare:
            return lambda repetitions: self.prepared_seconds(way, repetitions)
        lap = self.lap_of(way)
        return lambda repetitions: self.lap_seconds(lap, repetitions)

    def lap_of(self, way: Way) -> Run:
        """One call after the other; on a GPU as a graph where that can be had."""

        def lap() -> None:
            for call in way.calls:
                call()

        if self.device.type != "cuda" or way.waits:
            return lap
        lap()  # a capture cannot compile, or make the tables that kernels look up
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lap()
        return graph.replay

    def lap_seconds(self, lap: Run, repetitions: int) -> float:
        """Seconds of a lap, mean of so many."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repetitions):
                lap()
            return (time.perf_counter() - start) / repetitions
        for _ in range(min(LEAD, repetitions)):
            lap()
        start_event, end_event = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start_event.record()
        for _ in range(repetitions):
            lap()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)) / 1e3 / repetitions

    def prepared_seconds(self, way: Way, repetitions: int) -> float:
        """The same where each call has to be prepared; on a GPU with the wait for its end."""
        taken = 0.0
        for _ in range(repetitions):
            for prepare, call in zip(way.prepare, way.calls, strict=True):
                prepare()
                self.wait()
                start = time.perf_counter()
                call()
                self.wait()
                taken += time.perf_counter() - start
        return taken / repetitions

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def host_times(self, run: Run, calls: int = 20) -> list[float]:
        """Seconds that the host takes to issue one call; the device may be at work still."""
        taken = []
        for _ in range(MOST_ROUNDS + 1):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):  # few enough that no launch waits for a full queue
                run()
            taken.append((time.perf_counter() - start) / calls)
        return taken[1:]


def copies(bytes_moved: int, count: int, device: torch.device) -> Way:
    """Calls that each read half of so many bytes and write half, `count` of them on memory apart.

    torch writes a large copy past the CPU's cache.
    """
    times = max(1, math.ceil(bytes_moved / (2 * MOST_BYTES_OF_COPY)))
    half = max(1, bytes_moved // 2 // times)
    source = torch.ones(half * count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy_of(place: int) -> Run:
        piece = slice(place * half, (place + 1) * half)
        pair = target[piece], source[piece]

        def copy() -> None:
            for _ in range(times):
                pair[0].copy_(pair[1])

        return copy

    return Way([copy_of(place) for place in range(count)])


def laps_of(bytes_of_one: int, cache: int) -> int:
    """On how many pieces of memory in turn a call of so many bytes is timed."""
    return max(1, math.ceil(LAP_OVER_CACHE * cache / max(1, bytes_of_one)))


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}
