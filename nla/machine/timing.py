"""Seconds of several computations that take turns, so that a drift of the machine's speed affects all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils.benchmark import Timer

Turns = list[list[float]]  # seconds of each timing, in each round


def in_turns(works: Mapping[str, Callable[[], Any]], rounds: Iterable[Any], seconds: float) -> dict[str, Turns]:
    """Seconds of each work in each round, on all of torch's threads.

    torch's Timer calls a work before it is timed, because the others have emptied the processor's caches, and waits for a GPU.

    Args:
        rounds: one item per round, for example a range or a progress bar.
        seconds: of measuring a work in each round, at least.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("work()", globals={"work": work}, num_threads=threads) for name, work in works.items()}
    times: dict[str, Turns] = {name: [] for name in works}
    for _ in rounds:
        for name, timer in timers.items():
            times[name].append(list(timer.blocked_autorange(min_run_time=seconds).times))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def quartiles_of_timings(turns: Turns) -> tuple[float, float, float]:
    """Quartiles of all timings of all rounds."""
    return quartiles([seconds for turn in turns for seconds in turn])


def quartiles_of_ratio(turns: Turns, base: Turns) -> tuple[float, float, float]:
    """Quartiles, over the rounds, of the ratio of the medians of two works."""
    return quartiles([median(own) / median(other) for own, other in zip(turns, base, strict=True)])
