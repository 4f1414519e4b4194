"""Save the model of a finished run, after retraining if it was retrained."""

import logging
import re
import shutil
from collections import Counter
from pathlib import Path

from nla.harness.headlines import headlines, measured_on
from nla.harness.record import RunRecord, method_names
from nla.harness.request import PreparedRun
from nla.harness.sizes import bytes_in_the_end
from nla.machine.errors import UserError
from nla.machine.sealed_folder import damage
from nla.models.base import LanguageModel, Model
from nla.saved.card import About
from nla.saved.save import require_new, save_compressed

log = logging.getLogger(__name__)


def target(prepared: PreparedRun, folder: Path) -> Path | None:
    """Where `save=` wants the model of the run with this folder, or None if it is not to be saved."""
    asked = prepared.values["save"]
    if isinstance(asked, str):
        return Path(asked).expanduser().absolute()
    return (folder / "model").absolute() if asked else None


def is_saved(record: RunRecord, wanted: Path | None) -> bool:
    """Whether nothing is left to save: no folder is wanted, or this run has saved its model there and its files are whole."""
    return wanted is None or (record.saved == str(wanted) and wanted.is_dir() and not damage(wanted))


def check_target(prepared: PreparedRun, wanted: Path) -> None:
    """Raise UserError, before the work begins, if the model cannot be saved there."""
    require_new(wanted)
    size = bytes_in_the_end(prepared)
    existing = next(path for path in wanted.parents if path.exists())
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        wanted.rmdir()
    except OSError as error:
        raise UserError(f"save={wanted} cannot be written ({error}); name a folder that can") from error
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"save={wanted} needs about {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; "
            "name a folder on another disk"
        )


def save(record: RunRecord, model: Model, wanted: Path) -> None:
    """Save the model and note its folder in the record."""
    tokenizer = model.tokenizer if isinstance(model, LanguageModel) else None
    save_compressed(model.module, wanted, tokenizer, about(record))
    record.saved = str(wanted)


def about(record: RunRecord) -> About:
    """The origin and the figures of a run's model, for its card."""
    config, p, bits = record.config, record.parameters, record.bits
    assert p is not None and bits is not None
    removed = f"{100 * p.ratio:.1f} % of the selected layers' parameters, {100 * p.model_ratio:.1f} % of the model's"
    rows = [
        ("method", method_names(config)[0]),
        ("matrices", kinds_of_terms(record)),
        ("numbers", f"{config['dtype']}, except codes"),
        *([("removed", removed)] if p.ratio > 0 else []),  # grids have as many numbers as the matrix, and more
        ("kept", f"{bits.selected_per_weight:.2f} bits per weight of the selected layers"),
        ("retrained", f"{record.retraining.steps:,} steps" if record.retraining else "no"),
        ("command", f"`{record.command}`"),
        ("commit of nla", record.environment["commit"]),
    ]
    source = config["model"]
    return About(source["name"], source.get("licence", "unknown"), rows, figures(record))


def kinds_of_terms(record: RunRecord) -> str:
    """The terms of the matrices without their sizes, the most frequent first: `linear + phase scaled (209), linear (1)`."""
    kinds = Counter(re.sub(r" (h|r|rank)=\d+", "", fit.terms) for fit in record.fits)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())


def figures(record: RunRecord) -> str:
    """The metrics of all stages as a table in Markdown, with the settings of the tasks, and the continuations."""
    lines = ["| model | task | data | measure | figure | of |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {stage} | {task} | {data} | {name} | {figure} | {measured_on(found)} |"
        for stage, tasks in record.metrics.items()
        for task, sets in tasks.items()
        for data, found in sets.items()
        for name, figure in headlines(found)
    ]
    settings = ", ".join(f"{name}={value}" for name, value in record.config["task"].items() if not isinstance(value, dict))
    lines += ["", f"Settings of the tasks: {settings}. `record.json` of run {record.name} has all figures."]
    if record.continuations:
        lines += ["", f'Greedy continuations of "{record.config["prompt"]}":', ""]
        lines += [f"- {stage}: {' '.join(text.split())}" for stage, text in record.continuations.items()]
    return "\n".join(lines)
