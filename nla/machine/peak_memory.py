"""Peak memory: allocator bytes on CUDA, bytes of live tensors on the CPU."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class PeakMemory:
    """Context that measures peak memory. After it, `peak_bytes` is the largest increase over the memory in use at its start.

    On the CPU it counts the storages of tensors that the block creates, in this thread and its workers, from the moment an
    operation returns them until they are freed. Workspace inside an operation is not counted. The figure is exact, and with
    one thread it is the same on every run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._live = LiveTensors()
            self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._live.__exit__(*exc)
            self.peak_bytes = self._live.peak_bytes


class LiveTensors(TorchDispatchMode):
    """Adds up the bytes of storages that operations return, and subtracts them when they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref] = {}
        self._lock = threading.RLock()  # a tensor may be freed while another is counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {id_of(tensor) for tensor in tensors_in((*args, *kwargs.values()))}
        result = func(*args, **kwargs)
        for tensor in tensors_in((result,)):
            if id_of(tensor) not in before:
                self._add(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            with self._lock:
                self.live_bytes -= size
                self._known.pop(key, None)

        with self._lock:
            if key not in self._known:
                self._known[key] = weakref.ref(storage, freed)
                self.live_bytes += size


def unmeasured() -> AbstractContextManager:
    """A context whose operations PeakMemory does not see on the CPU, where it takes longer than a small operation does.

    It is for loops of small operations: their tensors must be small beside those around the loop, and not outlive it.
    """
    return _disable_current_modes()


def measured_once(number: int) -> AbstractContextManager:
    """The context of a pass of a loop whose passes need as much memory as the first, number 0: only that one is measured."""
    return unmeasured() if number else nullcontext()


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, also in lists. torch's own walk is many times slower."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)


def id_of(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage."""
    return tensor.untyped_storage()._cdata
