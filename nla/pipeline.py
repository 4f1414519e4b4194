"""One run: validate, sign, load, measure, learn about inputs, allocate, fit, swap, measure, retrain, measure again, record."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from nla import report
from nla.accounts import draw, fit_record, kept_parameters, parameters, plan_record
from nla.allocation import allocated
from nla.budget.base import PlanEntry
from nla.cache import digest, exclusive, tensor_digest, write_atomically
from nla.config import Request, prepare
from nla.errors import UserError
from nla.fitting import CODE as FIT_CODE
from nla.fitting import fit_matrices
from nla.memory import PeakMemory
from nla.methods.base import Fit
from nla.models.base import Model, Sample
from nla.record import (
    RunRecord,
    code_digest,
    computing_packages,
    environment,
    read_record,
    signature,
    write_line,
)
from nla.retrain.history import Row
from nla.retrain.parts import terms_of
from nla.retrain.result import key_of, retrain_record, retrained
from nla.select import linear_specs
from nla.statistics import StatisticsStore, collect, stream_blocks
from nla.surgery import count, swap

EVALUATION_CODE = (
    "tasks",
    "nla/kernels",
    "nla/models",
    "nla/layers.py",
    "nla/memory.py",
    "nla/surgery.py",
    "nla/triplets.py",
    "nla/workers.py",
)


def run(settings: dict[str, Any]) -> RunRecord | None:
    """Carry out a request of checked settings, or answer from the record of a finished run; None after a dry run.

    Raises:
        UserError: the request cannot be met; nothing long was begun.
        NonFiniteError: a matrix or a loss is not finite.

    Whatever ends a run early, its record says `failed` and why, and what was done stays in the cache.
    """
    request = prepare(settings)
    if request.values["dry_run"]:
        report.show_plan(request)
        return None
    name = signature(request.values, request.inputs)
    folder = Path(request.values["outputs_dir"]) / "runs" / name
    with exclusive(folder / ".lock"):
        if (folder / "record.json").exists():
            record = read_record(folder / "record.json")
            if record.status == "done":
                report.show_result(record, folder, "from the record; delete its folder to run again")
                return record
        request.check_inputs()
        return carry_out(request, name, folder)


def carry_out(request: Request, name: str, folder: Path) -> RunRecord:
    """All stages of a run that is not done."""
    record = RunRecord(
        signature=name,
        status="running",
        config=request.values,
        environment=environment(request.device),
        plan=plan_record(request.plan),
    )
    record.write(folder)
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(request.values).encode())
    report.announce(request)
    try:
        request.tracker.begin(record, Path(request.values["outputs_dir"]))
        stages(request, record, folder)
        draw(record, folder)
        record.status = "done"
    except BaseException as error:
        record.status, record.error = "failed", str(error) or type(error).__name__
        raise
    finally:
        record.finished = datetime.now(UTC).isoformat(timespec="seconds")
        record.write(folder)
        request.tracker.finish(record, folder)
    report.show_result(record, folder)
    return record


def stages(request: Request, record: RunRecord, folder: Path) -> None:
    with timed(record, "load"):
        model = request.model.load(request.device, request.values["dtype"], request.cache)
        if linear_specs(model.module) != request.inventory.linears:
            raise UserError("the weights are not of the architecture that the model's configuration describes")
    before, dense = count(model.module), state_of(request, model)

    with timed(record, "dense"):
        evaluate(request, record, model, "dense", dense)
    with timed(record, "statistics"):
        samples, store = sample(request, model, dense)
        if request.method.needs and not request.method.sequential:
            record.peak_bytes["statistics"] = measure_inputs(request, model, samples, store)
    with timed(record, "allocate"):
        request = allocated(request, model, samples, store)
        record.plan = plan_record(request.plan)
    with timed(record, "fit"):
        fit(request, record, model, samples, store, folder)
    compressed = state_of(request, model)
    with timed(record, "compressed"):
        evaluate(request, record, model, "compressed", compressed)
    if request.retraining.steps:
        with timed(record, "retrain"):
            retrain_and_drop(request, record, model, folder, key_of(request, compressed, dense))
        with timed(record, "retrained"):
            evaluate(request, record, model, "retrained", state_of(request, model))
    record.parameters = parameters(request, before, count(model.module), kept_parameters(model))


def state_of(request: Request, model: Model) -> str:
    """Digest of everything a measurement of the model as it is now depends on, but for the data."""
    terms = {name: [m.kernel.name, vars(m.kernel)] for name, m in terms_of(model.module).items()}
    return digest(
        {
            "tensors": {name: tensor_digest(p) for name, p in model.module.state_dict().items()},
            "terms": terms,
            "architecture": request.model.configuration(request.cache),
            "device": request.device.partition(":")[0],
            "code": code_digest(*EVALUATION_CODE),
            "packages": computing_packages(),
        }
    )


def evaluate(request: Request, record: RunRecord, model: Model, stage: str, state: str) -> None:
    """Measure the model as it is now; what was measured before in this state is read from the cache."""
    metrics = record.metrics.setdefault(stage, {})
    for task in request.tasks:
        metrics[task.name] = task.evaluate(model, request.cache, state, stage)
        for data, figures in metrics[task.name].items():
            peak = int(figures.get("peak_bytes", 0))
            record.peak_bytes[stage] = max(record.peak_bytes.get(stage, 0), peak)
            request.tracker.metrics(f"{stage}/{task.name}/{data}", figures)


def sample(request: Request, model: Model, state: str) -> tuple[list[Sample], StatisticsStore]:
    """The calibration samples, and where the statistics made from them are; nothing if none are read."""
    if not request.calibrates:
        return [], StatisticsStore(request.cache, "")
    asked = request.values["statistics"]
    samples = request.calibration.samples(model, asked["windows"], asked["length"], asked["seed"])
    made_from: list[Any] = [state, [[tensor_digest(t) for t in s] for s in samples], asked["fisher_windows"]]
    if request.method.sequential:  # what a block reads depends on the fits before it
        budgets = [[entry.spec.name, entry.n_params] for entry in request.plan]
        made_from += [budgets, request.values["method"], request.values["seed"], code_digest(*FIT_CODE)]
    code = code_digest("nla/statistics.py", "nla/fisher.py", "nla/blocks.py", "nla/workers.py")
    return samples, StatisticsStore(request.cache, digest([made_from, code]))


def measure_inputs(request: Request, model: Model, samples: list[Sample], store: StatisticsStore) -> int:
    """Collect what the method needs; the peak bytes."""
    asked = request.values["statistics"]
    kinds = request.method.needs.union(asked["collect"])
    with request.cache.lock("statistics", store.made_from), PeakMemory(torch.device(request.device)) as memory:
        collect(model, request.layers, kinds, samples, asked["fisher_windows"], store, asked["offload"])
    return memory.peak_bytes


def fit(request: Request, record: RunRecord, model: Model, samples: list[Sample], store: StatisticsStore, folder: Path) -> None:
    """Fit and swap all planned matrices; each fit is on disk and tracked as soon as it is there."""
    with (folder / "fits.jsonl").open("w") as lines, progress(request) as bar:
        for part in parts(request, model, samples, store):
            fits: dict[str, Fit] = {}
            settings, seed = request.values["method"], request.values["seed"]
            for name, result in fit_matrices(model.module, part, request.method, settings, seed, store, bar):
                fits[name] = result
                entry = fit_record(name, result)
                record.fits.append(entry)
                write_line(lines, entry.model_dump() | {"losses": result.losses})
                request.tracker.fit(name, result)
            swap(model.module, fits)
    record.peak_bytes["fit"] = max(f.peak_bytes for f in record.fits)


def parts(request: Request, model: Model, samples: list[Sample], store: StatisticsStore) -> Iterator[list[PlanEntry]]:
    """What is fitted before it is swapped in: everything, or one block after the other."""
    if not request.method.sequential:
        yield request.plan
        return
    offload = request.values["statistics"]["offload"]
    for block in stream_blocks(model, request.layers, request.method.needs, samples, store, offload):
        yield [entry for entry in request.plan if entry.spec.name in block.layers]


def progress(request: Request) -> tqdm:
    total = sum(e.spec.n_params for e in request.plan)
    return tqdm(total=total, desc="fit", unit="param", unit_scale=True, dynamic_ncols=True)


def retrain_and_drop(request: Request, record: RunRecord, model: Model, folder: Path, key: str) -> None:
    """Retrain, or take the result of a finished retraining; masked triplets are gone afterwards."""
    fitted = kept_parameters(model)
    with (folder / "steps.jsonl").open("w") as lines:

        def show(row: Row) -> None:
            write_line(lines, row)
            request.tracker.step(row)

        result = retrained(request, model, key, show)
    record.peak_bytes["retrain"] = result.peak_bytes
    record.retraining = retrain_record(request, model, result, fitted, kept_parameters(model))


@contextmanager
def timed(record: RunRecord, stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    record.seconds[stage] = time.perf_counter() - begun
