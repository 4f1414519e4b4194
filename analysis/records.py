"""Records of runs as data frames."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from nla.harness.record import RunRecord, read_record

ROOT = Path(__file__).resolve().parent.parent
PLACES = (ROOT / "analysis" / "records", ROOT / "outputs" / "runs")
LAYER = r".*\.(\d+)\."  # the last number in a qualified name is the layer's; what follows is the kind of matrix


def load_records(places: Iterable[Path] = PLACES) -> list[RunRecord]:
    """The finished runs below these folders, in order of model, method and ratio; of equal requests the latest."""
    files = [file for place in places for file in place.rglob("*.json") if is_record(file)]
    done = [record for record in map(read_record, files) if record.status == "done"]
    latest: dict[tuple, RunRecord] = {}
    for record in sorted(done, key=lambda record: (record.finished or "", record.signature)):
        settings = run_settings(record)
        del settings["signature"]
        latest[tuple(settings.values())] = record
    return [latest[key] for key in sorted(latest)]


def is_record(file: Path) -> bool:
    return file.name == "record.json" or file.parent.name == "records"


def run_settings(record: RunRecord) -> dict[str, Any]:
    """The settings by which runs are compared; what else departs from conf/ is in `changed`."""
    method = record.config["method"]["_target_"].rpartition(".")[2].lower()
    kernels = {part.split()[0] for fit in record.fits for part in fit.terms.split(" + ")}
    return {
        "model": record.config["model"]["name"],
        "method": method,
        "kernel": "+".join(sorted(kernels)),
        "ratio": record.config["ratio"],
        "select": selection(record.config["select"]),
        "tasks": "+".join(task_names(record.config)),
        "changed": " ".join(changed_settings(record.config, stepped=any(fit.steps for fit in record.fits))),
        "budget": " ".join([budget_name(record.config), *changed_budget(record.config["budget"])]),
        "retraining": retraining_name(record.config),
        "retrain_steps": record.config.get("retrain", {}).get("steps", 0),
        "seed": record.config["seed"],
        "matrices": len(record.fits),
        "signature": record.signature,
    }


def changed_settings(config: dict[str, Any], stepped: bool) -> list[str]:
    """`key=value` of the settings of method, task, statistics, seed, type and selection that are not those of conf/.

    How many steps a solver may take is left out where it had a closed form and took none.
    """
    method = config["method"]
    used = {"method": method} | {group: method[group] for group in ("kernel", "solver") if group in method}
    pairs = [
        (key, value, defaults.get(key))
        for group, values in used.items()
        for defaults in [next(d for d in group_defaults(group) if d.get("_target_") == values["_target_"])]
        for key, value in values.items()
        if key not in NOT_COMPARED
    ]
    usual = task_defaults(task_names(config))
    pairs += [(key, value, usual.get(key)) for key, value in config["task"].items() if key != "_target_"]
    top = read_yaml(ROOT / "conf" / "config.yaml")
    pairs += [(key, config.get("statistics", top["statistics"])[key], top["statistics"][key]) for key in COMPARED_STATISTICS]
    pairs += [("seed", config["seed"], top["seed"]), ("dtype", config["dtype"], config["model"]["dtype"])]
    pairs += [("budget", budget_name(config), "uniform")]
    unused = () if stepped else ("steps",)
    changed = [(key, value) for key, value, default in pairs if value != default and not isinstance(value, dict)]
    return [f"{key}={value}" for key, value in changed if key not in unused or not value]


def retraining_name(config: dict[str, Any]) -> str:
    """The file of conf/retrain that the settings are nearest to, the data, and `key=value` of what differs from the file."""
    if "retrain" not in config:
        return ""
    folder = ROOT / "conf" / "retrain"
    names = {path.stem: retrain_defaults(path.stem) for path in sorted(folder.glob("*.yaml"))}
    changes = {
        name: [f"{k}={v}" for k, v in config["retrain"].items() if k not in NOT_TRAINED_BY and v != usual.get(k)]
        for name, usual in names.items()
    }
    nearest = min(changes, key=lambda name: len(changes[name]))
    return " ".join([nearest, f"on {config['retrain']['data']['name']}", *changes[nearest]])


def retrain_defaults(name: str) -> dict[str, Any]:
    """A file of conf/retrain over those it is made from."""
    content = dict(read_yaml(ROOT / "conf" / "retrain" / f"{name}.yaml"))
    bases = [base for base in content.pop("defaults", []) if base != "_self_"]
    return {key: value for base in bases for key, value in retrain_defaults(base).items()} | content


def budget_name(config: dict[str, Any]) -> str:
    return config["budget"]["_target_"].rpartition(".")[2].lower()


def changed_budget(budget: dict[str, Any]) -> list[str]:
    """`key=value` of the settings that are not those of conf/, and the kind of a schedule that is not cubic."""
    usual = read_yaml(ROOT / "conf" / "budget" / f"{budget['_target_'].rpartition('.')[2].lower()}.yaml")
    changed = [f"{key}={value}" for key, value in budget.items() if key != "schedule" and value != usual.get(key)]
    if "schedule" in budget:
        kind = budget["schedule"]["_target_"].rpartition(".")[2].lower()
        usual = read_yaml(ROOT / "conf" / "schedule" / f"{kind}.yaml")
        changed += [] if kind == "cubic" else [kind]
        changed += [f"{key}={value}" for key, value in budget["schedule"].items() if value != usual.get(key)]
    return changed


ERRORS = ("relative_error", "svd_error", "floor", "weighted_error", "svd_llm_error", "weighted_floor")


def selection(chosen: dict[str, Any]) -> str:
    """The name of a selection in conf/select, or its regular expressions."""
    for path in sorted((ROOT / "conf" / "select").glob("*.yaml")):
        if read_yaml(path) == chosen:
            return path.stem
    return chosen["include"] + (f" without {chosen['exclude']}" if chosen["exclude"] else "")


NOT_TRAINED_BY = ("_target_", "data", "steps", "spike", "checkpoint", "watch", "processes", "recompute")
COMPARED_STATISTICS = ("windows", "length", "fisher_windows")
NOT_COMPARED = ("products", "degree", "optimiser")  # the machine's choice; part of a kernel's name; a node of its own


def task_names(config: dict[str, Any]) -> list[str]:
    """The tasks of a run; before there were several, a run had perplexity only."""
    names = [name for name, value in config["task"].items() if isinstance(value, dict) and name != "data"]
    return names or ["language_modelling"]


def task_defaults(names: list[str]) -> dict[str, Any]:
    """The settings that these tasks have in conf/task."""
    files = [read_yaml(ROOT / "conf" / "task" / f"{name}.yaml") for name in names]
    return {key: value for content in files for key, value in content.get("task", content).items()}


def group_defaults(group: str) -> list[dict[str, Any]]:
    """The yaml files of a configuration group."""
    return [read_yaml(path) for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]


@cache
def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def runs_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per run: settings, parameters, mean errors, seconds, and `<stage>.<task>.<data>.<metric>` columns."""
    rows = []
    for record in records:
        fits = fits_frame([record])
        row = run_settings(record)
        row |= record.parameters.model_dump(exclude={"ratio"}) if record.parameters else {}
        row |= {key: fits[key].mean() for key in ERRORS}
        row |= {"fit_seconds": fits["seconds"].sum(), "fit_peak_bytes": fits["peak_bytes"].max()}
        if record.retraining:
            row |= record.retraining.model_dump(include={"tokens", "samples", "trained"})
            row |= {"retrain_seconds": record.retraining.seconds}
        for stage, tasks in record.metrics.items():
            for task, sets in tasks.items():
                for data, figures in sets.items():
                    row |= {f"{stage}.{task}.{data}.{metric}": value for metric, value in figures.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def fits_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per matrix and run: settings, layer, kind of matrix, and every figure of the fit."""
    rows = [
        settings | fit.model_dump(exclude={"terms"}) | dict(re.findall(r"([hr])=(\d+)", fit.terms)[:2])
        for record in records
        for settings in [run_settings(record)]
        for fit in record.fits
    ]
    frame = pd.DataFrame(rows)
    if len(frame):
        frame = frame.astype(dict.fromkeys(ERRORS, float))
        frame["kind"] = frame["name"].str.replace(r"^.*\.\d+\.", "", regex=True)
        within = frame.groupby(["signature", "kind"])
        number = frame["name"].str.extract(LAYER, expand=False).astype("Int64")
        staged = (
            frame.assign(number=number).duplicated(["signature", "kind", "number"]).groupby(frame["signature"]).transform("any")
        )
        frame["layer"] = number.mask(staged, within.cumcount())  # Swin counts its blocks anew in each stage
    return frame
