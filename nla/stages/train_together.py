"""Retrain one model in several processes, which are forked from a server that has imported what they need."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from nla.compressed.contents import matrix_terms, other_parameters, replace_parameters
from nla.compressed.surgery import set_form, swap
from nla.harness.request import PreparedRun, prepare
from nla.machine.errors import NonFiniteError, UserError
from nla.models.base import Model
from nla.retrain.history import Row
from nla.retrain.trainable import prepare_terms
from nla.stages.train_here import train_here
from nla.terms.state import pack, unpack
from nla.training.processes import Place, SeveralProcesses


def train_together(prepared: PreparedRun, key: str, show: Callable[[Row], None], modules: Iterable[str]) -> None:
    """Start `retrain.processes` processes, which load the cache's `compressed` model and store the retrained one there.

    Args:
        show: receives each row of the first process's history.
        modules: names of the modules of the model's classes. They are imported once for all processes.

    Raises:
        UserError, NonFiniteError: a process raised it.
        RuntimeError: a process failed in another way.
    """
    # not forked from this process: its threads and its GPU would not work in the copies
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["__main__", __name__, "accelerate", *modules])
    count = prepared.retraining.processes
    threads = max(1, torch.get_num_threads() // count)
    settings = prepared.settings | {"device": prepared.device}
    started: dict[Connection, BaseProcess] = {}
    with TemporaryDirectory() as folder:
        try:
            for rank in range(count):
                told, tell = server.Pipe(duplex=False)
                place = Place(rank, count, Path(folder) / "meeting")
                started[told] = server.Process(target=take_part, args=(place, threads, settings, key, tell))
                started[told].start()
                tell.close()  # the process has its own copy: the pipe ends when the process does
            follow(dict(started), show)
        finally:
            for process in started.values():
                process.kill()
                process.join()


def hand_over(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The cache's `compressed` entry: the terms, and all other parameters, some of which a refinement has changed."""
    tensors, info = pack(matrix_terms(module))
    others = {name: parameter.detach() for name, parameter in other_parameters(module).items()}
    return tensors | others, info | {"others": list(others)}


def take_over(module: nn.Module, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Make the dense model the compressed one that `hand_over` read."""
    swap(module, unpack(tensors, info))
    replace_parameters(module, {name: tensors[name] for name in info["others"]})


def follow(running: dict[Connection, BaseProcess], show: Callable[[Row], None]) -> None:
    """Show the rows that processes send until all processes have ended, or raise the first error."""
    while running:
        for told in wait(list(running)):
            assert isinstance(told, Connection)
            try:
                message = told.recv()
            except EOFError:
                process = running.pop(told)
                process.join()
                if process.exitcode:
                    raise RuntimeError(
                        f"a process of retrain.processes ended with status {process.exitcode}; see above"
                    ) from None
                continue
            if isinstance(message, Exception):
                raise message
            show(message)


def take_part(place: Place, threads: int, settings: dict[str, Any], key: str, tell: Connection) -> None:
    """Run one of the processes: load model and terms, and compute this process's share of every step."""
    Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        processes = SeveralProcesses("cpu" if settings["device"] == "cpu" else "cuda", place)
        prepared = prepare(settings | {"device": processes.device})
        model: Model = prepared.model.load(processes.device, prepared.values["dtype"], prepared.cache)
        entry = prepared.cache.load_tensors("compressed", key)
        assert entry is not None
        take_over(model.module, {name: tensor.to(processes.device) for name, tensor in entry[0].items()}, entry[1])
        set_form(model.module, prepared.values["forward"])
        prepare_terms(model.module, prepared.retraining.linear_term, prepared.values["seed"])
        train_here(prepared, model, key, tell.send if place.rank == 0 else lambda row: None, processes)
    except (UserError, NonFiniteError) as error:
        tell.send(error)


def end_with_parent() -> None:
    """Wait until the process that started this one has ended, and end this one, in whatever it is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
