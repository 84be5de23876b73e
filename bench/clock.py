"""The clock: competitors take turns, over memory that no cache holds, beside a copy."""

from __future__ import annotations

import math
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

Run = Callable[[], object]

LEAST_ROUNDS, MOST_ROUNDS = 5, 31
SECONDS_OF_A_ROUND = 0.003
LAP_OVER_CACHE = 4
# Replays of a graph before the clock starts, in which the host gets ahead of the device.
LEAD = 3
# A longer copy goes over the same memory again, which is far beyond any cache.
MOST_BYTES_OF_COPY = 1_000_000_000


class Competitor(NamedTuple):
    """One implementation of an operation."""

    calls: Sequence[Run]  # the same work, each on memory of its own
    synchronizes: bool = False  # within a call: no graph can capture it
    prepare: Sequence[Run] = ()  # before each of the calls, not timed


class Clock:
    """Times what runs on a device.

    A lap goes once through all calls of a competitor, on a GPU as a CUDA graph, so that what calls
    cost the host does not count. Competitors take turns, round by round, so that what disturbs the
    machine for a while disturbs them all, in one order and the other, for what each leaves in the
    caches; a round is some laps of each. The rounds of a comparison take about `seconds` together;
    there are at least `least_rounds` and at most 31.
    """

    def __init__(
        self, device: torch.device, seconds: float, least_rounds: int = LEAST_ROUNDS
    ) -> None:
        self.device, self.seconds, self.least_rounds = device, seconds, least_rounds

    def times(self, competitors: Mapping[str, Competitor]) -> dict[str, list[float]]:
        """Return the seconds of one call of each competitor, in every round."""
        timers = {
            name: partial(self.prepared_seconds, each)
            if each.prepare
            else partial(self.lap_seconds, self.lap_of(each))
            for name, each in competitors.items()
        }
        repetitions, longest = {}, 0.0
        for name, timer in timers.items():
            timer(1)  # the first takes longer
            once = timer(1)
            repetitions[name] = max(1, math.ceil(SECONDS_OF_A_ROUND / max(once, 1e-7)))
            longest += once * repetitions[name]
        rounds = min(MOST_ROUNDS, max(self.least_rounds, int(self.seconds / longest)))
        taken: dict[str, list[float]] = {name: [] for name in timers}
        for number in range(rounds):
            for name in reversed(timers) if number % 2 else timers:
                seconds = timers[name](repetitions[name])
                taken[name].append(seconds / len(competitors[name].calls))
        return taken

    def lap_of(self, competitor: Competitor) -> Run:
        """Return one call after the other; on a GPU as a graph where that is possible."""

        def lap() -> None:
            for call in competitor.calls:
                call()

        if self.device.type != "cuda" or competitor.synchronizes:
            return lap
        lap()  # a capture cannot compile, or make the tables that kernels look up
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lap()
        return graph.replay

    def lap_seconds(self, lap: Run, repetitions: int) -> float:
        """Return the seconds of a lap, mean of so many."""
        if self.device.type != "cuda":
            return timeit.timeit(lap, number=repetitions) / repetitions
        for _ in range(min(LEAD, repetitions)):
            lap()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        for _ in range(repetitions):
            lap()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)) / 1e3 / repetitions

    def prepared_seconds(self, competitor: Competitor, repetitions: int) -> float:
        """Return the seconds of a lap whose calls have to be prepared, mean of so many."""
        taken = 0.0
        for _ in range(repetitions):
            for prepare, call in zip(competitor.prepare, competitor.calls, strict=True):
                prepare()
                taken += self.seconds_of(call)
        return taken / repetitions

    def seconds_of(self, call: Run) -> float:
        """Return the seconds of a call until the device has done it."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def host_times(self, run: Run, calls: int = 20) -> list[float]:
        """Return the seconds that the host takes to issue one call.

        The calls of a round are few enough that no launch waits for a full queue.
        """
        taken = timeit.repeat(run, self.synchronize, repeat=MOST_ROUNDS + 1, number=calls)
        return [each / calls for each in taken[1:]]


def copies(bytes_moved: int, count: int, device: torch.device) -> Competitor:
    """Return calls that each read half of so many bytes and write half, on memory of their own."""
    times = max(1, math.ceil(bytes_moved / (2 * MOST_BYTES_OF_COPY)))
    half = max(1, bytes_moved // 2 // times)
    source = torch.ones(half * count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        for _ in range(times):
            target.copy_(source)

    pairs = zip(source.split(half), target.split(half), strict=True)
    return Competitor([partial(copy, *pair) for pair in pairs])


def laps_of(bytes_of_one: int, cache: int) -> int:
    """Return on how many memories a call of so many bytes is timed, so that none stays cached."""
    return max(1, math.ceil(LAP_OVER_CACHE * cache / max(1, bytes_of_one)))
