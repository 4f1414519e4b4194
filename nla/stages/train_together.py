"""Retrain one model in several processes. Each of them is started as `python -m nla.stages.train_together FILE`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nla.compressed.surgery import set_form, swap
from nla.harness.request import PreparedRun, prepare
from nla.machine.ending import die_with_parent, kill_tree
from nla.machine.errors import NonFiniteError, UserError
from nla.machine.files import write_atomically
from nla.models.base import Model
from nla.retrain.history import Row
from nla.retrain.trainable import prepare_terms
from nla.stages.train_here import train_here
from nla.terms.state import unpack
from nla.training.processes import SeveralProcesses

ROW = "row of the history: "
KINDS = {"UserError": UserError, "NonFiniteError": NonFiniteError}


def train_together(prepared: PreparedRun, key: str, show: Callable[[Row], None]) -> None:
    """Start `retrain.processes` processes, which load the cache's `compressed` terms and store the retrained ones there.

    The first process prints each row of its history, and `show` receives it.

    Raises:
        UserError, NonFiniteError: the first process raised it.
        RuntimeError: the processes failed in another way.
    """
    count = prepared.retraining.processes
    folder = prepared.cache.root / "launches"
    job, failure = folder / f"{key}.json", folder / f"{key}.error.json"
    failure.unlink(missing_ok=True)
    settings = prepared.settings | {"device": prepared.device}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    threads = max(1, torch.get_num_threads() // count)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [*launch, "-m", "nla.stages.train_together", str(job)]
    try:
        write_atomically(job, json.dumps({"settings": settings, "key": key, "failure": str(failure)}).encode())
        with started(command, environment) as process:
            for line in process.stdout or ():
                if line.startswith(ROW):
                    show(json.loads(line.removeprefix(ROW)))
                else:
                    sys.stdout.write(line)
            status = process.wait()
        if failure.exists():
            told = json.loads(failure.read_text())
            raise KINDS[told["kind"]](told["message"])
        if status:
            raise RuntimeError(f"the processes of retrain.processes={count} ended with status {status}; see above")
    finally:
        job.unlink(missing_ok=True)
        failure.unlink(missing_ok=True)


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Context in which a command runs. At its end, also by an error, nothing that the command started is left."""
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)


def take_part(job: dict[str, Any]) -> None:
    """Run one of the processes: load model and terms, and compute this process's share of every step."""
    processes = SeveralProcesses("cpu" if job["settings"]["device"] == "cpu" else "cuda")
    try:
        prepared = prepare(job["settings"] | {"device": processes.device})
        model: Model = prepared.model.load(processes.device, prepared.values["dtype"], prepared.cache)
        entry = prepared.cache.load_tensors("compressed", job["key"])
        assert entry is not None
        terms = unpack({name: tensor.to(processes.device) for name, tensor in entry[0].items()}, entry[1])
        swap(model.module, terms)
        set_form(model.module, prepared.values["forward"])
        prepare_terms(model.module, prepared.retraining.linear_term, prepared.values["seed"])
        train_here(prepared, model, job["key"], say if processes.rank == 0 else lambda row: None, processes)
    except tuple(KINDS.values()) as error:
        if processes.rank == 0:
            told = {"kind": type(error).__name__, "message": str(error)}
            write_atomically(Path(job["failure"]), json.dumps(told).encode())
        sys.exit(1)


def say(row: Row) -> None:
    print(f"{ROW}{json.dumps(row)}", flush=True)


if __name__ == "__main__":
    die_with_parent()
    take_part(json.loads(Path(sys.argv[1]).read_text()))
