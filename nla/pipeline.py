"""One run: validate, sign, load, measure, fit, swap, measure again, record."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from nla import report
from nla.cache import digest, exclusive, tensor_digest, write_atomically
from nla.config import Request, prepare
from nla.errors import UserError
from nla.fitting import fit_model
from nla.methods.base import Fit
from nla.models.causal_lm import DTYPES, LanguageModel
from nla.record import (
    FitRecord,
    Parameters,
    PlanRecord,
    RunRecord,
    TermRecord,
    code_digest,
    computing_packages,
    environment,
    read_record,
    signature,
    write_line,
)
from nla.select import linear_specs
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
        plan=[PlanRecord(name=e.spec.name, n_params=e.n_params, h=e.h, r=e.r) for e in request.plan],
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
        weights = digest({name: tensor_digest(p) for name, p in model.module.state_dict().items()})
    before = count(model.module)

    with timed(record, "dense"):
        evaluate(request, record, model, "dense", [weights])
    with timed(record, "fit"):
        fits, keys = fit(request, record, model.module, folder)
        swap(model.module, fits)
    record.parameters = parameters(request, fits, before, count(model.module))
    with timed(record, "compressed"):
        evaluate(request, record, model, "compressed", [weights, keys])


def evaluate(request: Request, record: RunRecord, model: LanguageModel, stage: str, made_from: list[Any]) -> None:
    """Measure the model as it is now; what was measured before, with the same of everything, is read from the cache."""
    task = request.task
    state = digest(
        {
            "made_from": made_from,
            "architecture": request.model.configuration(request.cache),
            "dtype": request.values["dtype"],
            "device": request.device.partition(":")[0],
            "code": code_digest(*EVALUATION_CODE),
            "packages": computing_packages(),
        }
    )
    figures = task.evaluate(model, request.cache, state, stage)
    record.metrics[stage] = {task.name: {task.data.name: figures}}
    record.peak_bytes[stage] = int(figures["peak_bytes"])
    request.tracker.metrics(f"{stage}/{task.name}/{task.data.name}", figures)


def fit(request: Request, record: RunRecord, model: nn.Module, folder: Path) -> tuple[dict[str, Fit], dict[str, str]]:
    """Fits of all planned matrices and their cache keys; each is on disk and tracked as soon as it is there."""
    fits, keys = {}, {}
    settings = request.values["method"]
    with (folder / "fits.jsonl").open("w") as lines:
        for name, key, result in fit_model(
            model, request.plan, request.method, settings, request.values["seed"], request.cache
        ):
            fits[name] = result
            keys[name] = key
            entry = fit_record(name, result)
            record.fits.append(entry)
            write_line(lines, entry.model_dump() | {"losses": result.losses})
            request.tracker.fit(name, result)
    record.peak_bytes["fit"] = max(f.peak_bytes for f in fits.values())
    return fits, keys


def fit_record(name: str, fit: Fit) -> FitRecord:
    figures = {k: getattr(fit, k) for k in FitRecord.model_fields if k not in ("name", "shape", "terms")}
    first = fit.terms[0][1]
    terms = [TermRecord(kernel=kernel.name, h=t.h, r=t.r) for kernel, t in fit.terms]
    return FitRecord(name=name, shape=(first.out_features, first.in_features), terms=terms, **figures)


def parameters(request: Request, fits: dict[str, Fit], before: int, after: int) -> Parameters:
    """Counts before and after; what is not selected, biases included, is the same in both."""
    selected = sum(e.spec.n_params for e in request.plan)
    kept = sum(f.n_params for f in fits.values())
    size = DTYPES[request.values["dtype"]].itemsize
    return Parameters(
        selected_before=selected,
        selected_after=kept,
        model_before=before,
        model_after=after,
        ratio=1 - kept / selected,
        model_ratio=1 - after / before,
        bytes_before=before * size,
        bytes_after=after * size,
    )


def draw(record: RunRecord, folder: Path) -> None:
    """The figure that W&B shows too."""
    from analysis.plots import loss_by_layer
    from analysis.records import fits_frame

    loss_by_layer(fits_frame([record])).savefig(folder / "loss_by_layer.png", dpi=120)


@contextmanager
def timed(record: RunRecord, stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    record.seconds[stage] = time.perf_counter() - begun
