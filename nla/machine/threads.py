"""Independent pieces of work side by side, one processor thread each, so that no result depends on the thread count."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

MOST = 16  # each worker holds its own logits or factorisation; memory, not cores, is the limit beyond

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Generator[Result, None, None]:
    """Results in the order of the items. On the CPU as many workers as torch has threads; on a GPU one.

    The first failure stops the rest; close the generator to stop it early. Whatever watches the caller's tensors
    (PeakMemory) watches the workers' too.
    """
    if device.type != "cpu":
        yield from map(function, items)  # here, one after the other: the next does not begin while a result is in use
        return
    threads = torch.get_num_threads()
    watching = _get_current_dispatch_mode_stack()

    def watched(item: Item) -> Result:
        with ExitStack() as modes:
            for mode in watching:
                modes.enter_context(mode)
            return function(item)

    pool = ThreadPoolExecutor(min(threads, MOST), initializer=torch.set_num_threads, initargs=(1,))
    try:
        torch.set_num_threads(1)
        yield from pool.map(watched if watching else function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
