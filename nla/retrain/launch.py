"""Several processes that train one model: started here, each is `python -m nla.retrain.launch FILE`."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_reduce, broadcast, reduce

from nla.cache import write_atomically
from nla.config import Request, prepare
from nla.crew import Crew
from nla.errors import NonFiniteError, UserError
from nla.models.base import Model
from nla.retrain.history import Row
from nla.retrain.parts import load_terms, prepare_terms
from nla.retrain.stage import retrain

ROW = "row of the history: "
KINDS = {"UserError": UserError, "NonFiniteError": NonFiniteError}


class Processes(Crew):
    """One process of several, each with a GPU of its own where there are GPUs (accelerate finds and joins them)."""

    def __init__(self, device: str) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device == "cpu")
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = str(self.accelerator.device)

    def total(self, *numbers: float) -> tuple[float, ...]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum(tensor)
        return tuple(tensor.tolist())

    def sum(self, tensor: Tensor) -> None:
        all_reduce(tensor)

    def collect(self, tensor: Tensor, owner: int) -> None:
        reduce(tensor, owner)

    def hand_out(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        for tensor, owner in zip(tensors, owners, strict=True):
            broadcast(tensor, owner)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def retrain_together(request: Request, key: str, show: Callable[[Row], None]) -> None:
    """Have `retrain.processes` processes retrain the model whose terms the cache holds as `compressed`; it has the result too.

    The first of them prints each row of its history, for `show`.

    Raises:
        UserError, NonFiniteError: what the first process raised.
    """
    count = request.retraining.processes
    folder = request.cache.root / "launches"
    job, failure = folder / f"{key}.json", folder / f"{key}.error.json"
    failure.unlink(missing_ok=True)
    settings = request.settings | {"device": request.device}
    write_atomically(job, json.dumps({"settings": settings, "key": key, "failure": str(failure)}).encode())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    threads = max(1, torch.get_num_threads() // count)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [*launch, "-m", "nla.retrain.launch", str(job)]
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
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
        process.kill()
        job.unlink()
        failure.unlink(missing_ok=True)


def die_with_parent() -> None:
    """Have Linux kill this process when the one that started it dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def take_part(job: dict[str, Any]) -> None:
    """One process: the same model from the same cache, and its share of every step."""
    crew = Processes("cpu" if job["settings"]["device"] == "cpu" else "cuda")
    try:
        request = prepare(job["settings"] | {"device": crew.device})
        model: Model = request.model.load(crew.device, request.values["dtype"], request.cache)
        entry = request.cache.load_tensors("compressed", job["key"])
        assert entry is not None
        load_terms(model.module, entry[0], request.method.kernel, crew.device)
        prepare_terms(model.module, request.retraining.linear_term, request.values["seed"])
        retrain(request, model, job["key"], say if crew.rank == 0 else lambda row: None, crew)
    except tuple(KINDS.values()) as error:
        if crew.rank == 0:
            told = {"kind": type(error).__name__, "message": str(error)}
            write_atomically(Path(job["failure"]), json.dumps(told).encode())
        sys.exit(1)


def say(row: Row) -> None:
    print(f"{ROW}{json.dumps(row)}", flush=True)


if __name__ == "__main__":
    die_with_parent()
    take_part(json.loads(Path(sys.argv[1]).read_text()))
