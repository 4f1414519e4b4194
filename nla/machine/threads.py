"""Independent computations in parallel, one processor thread each, so that results do not depend on the thread count."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nla.machine.ending import stopping

MOST = 16  # largest number of workers: each holds its own logits or factorisation, so more would need too much memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def workers(device: torch.device) -> int:
    """How many items `ordered_map` works on at a time."""
    return min(torch.get_num_threads(), MOST) if device.type == "cpu" else 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Generator[Result, None, None]:
    """Results of function(item), in the order of the items. The CPU has a worker per torch thread, a GPU has one.

    The first failure stops the rest. Close the generator to stop it early; then only a process that is told to stop does not
    wait for the items at work. A PeakMemory of the caller also counts the workers' tensors.
    """
    if device.type != "cpu":
        yield from map(function, items)  # in this thread; the next item starts when the caller asks for its result
        return
    threads = torch.get_num_threads()
    watching = _get_current_dispatch_mode_stack()

    def watched(item: Item) -> Result:
        with ExitStack() as modes:
            for mode in watching:
                modes.enter_context(mode)
            return function(item)

    pool = ThreadPoolExecutor(workers(device), initializer=torch.set_num_threads, initargs=(1,))
    try:
        torch.set_num_threads(1)
        yield from pool.map(watched if watching else function, items)
    finally:
        pool.shutdown(wait=not stopping.is_set(), cancel_futures=True)
        torch.set_num_threads(threads)
