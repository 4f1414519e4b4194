"""One run: check, load, evaluate, collect statistics, allocate the budget, fit, evaluate, retrain, evaluate, save, record."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nla.compressed.contents import count_bits, count_parameters
from nla.compressed.surgery import set_form
from nla.harness.record import MadeFrom, RunRecord, finished_record, make_up, run_name, signature
from nla.harness.recording import bits, kept_parameters, parameters
from nla.harness.request import PreparedRun, prepare
from nla.harness.show_plan import announce, show_plan
from nla.harness.show_result import show_result
from nla.harness.unused import tell_unused
from nla.machine.errors import UserError
from nla.machine.files import exclusive, naming, reserved, write_atomically
from nla.machine.provenance import environment
from nla.models.base import Model
from nla.models.select import linear_specs
from nla.models.weights import require_finite
from nla.stages.allocate import allocated
from nla.stages.calibrate import measure_inputs, sample
from nla.stages.continue_prompt import continue_prompt
from nla.stages.draw import draw
from nla.stages.evaluate import evaluate, state_of
from nla.stages.fit import fit
from nla.stages.retrain import key_of, retrain
from nla.stages.save import check_target, is_saved, save, target


def run(settings: dict[str, Any], command: str | None = None, arguments: Sequence[str] = ()) -> RunRecord | None:
    """Carry out a request and return its record, or read the record of a finished run. A dry run returns None.

    If a run fails or is interrupted, its record has the status `failed` and the reason. Finished parts stay in the cache.

    Args:
        settings: checked settings, from `nla.harness.settings.check_settings`.
        command: the command line, for the record.
        arguments: the settings that the user named; a line is logged for each that the request does not use.

    Raises:
        UserError: the request cannot be met, or a file cannot be read or written.
        NonFiniteError: a weight, a fit or a loss is not finite.
    """
    with naming(Path(settings["outputs_dir"])):
        return answer(settings, command, arguments)


def answer(settings: dict[str, Any], command: str | None, arguments: Sequence[str]) -> RunRecord | None:
    prepared = prepare(settings)
    tell_unused(arguments, prepared)
    if prepared.values["dry_run"]:
        show_plan(prepared)
        return None
    prepared.model.inspect(prepared.cache)
    made_from = make_up(prepared.values, prepared.inputs)
    name = signature(prepared.values, made_from)
    folder = Path(prepared.values["outputs_dir"]) / "runs" / run_name(prepared.values, name)
    wanted = target(prepared, folder)
    record = finished_record(folder, name)  # without a lock, so that a folder that may not be written shows it
    if record is None or not is_saved(record, wanted):
        prepared.check_inputs()
        if wanted is not None:
            check_target(prepared, wanted)
        with exclusive(folder / ".lock"):
            record = finished_record(folder, name)  # another process may just have written it
            if record is None or not is_saved(record, wanted):
                kept = files_of(folder) if record else {}
                return carry_out(prepared, name, made_from, command, folder, kept)
    show_result(record, folder, "from the record; delete its folder to run again")
    return record


def carry_out(
    prepared: PreparedRun, name: str, made_from: MadeFrom, command: str | None, folder: Path, kept: dict[str, bytes]
) -> RunRecord:
    """Carry out all stages of a run, and write its record.

    Args:
        kept: the files of the same run if it has finished before, and begins again to save its model. They are put back if it
            fails or is interrupted.
    """
    record = RunRecord(
        signature=name,
        status="running",
        command=command,
        started=now(),
        made_from=made_from,
        environment=environment(prepared.device),
        config=prepared.values,
    )
    try:
        record.write(folder)
        announce(prepared)
        with naming(folder), reserved(folder / ".reserve"):
            write_atomically(folder / "config.yaml", OmegaConf.to_yaml(prepared.values).encode())
            prepared.tracker.begin(record, prepared.plan, Path(prepared.values["outputs_dir"]))
            model = stages(prepared, record, folder)
            draw(record, folder)
            wanted = target(prepared, folder)
            if wanted is not None:
                with timed(record, "save"):
                    save(record, model, wanted)
            record.status, record.finished = "done", now()
            record.write(folder)
    except BaseException as error:
        record.status, record.error, record.finished = "failed", str(error) or type(error).__name__, now()
        with suppress(UserError):  # if the record cannot be written either, the first error is the one to tell
            for file, contents in kept.items():
                write_atomically(folder / file, contents)
            if not kept:
                record.write(folder)
        raise
    finally:
        prepared.tracker.finish(record, folder)
    show_result(record, folder)
    return record


def stages(prepared: PreparedRun, record: RunRecord, folder: Path) -> Model:
    """Carry out all stages that change or measure the model, and return the model."""
    with timed(record, "load"):
        model = prepared.model.load(prepared.device, prepared.values["dtype"], prepared.cache)
        if linear_specs(model.module) != prepared.inventory.linears:
            raise UserError("the weights are not of the architecture that the model's configuration describes")
        require_finite(model.module, "get the weights again, or use a wider dtype=")
        dense = state_of(prepared, model)
        calibration = sample(prepared, model, dense)
        watched = prepared.watched.data if prepared.watched else None
        for data in filter(None, (prepared.retraining.data, watched)):  # a text that is too short is refused now
            data.samples(model, 1, prepared.retraining.length, 0)
    before, dense_bits = count_parameters(model.module), count_bits(model.module)

    measure(prepared, record, model, "dense", dense)
    with timed(record, "statistics"):
        if prepared.dense_needs:
            record.peak_bytes["statistics"] = measure_inputs(prepared, model, calibration)
    with timed(record, "allocate"):
        prepared = allocated(prepared, model, calibration)
    with timed(record, "fit"):
        fit(prepared, record, model, calibration, folder)
    set_form(model.module, prepared.values["forward"])
    record.write(folder)
    compressed = state_of(prepared, model)
    measure(prepared, record, model, "compressed", compressed)
    if prepared.retraining.steps:
        with timed(record, "retrain"):
            retrain(prepared, record, model, folder, key_of(prepared, compressed, dense))
        measure(prepared, record, model, "retrained", state_of(prepared, model))
    record.parameters = parameters(prepared, before, count_parameters(model.module), kept_parameters(model))
    record.bits = bits(prepared, dense_bits, model)
    return model


def measure(prepared: PreparedRun, record: RunRecord, model: Model, stage: str, state: str) -> None:
    """Let the model continue the prompt, and carry out all tasks. `state` is the digest of the model."""
    with timed(record, stage):
        continue_prompt(prepared, record, model, stage, state)
        evaluate(prepared, record, model, stage, state)


def files_of(folder: Path) -> dict[str, bytes]:
    """The figures in a run's folder, {name: contents}; the record is last."""
    files = [file for pattern in ("*.csv", "*.jsonl", "record.json") for file in sorted(folder.glob(pattern))]
    return {file.name: file.read_bytes() for file in files}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def timed(record: RunRecord, stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    record.seconds[stage] = time.perf_counter() - begun
