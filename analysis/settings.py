"""The settings of a run as a user would type them: options of conf/, and the values that differ from these options."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import instantiate

from analysis.composed import CONF, composed, leaves
from nla.harness.fits_table import parse_terms
from nla.harness.record import RunRecord, module_name
from nla.kernels.base import Kernel

NOT_TRAINED_BY = {"steps", "spike", "checkpoint", "watch", "processes", "recompute", "products"}
COMPARED_STATISTICS = ("windows", "length", "fisher_windows")
NOT_COMPARED = {"products", "degree"}  # the first depends on the machine; the second is part of a kernel's name
NOT_OF_THE_MODEL = {"path", "device_map", "licence"}  # a local copy of the files, spread or not, is the same model
PRESETS = {
    "nla_outputs",
    "nla_angles",
    "nla_levels",
    "svd_llm_int4",
}  # options that are others with settings; tables show these
Pair = tuple[str, Any]


def run_settings(record: RunRecord) -> dict[str, Any]:
    """The settings by which runs are compared. `changed` names all others that differ from conf/."""
    config = record.config
    return {
        "model": model_name(config["model"]),
        "method": nearest_option("method", config["method"])[0],
        "kernel": kernel_name(record),
        "storage": storage_name(config["method"]),
        "ratio": config["ratio"],
        "bits": config.get("bits"),
        "select": selection(config["select"]),
        "tasks": "+".join(task_names(config)),
        "data": "+".join(data_names(config)),
        "changed": " ".join(changed_settings(config, stepped=any(fit.steps for fit in record.fits))),
        "budget": " ".join(named_budget(config["budget"])),
        "retraining": retraining_name(config),
        "retrain_steps": config.get("retrain", {}).get("steps", 0),
        "seed": config["seed"],
        "matrices": len(record.fits),
        "signature": record.signature,
    }


def kernel_name(record: RunRecord) -> str:
    """The kernels of a run's terms.

    Matrices that stayed dense do not count, nor, of NLA, those that fell back to linear factors, unless all did.
    """
    names = {term.kernel for text in {fit.terms for fit in record.fits} for term in parse_terms(text)}
    names = names - {"dense"} or names
    if nearest_option("method", record.config["method"])[0] == "nla" and len(names) > 1:
        names -= {"linear"}
    return "+".join(sorted(names))


def storage_name(method: dict[str, Any]) -> str:
    """Name of the option of conf/storage of a method's numbers. Methods without a choice have `float`."""
    return nearest_option("storage", method["storage"])[0] if "storage" in method else "float"


def model_name(model: dict[str, Any]) -> str:
    """Name of the option of conf/model with these settings, and `key=value` of settings that differ from it.

    Of options with the same hub name, the nearest is taken. A model whose hub name no option has is named by its hub name.
    """
    own, found = leaves(model, NOT_OF_THE_MODEL), []
    for name, content in group_options("model").items():
        if content.get("model", content).get("name") == model["name"]:
            usual = leaves(composed(f"model={name}")["model"], NOT_OF_THE_MODEL)
            found.append((name, [(k, v) for k, v in own.items() if k in usual and v != usual[k]]))
    name, changed = min(found, key=lambda option: len(option[1]), default=(model["name"], []))
    return " ".join([name, *as_typed(changed)])


def nearest_option(group: str, settings: dict[str, Any], ignored: Iterable[str] = ()) -> tuple[str, list[Pair]]:
    """Name of the option of a group that is nearest to these settings, and the (key, value) pairs that differ from it.

    The nearest option has the same `_target_` and the fewest differences. If no option has this `_target_`, the name is that
    of the class's module, and every setting counts as different. Settings that are groups themselves are not compared.
    """
    own = {k: v for k, v in settings.items() if k not in ignored and k != "_target_" and not isinstance(v, dict)}
    found = [
        (name, [(key, value) for key, value in own.items() if value != usual.get(key)])
        for name, usual in group_options(group).items()
        if usual.get("_target_") == settings["_target_"]
    ]
    return min(found, key=lambda option: len(option[1]), default=(module_name(settings), list(own.items())))


@cache
def group_options(group: str) -> dict[str, dict[str, Any]]:
    """The settings of every option of a group, by name, without PRESETS."""
    return {path.stem: option(group, path.stem) for path in sorted((CONF / group).glob("*.yaml")) if path.stem not in PRESETS}


def option(group: str, name: str) -> dict[str, Any]:
    """The settings of an option, merged over those of the options of the same group that it inherits from."""
    content = dict(read_yaml(CONF / group / f"{name}.yaml") or {})
    bases = [base for base in content.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    own = content[group] if isinstance(content.get(group), dict) else content  # an option of the whole configuration
    whole: dict[str, Any] = {}
    for layer in [*(option(group, base) for base in bases), own]:
        whole = merged(whole, layer)
    return whole


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, with own ones over those of a base."""
    both = {k: merged(base[k], v) for k, v in own.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | own | both


def as_typed(pairs: Iterable[Pair]) -> list[str]:
    return [f"{key}={value}" for key, value in pairs]


def changed_settings(config: dict[str, Any], stepped: bool) -> list[str]:
    """`key=value` of the settings of `changed_pairs`, with the last part of each key."""
    return as_typed((key.rpartition(".")[2], value) for key, value in changed_pairs(config, stepped))


def changed_pairs(config: dict[str, Any], stepped: bool) -> list[Pair]:
    """(key, value) of the settings of method, task, statistics, seed, type and budget that differ from conf/, as typed.

    Args:
        stepped: whether a fit took a step. If none did, solver.steps had no effect and is left out, unless it is 0.
    """
    method = config["method"]
    used = {"method": method} | {group: method[group] for group in ("kernel", "solver", "storage") if group in method}
    changed = [pair for group, own in used.items() for pair in dotted(group, nearest_option(group, own, NOT_COMPARED)[1])]
    storage = storage_name(method)
    if storage != "float":  # it chooses settings of the solver
        usual = group_options("solver")["gradient"] | read_yaml(CONF / "storage" / f"{storage}.yaml").get("solver", {})
        own = {k: v for k, v in method.get("solver", {}).items() if k not in NOT_COMPARED and not isinstance(v, dict)}
        changed = [(key, value) for key, value in changed if not key.startswith("solver.")]
        changed += dotted("solver", [(k, v) for k, v in own.items() if k != "_target_" and v != usual[k]])
        changed.append(("storage", storage))
    usual = task_defaults(task_names(config))
    pairs = [(f"task.{key}", value, usual.get(key)) for key, value in config["task"].items() if not isinstance(value, dict)]
    top = read_yaml(CONF / "config.yaml")
    statistics = config.get("statistics", top["statistics"])
    pairs += [(f"statistics.{key}", statistics[key], top["statistics"][key]) for key in COMPARED_STATISTICS]
    drawn = config["statistics"]["seed"] if "statistics" in config else config["seed"]
    pairs += [("statistics.seed", drawn, config["seed"])] if drawn else []  # older runs have 0, whatever their seed
    pairs += [("seed", config["seed"], top["seed"]), ("dtype", config["dtype"], config["model"]["dtype"])]
    pairs += [("budget", nearest_option("budget", config["budget"])[0], "uniform")]
    pairs += [("forward", forward_form(config), top["forward"])]
    changed += [(key, value) for key, value, default in pairs if value != default]
    if config.get("refine"):
        name, others = nearest_option("refine", config["refine"], NOT_COMPARED)
        changed += [("refine", name), *dotted("refine", others)]
    changed += [("calibration", name) for name in other_calibration(config)]
    for name in task_names(config):
        changed += data_pairs("data", config["task"][name]["data"])
    learnt = [config[group]["data"] for group in ("statistics", "retrain") if "data" in config.get(group, {})]
    changed += data_pairs("calibration", learnt[0]) if learnt else []
    return [(key, value) for key, value in changed if stepped or key != "solver.steps" or not value]


def data_pairs(group: str, data: dict[str, Any]) -> list[Pair]:
    """(key, value) of the settings of a data set that differ from those of the option with its name, except where it lies."""
    options = group_options("data").get(data["name"], {})
    for kind, usual in options.items():
        if isinstance(usual, dict) and usual.get("name") == data["name"]:
            own = {key: value for key, value in data.items() if not isinstance(value, dict) and key in usual}
            fixed = {key: value for key, value in own.items() if not str(usual[key]).startswith("${")}
            return [(f"{group}.{kind}.{key}", value) for key, value in fixed.items() if value != usual[key]]
    return []


def dotted(group: str, pairs: Iterable[Pair]) -> list[Pair]:
    return [(f"{group}.{key}", value) for key, value in pairs]


def typed_settings(record: RunRecord) -> dict[str, str]:
    """{key: value} of a run as on its command line: what is always named, and all settings that differ from conf/."""
    config, named = record.config, run_settings(record)
    found = {key: named[key] for key in ("model", "method", "ratio", "bits", "select", "data", "seed")} | {
        "task": named["tasks"]
    }
    if "kernel" in config["method"]:
        found["kernel"] = named["kernel"]
    found |= changed_pairs(config, stepped=any(fit.steps for fit in record.fits))
    budget, retrain = config["budget"], config.get("retrain")
    found["budget"], changed = nearest_option("budget", budget)
    found |= dotted("budget", changed)
    if "schedule" in budget:
        found["schedule"], changed = nearest_option("schedule", budget["schedule"])
        found |= dotted("schedule", changed)
    if retrain:
        found["retrain"], changed = nearest_retraining(config)
        found |= dict(dotted("retrain", changed)) | {"retrain.steps": retrain["steps"], "retrain.data": retrain["data"]["name"]}
    return {key: str(value) for key, value in found.items() if value is not None}


def forward_form(config: dict[str, Any]) -> str:
    """The form of the forward pass."""
    return config["forward"]


def data_names(config: dict[str, Any]) -> list[str]:
    """The names of the data on which the tasks of a run measure."""
    return [config["task"][name]["data"]["name"] for name in task_names(config)]


def other_calibration(config: dict[str, Any]) -> list[str]:
    """The name of the calibration data, unless it is that of conf/ or, for images, the test data's own training split."""
    data = config.get("statistics", {}).get("data")
    if data is None:
        return []
    defaults = [entry for entry in read_yaml(CONF / "config.yaml")["defaults"] if isinstance(entry, dict)]
    text = [entry["calibration"] for entry in defaults if "calibration" in entry]
    usual = data_names(config) if ".images." in data["_target_"] else text
    return [name for name in [data["name"]] if name not in usual]


def retraining_name(config: dict[str, Any]) -> str:
    """The nearest option of conf/retrain, the data, and `key=value` of settings that differ; empty without retraining."""
    if "retrain" not in config:
        return ""
    name, changed = nearest_retraining(config)
    return " ".join([name, f"on {config['retrain']['data']['name']}", *as_typed(changed)])


def nearest_retraining(config: dict[str, Any]) -> tuple[str, list[Pair]]:
    """The nearest option of conf/retrain and the pairs that differ from it. The kernel's own rate is lr=null."""
    settings = config["retrain"]
    if settings["lr"] == own_rate(config["method"]):
        settings = settings | {"lr": None}
    return nearest_option("retrain", settings, NOT_TRAINED_BY)


def own_rate(method: dict[str, Any]) -> float:
    """The learning rate of retraining that the method's kernel brings with it."""
    return instantiate(method["kernel"]).training_rate if "kernel" in method else Kernel.training_rate


def named_budget(budget: dict[str, Any]) -> list[str]:
    """The budget's name, `key=value` of settings that differ from conf/, and the schedule if it is not cubic."""
    name, changed = nearest_option("budget", budget)
    words = [name, *as_typed(changed)]
    if "schedule" in budget:
        kind, changed = nearest_option("schedule", budget["schedule"])
        words += [] if kind == "cubic" else [kind]
        words += as_typed(changed)
    return words


def selection(chosen: dict[str, Any]) -> str:
    """The name of a selection in conf/select, or its regular expressions."""
    for name, usual in group_options("select").items():
        if usual == chosen:
            return name
    return chosen["include"] + (f" without {chosen['exclude']}" if chosen["exclude"] else "")


def task_names(config: dict[str, Any]) -> list[str]:
    """The tasks of a run."""
    return [name for name, value in config["task"].items() if isinstance(value, dict)]


def task_defaults(names: list[str]) -> dict[str, Any]:
    """The settings that these tasks have in conf/task."""
    files = [read_yaml(CONF / "task" / f"{name}.yaml") for name in names]
    return {key: value for content in files for key, value in content.get("task", content).items()}


@cache
def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
