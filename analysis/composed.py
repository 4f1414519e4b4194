"""Settings of conf/ composed by Hydra, as a command line with the same overrides has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.global_hydra import GlobalHydra

from nla.harness.settings import check_settings

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


class Remembered(CachingConfigRepository):
    """Reads each file of conf/ once in a process. Hydra would read them again for each command line."""

    def load_config(self, config_path: str) -> Any:
        return deepcopy(super().load_config(config_path))  # composing changes what it gets

    def __deepcopy__(self, memo: dict) -> "Remembered":
        return self  # Hydra makes a copy for each command line


@cache
def files_of_conf() -> Remembered:
    """The files of conf/, for the Hydra that is initialised."""
    return Remembered(GlobalHydra.instance().config_loader().repository)  # type: ignore[attr-defined]


@contextmanager
def hydra_of_conf() -> Iterator[None]:
    """Initialise Hydra with conf/. A Hydra that is running already, such as that of run.py, is put back afterwards."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            GlobalHydra.instance().config_loader().repository = files_of_conf()  # type: ignore[attr-defined]
            yield
    finally:
        GlobalHydra.instance().hydra = running


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """The checked and resolved settings of `python run.py OVERRIDES`. Callers must not change them: they are kept."""
    with hydra_of_conf():
        return check_settings(compose("config", overrides=list(overrides)))


@cache
def sweep(experiment: str) -> dict[str, list[str]]:
    """{setting: its values} of the sweep of an experiment. It is empty for an experiment of one row."""
    with hydra_of_conf():
        hydra = compose("config", overrides=[f"experiment={experiment}"], return_hydra_config=True).hydra
    return {key: str(values).split(",") for key, values in dict(hydra.sweeper.params or {}).items()}


def leaves(settings: dict[str, Any], ignored: set[str], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested settings, without keys whose last part is in `ignored`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= leaves(value, ignored, f"{prefix}{key}.")
        elif key not in ignored:
            found[prefix + key] = value
    return found
