"""What is wrong with a command line, in words: settings that do not exist, and settings that nothing would read."""

import difflib
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"
FREE = ("model.architecture.", "hydra")  # what keys that may be added begin with


def print_errors(said: Iterable[str]) -> None:
    """Print these texts to stderr as errors."""
    for text in said:
        print(f"error: {text}", file=sys.stderr)


def check_arguments(arguments: list[str]) -> None:
    """End with exit code 1 for what Hydra would accept and this program would not read as it is meant."""
    _, unknown = get_args_parser().parse_known_args(arguments)
    if unknown:
        print_errors([f"{unknown[0]} is no option; settings are written as key=value, such as ratio=0.5"])
        sys.exit(1)
    for argument in arguments:
        setting = argument.lstrip("+")
        if setting != argument and not setting.startswith(FREE):
            plus = f"{argument}: nothing would read a setting that is added with +; write {setting}"
            print_errors([plus, *unknown_settings([setting])])
            sys.exit(1)
        group, _, value = argument.partition("=")
        names = [name.strip() for name in value.strip("[]").split(",")]
        if group in ("data", "calibration") and max(kinds_of(group, names).values(), default=0) > 1 and "[" in value:
            several = f"-m {group}={','.join(names)} makes a run for each"
            print_errors([f"{argument}: two sets of the same kind, and a run takes one; {several}"])
            sys.exit(1)


def kinds_of(group: str, names: list[str]) -> Counter[str]:
    """How many of these options have sets of each kind (text, images, questions)."""
    files = [CONF / group / f"{name}.yaml" for name in names]
    sets = [OmegaConf.load(file) for file in files if file.exists()]
    return Counter(str(kind) for found in sets for kind, value in found.items() if isinstance(value, DictConfig))


def unknown_settings(arguments: list[str]) -> list[str]:
    """For each unknown setting of a command line, a text: which option of its group has it, or the settings that exist."""
    keys = [a.lstrip("+").partition("=")[0] for a in arguments if "=" in a and a[0] not in "~-"]
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen = [a for a in arguments if a.partition("=")[0] in groups and "," not in a]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=chosen)
    except Exception:  # what Hydra raises is not known
        return []  # an option of a group is wrong, and Hydra lists the allowed ones
    said = []
    for key in keys:
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(cfg, parent) if parent else cfg
        if key in groups or key.startswith(FREE) or (isinstance(section, DictConfig) and name in section):
            continue
        options = options_with(parent, name) if parent in groups else []
        if options:
            said.append(f"{key} needs {' or '.join(options)} on the command line")
        elif isinstance(section, DictConfig):
            said.append(explained(name, f"{parent}." if parent else "", section))
        elif parent.partition(".")[0] in groups:
            said.append(f"{key} is not a setting while no {parent} is chosen; choose one, {parent}=<option>")
    return said


def options_with(group: str, name: str) -> list[str]:
    """The options of a configuration group whose yaml has this setting, as `group=option`."""
    found = []
    for path in sorted((CONF / group).glob("*.yaml")):
        cfg = OmegaConf.load(path)
        assert isinstance(cfg, DictConfig)
        if name in (cfg[group] if isinstance(cfg.get(group), DictConfig) else cfg):
            found.append(f"{group}={path.stem}")
    return found


def explained(name: str, prefix: str, section: DictConfig) -> str:
    """The settings of a section of the configuration, which has none of this name, and the nearest one."""
    allowed = sorted(k for k in map(str, section) if not k.startswith("_"))
    near = difflib.get_close_matches(name, allowed, 1)
    meant = f"; did you mean {prefix}{near[0]}?" if near else ""
    listed = textwrap.fill(f"allowed: {', '.join(prefix + k for k in allowed)}", 80, break_on_hyphens=False)
    return f"{prefix}{name} is not a setting{meant}\n{listed}"
